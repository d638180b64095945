from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from attnseg import Bundle, Segmenter, SegmentOptions, Volume
from attnseg.runtime.errors import BundleError, ConfigError, VolumeError
from attnseg.runtime.geometry import Box, Shape
from attnseg.runtime.model.bundle import file_entry
from attnseg.runtime.model.manifest import Inference, Manifest
from attnseg.runtime.pipelines.base import Segmentation
from attnseg.runtime.steps.preprocess import Preprocessed, Preprocessing
from attnseg.runtime.steps.resample import Grid, resample, resample_volume
from attnseg.runtime.steps.restore import restored
from attnseg.runtime.steps.schemes import ZScore
from attnseg.runtime.task import Channel, Label, Task
from tests.bundles import small_graph, write_bundle
from tests.conftest import LinearEngine

ANISOTROPIC = np.array([[0, 0, 3.0, 5], [-1.0, 0, 0, 6], [0, 2.0, 0, 7], [0, 0, 0, 1]])

sizes = st.integers(2, 9)
shapes = st.tuples(sizes, sizes, sizes)
millimetres = st.floats(0.5, 5)
spacings = st.tuples(millimetres, millimetres, millimetres)
grids = st.builds(lambda s: Grid(shape=s), shapes) | st.builds(
    lambda s: Grid(spacing_mm=s), spacings
)


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, np.float32)


def corners_mm(volume: Volume) -> np.ndarray:
    """Where the outer faces of the first and the last voxel meet, in the world."""
    ends = [(-0.5, -0.5, -0.5), tuple(n - 0.5 for n in volume.shape)]
    return nib.affines.apply_affine(volume.affine, ends)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "either a shape or a spacing_mm"),
        ({"shape": (4, 4, 4), "spacing_mm": (1.0, 1.0, 1.0)}, "either a shape or a spacing_mm"),
        ({"shape": (4, 4)}, r"three positive numbers, got \(4, 4\)"),
        ({"shape": (4, 0, 4)}, r"three positive numbers, got \(4, 0, 4\)"),
        ({"spacing_mm": (1.0, -1.0, 1.0)}, "three positive numbers"),
        ({"spacing_mm": (1.0, math.nan, 1.0)}, "three positive numbers"),
        ({"spacing_mm": (1.0, math.inf, 1.0)}, "three positive numbers"),
    ],
    ids=str,
)
def test_a_grid_is_one_shape_or_one_spacing(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Grid(**fields)


def test_the_shape_of_a_spacing_covers_the_same_space() -> None:
    def shape_on(grid: Grid) -> Shape:
        return grid.sampling((10, 7, 5), (1.0, 2.0, 3.0)).target

    assert shape_on(Grid(spacing_mm=(2.0, 2.0, 2.0))) == (5, 7, 8)  # 7.5 rounds to even
    assert shape_on(Grid(spacing_mm=(99.0, 99.0, 99.0))) == (2, 2, 2)
    assert shape_on(Grid(shape=(3, 4, 5))) == (3, 4, 5)


def test_halving_and_doubling_by_hand() -> None:
    # Pairs of voxels are averaged; the outermost quarters have one neighbour only.
    ramp = np.array([0.0, 2.0, 4.0, 6.0]).reshape(4, 1, 1)
    assert resample(ramp, (2, 1, 1)).ravel().tolist() == [1, 5]
    assert resample(ramp[:2], (4, 1, 1)).ravel().tolist() == [0, 0.5, 1.5, 2]
    assert resample(ramp, (2, 1, 1), nearest=True).ravel().tolist() == [2, 6]


@given(before=shapes, after=shapes)
def test_interpolation_is_that_of_torch(
    before: tuple[int, int, int], after: tuple[int, int, int]
) -> None:
    array = noise(before)
    whole = torch.from_numpy(array)[None, None]
    expected = torch.nn.functional.interpolate(whole, after, mode="trilinear")[0, 0]
    np.testing.assert_allclose(resample(array, after), expected.numpy(), atol=1e-4)


@given(before=shapes, after=shapes)
def test_labels_stay_labels(before: tuple[int, int, int], after: tuple[int, int, int]) -> None:
    labels = np.random.default_rng(0).choice(np.array([0, 1, 2, 4], np.uint8), before)
    moved = resample(labels, after, nearest=True)
    assert (moved.shape, moved.dtype) == (after, np.uint8)
    assert set(np.unique(moved)) <= set(np.unique(labels))


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "f4", "f8"])
def test_the_dtype_is_kept_and_integers_are_rounded(dtype: str) -> None:
    array = (noise((5, 6, 7)) * 200).astype(dtype)
    moved = resample(array, (8, 5, 9))
    assert moved.dtype == np.dtype(dtype)
    np.testing.assert_allclose(moved, resample(array.astype(float), (8, 5, 9)), atol=0.5001)


@given(shape=shapes, grid=grids, spacing=spacings)
def test_resampling_leaves_the_outer_faces_where_they_were(
    shape: tuple[int, int, int], grid: Grid, spacing: tuple[float, float, float]
) -> None:
    affine = ANISOTROPIC @ np.diag([*spacing, 1.0])
    volume = Volume([noise(shape), noise(shape, 1)], affine)
    moved = resample_volume(volume, grid)
    np.testing.assert_allclose(corners_mm(moved), corners_mm(volume), atol=1e-9)
    assert moved.shape == grid.sampling(volume.shape, volume.spacing_mm).target
    assert moved.orientation == volume.orientation
    assert len(moved.channels) == 2


@given(before=shapes, after=shapes, axis=st.integers(0, 2))
def test_voxels_hold_what_lies_at_their_place_in_the_world(
    before: tuple[int, int, int], after: tuple[int, int, int], axis: int
) -> None:
    # Each voxel holds its own coordinate in mm, so resampled voxels must too, except in the
    # outermost half voxels, beyond the first and last centre.
    def places(volume_affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
        index = np.stack(np.indices(shape), axis=-1)
        return nib.affines.apply_affine(volume_affine, index)[..., axis]

    volume = Volume([places(ANISOTROPIC, before)], ANISOTROPIC)
    moved = resample_volume(volume, Grid(shape=after))
    expected = places(moved.affine, after).clip(volume.channels[0].min(), volume.channels[0].max())
    np.testing.assert_allclose(moved.channels[0], expected, atol=1e-9)


def test_no_grid_and_the_own_shape_change_nothing() -> None:
    volume = Volume([noise((4, 5, 6))], ANISOTROPIC)
    assert resample_volume(volume, None) is volume
    own = resample_volume(volume, Grid(shape=(4, 5, 6)))
    assert own.channels[0] is volume.channels[0]
    np.testing.assert_array_equal(own.affine, volume.affine)


def put_back(
    logits: np.ndarray, box: Box, grid_shape: Shape, shape: Shape, parts: tuple[int, ...] = ()
) -> np.ndarray:
    """Restored logits of a box of a grid, which are handed over in parts that end at `parts`."""
    scan = Preprocessed(
        image=logits,
        box=box,
        box_on_grid=True,
        grid_shape=grid_shape,
        shape=shape,
        sampling=Grid(shape=grid_shape).sampling(shape, (1.0, 1.0, 1.0)),
        back="logits",
    )
    whole = np.concatenate(
        list(restored(np.split(logits, parts, axis=1), scan, np.zeros(len(logits), np.float32))),
        axis=1,
    )
    assert whole.dtype == np.float32
    assert scan.result_box == Box.whole(shape)
    return whole


def test_logits_of_a_box_are_put_back_where_it_lay() -> None:
    logits = np.stack([np.full((2, 2, 2), -3.0), np.full((2, 2, 2), 3.0)]).astype(np.float32)
    whole = put_back(logits, Box((1, 0, 2), (3, 2, 4)), (4, 4, 4), (8, 8, 8))
    assert whole.shape == (2, 8, 8, 8)
    expected = np.zeros((8, 8, 8), int)
    expected[2:6, 0:4, 4:8] = 1
    inside = np.zeros((8, 8, 8), bool)
    inside[3:5, 0:3, 5:8] = True  # not interpolated with voxels outside the box
    assert (whole[1][inside] == 3).all() and (whole[0][inside] == -3).all()
    far = np.ones((8, 8, 8), bool)
    far[1:7, 0:5, 3:8] = False
    assert not whole[:, far].any()
    assert (whole.argmax(axis=0)[expected == 1] == 1).all()


def test_logits_on_the_scans_own_shape_are_put_back_exactly() -> None:
    logits = noise((3, 2, 3, 4))
    box = Box((1, 0, 0), (3, 3, 4))
    whole = put_back(logits, box, (4, 4, 4), (4, 4, 4))
    assert whole.shape == (3, 4, 4, 4)
    np.testing.assert_array_equal(whole[(slice(None), *box.slices())], logits)
    assert np.count_nonzero(whole) == logits.size


@given(
    ends=st.tuples(*[st.tuples(st.integers(0, 3), st.integers(4, 7))] * 3),
    shape=shapes.filter(lambda shape: shape != (7, 7, 7)),
    part=st.integers(1, 3),
)
def test_logits_are_put_back_as_scipy_resamples_the_whole_grid(
    ends: tuple[tuple[int, int], ...], shape: tuple[int, int, int], part: int
) -> None:
    x, y, z = ends
    box = Box((x[0], y[0], z[0]), (x[1], y[1], z[1]))
    logits = noise((2, *box.shape))
    grid = np.zeros((2, 7, 7, 7))
    grid[(slice(None), *box.slices())] = logits
    factors = [size / 7 for size in shape]
    expected = [ndimage.zoom(k, factors, order=1, mode="nearest", grid_mode=True) for k in grid]
    whole = put_back(logits, box, (7, 7, 7), shape, tuple(range(part, box.shape[0], part)))
    np.testing.assert_allclose(whole, expected, atol=1e-6)


def ball_manifest(grid: Grid | None) -> Manifest:
    """A model of one channel and one region, which takes any background."""
    shipped = Bundle.default().manifest
    return replace(
        shipped,
        task=Task(
            channels=(Channel("ct", ("",)),),
            labels=(Label("background", 0), Label("ball", 7)),
            regions={"ball": (7,)},
            display=("ct",),
        ),
        preprocessing=Preprocessing("LPS", grid, "all", (ZScore("all"),)),
        inference=Inference((16, 16, 16), 0.25, 4, 0),
        training=None,
        validation=None,
        files={"model.onnx": file_entry("onnx", small_graph(1, 2), "fp32")},
    )


def ball(orientation: str) -> Volume:
    """A smooth ball in voxels of 1 x 1 x 2 mm."""
    x, y, z = np.ogrid[:30, :26, :14]
    square_mm = (x - 16) ** 2 + (y - 12) ** 2 + (2 * (z - 7)) ** 2
    image = (1000 * np.exp(-square_mm / 100)).astype(np.int16)
    return Volume([image], np.diag([-1.0, -1.0, 2.0, 1.0])).oriented(orientation)


class CountingEngine(LinearEngine):
    """Class 1 where the image is above its mean; keeps the shapes that it was given."""

    def __init__(self) -> None:
        super().__init__(np.array([[-1.0], [1.0]], np.float32))
        self.shapes: list[tuple[int, ...]] = []

    def infer(self, batch: np.ndarray) -> np.ndarray:
        self.shapes.append(batch.shape)
        return super().infer(batch)


def ball_segmenter(grid: Grid | None, **options: Any) -> tuple[Segmenter, CountingEngine]:
    engine = CountingEngine()
    bundle = Bundle(Path("ball"), ball_manifest(grid), "0" * 64)
    return Segmenter(bundle, SegmentOptions(**options), engine), engine


GRIDS = [Grid(shape=(40, 32, 24)), Grid(shape=(20, 20, 20)), Grid(spacing_mm=(1.5, 1.0, 1.0))]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("orientation", ["LPS", "SAR"])
@pytest.mark.parametrize("tta", ["none", "mirror8"])
def test_labels_come_back_on_the_scans_own_grid(grid: Grid, orientation: str, tta: str) -> None:
    scan = ball(orientation)
    plain = ball_segmenter(None, tta=tta)[0].segment(scan)
    result = ball_segmenter(grid, tta=tta)[0].segment(scan)
    assert result.labels.shape == scan.shape
    assert set(np.unique(result.labels)) == {0, 7}
    common = np.count_nonzero(result.labels & plain.labels)
    size = np.count_nonzero(result.labels) + np.count_nonzero(plain.labels)
    assert 2 * common / size > 0.97
    assert result.volumes_ml["ball"] == pytest.approx(
        np.count_nonzero(result.labels) * 0.002, abs=1e-3
    )
    assert "resample" in result.elapsed_ms


@pytest.mark.parametrize(
    ("grid", "shape"),
    [(None, (32, 28, 28)), (GRIDS[0], (40, 32, 24)), (GRIDS[2], (20, 28, 28))],
)
def test_the_network_sees_the_grid_in_the_models_orientation(
    grid: Grid | None, shape: tuple[int, int, int]
) -> None:
    segmenter, engine = ball_segmenter(grid, window="full")
    segmenter.segment(ball("SAR"))
    assert engine.shapes == [(1, 1, *shape)]  # padded to multiples of 4


@pytest.mark.parametrize("grid", [Grid(spacing_mm=(1.0, 1.0, 2.0)), Grid(shape=(30, 26, 14))])
@pytest.mark.parametrize("tta", ["none", "paper"])
def test_a_scan_on_the_models_grid_is_not_resampled(grid: Grid, tta: str) -> None:
    """Its results cover the box that the network saw, as those of a model without a grid."""
    scan = ball("LPS")
    scan.channels[0][:4] = 0  # the box is smaller than the scan

    def segmented(own: Grid | None) -> Segmentation:
        manifest = replace(
            ball_manifest(own),
            spacing_mm=(1.0, 1.0, 2.0),
            preprocessing=Preprocessing("LPS", own, "nonzero", (ZScore("all"),)),
        )
        bundle = Bundle(Path("ball"), manifest, "0" * 64)
        return Segmenter(bundle, SegmentOptions(tta=tta), CountingEngine()).segment(scan)

    result = segmented(grid)
    np.testing.assert_array_equal(result.labels, segmented(None).labels)
    assert result.labels.any() and "resample" not in result.elapsed_ms


def test_another_spacing_is_resampled_to_the_models_and_warned_of() -> None:
    result = ball_segmenter(None)[0].segment(ball("LPS"))
    assert result.resampled_to_mm == (1, 1, 1)
    (warning,) = result.warnings
    assert warning.startswith("spacing is 1 x 1 x 2 mm, the model was trained at 1 x 1 x 1 mm")
    fixed = ball_segmenter(Grid(shape=(8, 8, 8)))[0].segment(ball("LPS"))
    assert "results may be poor" in fixed.warnings[0]
    assert ball_segmenter(GRIDS[2])[0].segment(ball("LPS")).warnings == ()


def test_another_spacing_is_refused_if_resampling_is_not_allowed() -> None:
    with pytest.raises(VolumeError, match=r"spacing is 1 x 1 x 2 mm, .*; resample the scan, or"):
        ball_segmenter(None, resample="never")[0].segment(ball("LPS"))


def test_a_spacing_within_5_percent_is_not_resampled() -> None:
    scan = ball("LPS")
    near = replace(scan, affine=scan.affine @ np.diag([1.04, 0.96, 0.51, 1]))
    result = ball_segmenter(None)[0].segment(near)
    assert result.resampled_to_mm is None
    assert "resample" not in result.elapsed_ms


@pytest.mark.parametrize("grid", [None, *GRIDS], ids=str)
def test_a_manifest_survives_its_file(tmp_path: Path, grid: Grid | None) -> None:
    manifest = ball_manifest(grid)
    bundle = write_bundle(tmp_path / "model", manifest, {"model.onnx": small_graph(1, 2)})
    assert bundle.manifest == manifest
    assert bundle.manifest.preprocessing.grid == grid


def edited(tmp_path: Path, **changes: Any) -> Path:
    """A bundle whose manifest says something else."""
    folder = write_bundle(
        tmp_path / "m", ball_manifest(None), {"model.onnx": small_graph(1, 2)}
    ).folder
    stored = {**json.loads((folder / "manifest.json").read_text()), **changes}
    (folder / "manifest.json").write_text(json.dumps(stored))
    return folder


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, "either a shape or a spacing_mm"),
        ({"shape": [4, 4]}, r"grid\.shape"),
        ({"shape": [4, 4, 0]}, "three positive numbers"),
        ({"shape": [4.5, 4, 4]}, r"grid\.shape"),
        ({"shape": [4, 4, 4], "colour": "red"}, r"grid\.colour"),
        ({"spacing_mm": [1, 1, "a"]}, r"grid\.spacing_mm"),
    ],
    ids=str,
)
def test_a_grid_that_is_none_is_refused(tmp_path: Path, grid: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.load(edited(tmp_path, grid=grid))
    assert "\n" not in str(caught.value)


def test_a_spacing_that_makes_more_voxels_than_any_scan_has_is_refused() -> None:
    scan = ((100, 100, 100), (1.0, 1.0, 1.0))
    assert Grid(spacing_mm=(0.2, 0.2, 0.2)).sampling(*scan).target == (500, 500, 500)
    with pytest.raises(ConfigError, match=r"to 2000 x 2000 x 2000 voxels, .*larger spacing"):
        Grid(spacing_mm=(0.05, 0.05, 0.05)).sampling(*scan)
