from __future__ import annotations

import json
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from attnseg import Bundle, Segmenter, SegmentOptions, Volume
from attnseg.runtime.engines.base import EngineInfo
from attnseg.runtime.errors import BundleError, ConfigError, ScanError, VolumeError
from attnseg.runtime.model.bundle import default_folder
from attnseg.runtime.steps import decide
from attnseg.runtime.steps.preprocess import preprocess
from attnseg.synthetic import SyntheticCase
from tests.conftest import LinearEngine

FP32 = SegmentOptions(precision="fp32")


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter(options=FP32)


@pytest.fixture(scope="module")
def volume(small_synthetic: SyntheticCase) -> Volume:
    return Volume(small_synthetic.images, small_synthetic.affine)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_labels_lie_on_the_input_grid_with_the_bundles_values(
    segmenter: Segmenter, volume: Volume
) -> None:
    result = segmenter.segment(volume)
    assert result.labels.shape == volume.shape
    assert result.labels.dtype == np.uint8
    assert set(np.unique(result.labels)) <= {0, 1, 2, 4}


def test_volumes_are_voxel_counts_in_millilitres(segmenter: Segmenter, volume: Volume) -> None:
    result = segmenter.segment(volume)
    assert result.volumes_ml["ET"] == round(int((result.labels == 4).sum()) / 1000, 3)
    assert result.volumes_ml["WT"] == round(int((result.labels > 0).sum()) / 1000, 3)
    larger = Volume(volume.channels, volume.affine @ np.diag([1.04, 1, 1, 1]))  # not resampled
    found = segmenter.segment(larger)
    assert found.volumes_ml["WT"] == pytest.approx(1.04 * result.volumes_ml["WT"], abs=1e-3)


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "SAL", "IPR"])
def test_the_scans_orientation_does_not_change_the_result(
    segmenter: Segmenter, volume: Volume, orientation: str
) -> None:
    expected = segmenter.segment(volume)
    turned = volume.oriented(orientation)
    result = segmenter.segment(turned)
    back = Volume([result.labels], turned.affine).oriented("LPS")
    np.testing.assert_array_equal(back.channels[0], expected.labels)
    np.testing.assert_allclose(back.affine, volume.affine)


def test_float_voxels_give_the_labels_of_integer_voxels(
    segmenter: Segmenter, volume: Volume
) -> None:
    floats = Volume([c.astype(np.float32) for c in volume.channels], volume.affine)
    expected = segmenter.segment(volume).labels
    assert np.mean(segmenter.segment(floats).labels != expected) < 1e-5


def test_empty_space_around_the_brain_does_not_change_the_result(
    segmenter: Segmenter, volume: Volume
) -> None:
    padded = [np.pad(c, ((5, 0), (0, 9), (3, 3))) for c in volume.channels]
    result = segmenter.segment(Volume(padded, volume.affine)).labels
    np.testing.assert_array_equal(result[5:, :-9, 3:-3], segmenter.segment(volume).labels)


def test_the_same_volume_gives_the_same_bytes(segmenter: Segmenter, volume: Volume) -> None:
    first, second = (segmenter.segment(volume).labels.tobytes() for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    "options",
    [
        SegmentOptions(engine="onnxruntime"),
        SegmentOptions(precision="fp32", tta="paper"),
        SegmentOptions(precision="fp32", tta="paper", fuse="mean"),
        SegmentOptions(precision="fp32", tta="mirror8"),
        SegmentOptions(precision="fp32", window="full"),
        SegmentOptions(precision="fp32", window=48, overlap=0.5),
    ],
    ids=["onnxruntime", "paper vote", "paper mean", "mirror8", "full", "window 48"],
)
def test_every_option_finds_the_same_tumour(
    segmenter: Segmenter, volume: Volume, options: SegmentOptions
) -> None:
    expected = segmenter.segment(volume).labels > 0
    result = Segmenter(options=options).segment(volume).labels > 0
    # A transform that is not inverted, or a misplaced window, scores far lower. A window size other
    # than that of training changes what the attention averages over, and so the tumour's border.
    assert dice(result, expected) > 0.75


def test_engines_agree_on_nearly_every_voxel(segmenter: Segmenter, volume: Volume) -> None:
    other = Segmenter(options=SegmentOptions(engine="onnxruntime")).segment(volume).labels
    assert np.mean(other != segmenter.segment(volume).labels) < 1e-4


def test_small_components_go_unless_asked_for(volume: Volume) -> None:
    every = Segmenter(options=SegmentOptions(precision="fp32", min_voxels=0)).segment(volume)
    none = Segmenter(options=SegmentOptions(precision="fp32", min_voxels=10**9)).segment(volume)
    assert every.components_removed == 0
    assert every.labels.any()
    assert not none.labels.any()


def test_progress_ends_at_one(segmenter: Segmenter, volume: Volume) -> None:
    shares: list[float] = []
    Segmenter(options=SegmentOptions(precision="fp32", tta="paper")).segment(volume, shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_stages_are_timed(segmenter: Segmenter, volume: Volume) -> None:
    stages = set(segmenter.segment(volume).elapsed_ms)
    assert stages == {"check", "preprocess", "blend", "network", "fuse", "clean-up", "restore"}


def test_unusable_volumes_are_refused(segmenter: Segmenter, volume: Volume) -> None:
    with pytest.raises(ScanError, match="takes t1, t1ce, t2, flair, got 3 channels"):
        segmenter.segment(Volume(volume.channels[:3], volume.affine))
    with pytest.raises(VolumeError, match="t1: holds only zeros"):
        segmenter.segment(Volume(np.zeros((4, 8, 8, 8), np.int16), np.eye(4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SegmentOptions(window=60), "window must be full or a multiple of 16 voxels, got 60"),
        (SegmentOptions(window=0), "window must be full or a multiple of 16"),
        (SegmentOptions(overlap=1.0), "overlap must be at least 0 and below 1"),
        (SegmentOptions(min_voxels=-1), "min_voxels must be at least 0"),
        (SegmentOptions(threads=0), "threads must be at least 1"),
        (SegmentOptions(tta="twice"), "tta twice does not exist"),
        (SegmentOptions(fuse="sum"), "fuse sum does not exist"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_out_of_range_are_refused(options: SegmentOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Segmenter(Bundle.default(), options)


def test_a_brain_smaller_than_the_window_is_segmented(segmenter: Segmenter) -> None:
    rng = np.random.default_rng(0)
    channels = np.pad(rng.integers(1, 900, (4, 14, 24, 3)), ((0, 0), *[(3, 3)] * 3))
    result = segmenter.segment(Volume(channels, nib.affines.from_matvec(np.eye(3))))
    assert result.labels.shape == (20, 30, 9)


def test_a_manifest_with_other_labels_than_the_network_is_refused(
    tmp_path: Path, volume: Volume
) -> None:
    folder = Path(shutil.copytree(default_folder(), tmp_path / "bundle"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["labels"] = manifest["labels"][:3]
    manifest["regions"] = {"WT": [1, 2]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="its output has 4 outputs, its manifest names 3"):
        Segmenter(Bundle.load(folder), FP32).segment(volume)


class Stub:
    """An engine of four classes that counts its calls; its logits follow the place in a window."""

    info = EngineInfo("stub", "1", "fp32", "cpu")

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def infer(self, batch: np.ndarray) -> np.ndarray:
        self.shapes.append(batch.shape)
        logits = np.zeros((1, 4, *batch.shape[2:]), np.float32)
        half = batch.shape[2] // 2
        # The first half along X is class 1, by a small margin; the second, class 2, by a large one.
        logits[0, 1, :half] = 0.1
        logits[0, 2, half:] = 9
        return logits


def stubbed(**options: object) -> tuple[Segmenter, Stub]:
    stub = Stub()
    return Segmenter(options=SegmentOptions(min_voxels=0, **options), engine=stub), stub


BLOCK = Volume(
    np.pad(
        np.random.default_rng(0).integers(1, 900, (4, 70, 64, 64)).astype(np.int16),
        ((0, 0), (3, 3), (3, 3), (3, 3)),
    ),
    np.eye(4),
)
"""A foreground of 70 x 64 x 64 voxels."""


@pytest.mark.parametrize(("tta", "count"), [("none", 1), ("paper", 3), ("mirror8", 8)])
def test_every_pass_runs_every_window(tta: str, count: int) -> None:
    segmenter, stub = stubbed(tta=tta)
    result = segmenter.segment(BLOCK)
    assert result.windows == 2
    assert stub.shapes == [(1, 4, 64, 64, 64)] * 2 * count


def test_the_full_window_runs_once_and_is_padded() -> None:
    segmenter, stub = stubbed(window="full")
    segmenter.segment(BLOCK)
    assert stub.shapes == [(1, 4, 80, 64, 64)]


def test_vote_and_mean_are_two_things() -> None:
    # Identity predicts 1 then 2 along the model's X; the mirror predicts 2 then 1. The tie of one
    # vote each goes to class 2, of higher probability, by vote and by mean. The rotation adds a
    # third vote: where it is class 1, by a small margin, class 1 wins the vote but not the mean.
    by_vote = stubbed(tta="paper", fuse="vote", window="full")[0].segment(BLOCK)
    by_mean = stubbed(tta="paper", fuse="mean", window="full")[0].segment(BLOCK)
    assert set(np.unique(by_mean.labels)) == {0, 2}  # 0 around the foreground
    assert set(np.unique(by_vote.labels)) == {0, 1, 2}


class Undecided:
    """Every voxel is background at 0.45, necrosis at 0.2, oedema at 0.2, enhancing at 0.15."""

    info = EngineInfo("undecided", "1", "fp32", "cpu")

    def infer(self, batch: np.ndarray) -> np.ndarray:
        logits = np.log(np.array([0.45, 0.2, 0.2, 0.15], np.float32)).reshape(1, 4, 1, 1, 1)
        return np.broadcast_to(logits, (1, 4, *batch.shape[2:]))


@pytest.mark.parametrize("tta", ["none", "paper"])
def test_thresholds_find_regions_that_no_label_of_theirs_wins(tta: str) -> None:
    """WT has 0.55, and background the largest of the labels."""

    def labels(**options: Any) -> np.ndarray:
        chosen = SegmentOptions(tta=tta, **options)
        return Segmenter(options=chosen, engine=Undecided()).segment(BLOCK).labels

    assert not labels().any()
    found = labels(decide="threshold")
    assert (found[3:-3, 3:-3, 3:-3] == 2).all()
    assert np.count_nonzero(found) == 70 * 64 * 64


@pytest.mark.parametrize("tta", ["none", "paper"])
@pytest.mark.parametrize("rule", ["argmax", "threshold"])
def test_probabilities_of_regions_are_sums_of_those_of_labels(tta: str, rule: str) -> None:
    chosen = SegmentOptions(tta=tta, decide=rule, probabilities=True)  # type: ignore[arg-type]
    found = Segmenter(options=chosen, engine=Undecided()).segment(BLOCK).probabilities
    assert (found.shape, found.dtype) == ((3, *BLOCK.shape), np.float32)
    inside = found[:, 3:-3, 3:-3, 3:-3]
    for region, expected in zip(inside, (0.55, 0.35, 0.15), strict=True):  # WT, TC, ET
        np.testing.assert_allclose(region, expected, rtol=1e-6)
    inside[:] = 0
    assert not found.any()
    plain = Segmenter(options=SegmentOptions(tta=tta), engine=Undecided()).segment(BLOCK)
    assert plain.probabilities is None


@pytest.mark.parametrize("tta", ["none", "paper"])
def test_probabilities_have_a_largest_size(tta: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 4 * 3 * math.prod(BLOCK.shape)
    chosen = SegmentOptions(tta=tta, probabilities=True)
    monkeypatch.setattr(decide, "LARGEST_PROBABILITIES", size)
    assert Segmenter(options=chosen, engine=Undecided()).segment(BLOCK).probabilities is not None
    monkeypatch.setattr(decide, "LARGEST_PROBABILITIES", size - 1)
    with pytest.raises(ConfigError, match=r"probabilities of 3 regions have .*; leave prob.* out"):
        Segmenter(options=chosen, engine=Undecided()).segment(BLOCK)


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "SAL"])
def test_probabilities_are_in_the_grid_of_the_scan(orientation: str) -> None:
    matrix = np.random.default_rng(8).standard_normal((4, 4)).astype(np.float32)
    chosen = SegmentOptions(probabilities=True, window=32)
    segmenter = Segmenter(options=chosen, engine=LinearEngine(matrix))
    image = preprocess(BLOCK.oriented("LPS"), segmenter.plan.preprocessing).image
    exponential = np.exp(np.einsum("kc,cxyz->kxyz", matrix, image))
    labels = exponential / exponential.sum(axis=0)
    regions = np.zeros((3, *BLOCK.shape), np.float32)
    regions[:, 3:-3, 3:-3, 3:-3] = labels[1:].sum(axis=0), labels[1] + labels[3], labels[3]
    in_lps = Volume(list(regions), BLOCK.oriented("LPS").affine)
    expected = in_lps.oriented(orientation).channels
    found = segmenter.segment(BLOCK.oriented(orientation)).probabilities
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("window", ["64", "Full", (64, 64, 32), 64.0])
def test_a_window_that_is_no_number_nor_full_is_refused(window: object) -> None:
    with pytest.raises(ConfigError, match="window must be full or a multiple of 16 voxels, got"):
        Segmenter(options=SegmentOptions(window=window))


def test_a_window_may_be_a_numpy_integer() -> None:
    segmenter, stub = stubbed(window=np.int64(32))
    segmenter.segment(BLOCK)
    assert set(stub.shapes) == {(1, 4, 32, 32, 32)}


def test_a_background_other_than_0_is_refused(segmenter: Segmenter, volume: Volume) -> None:
    shifted = [np.asarray(c) - 1000 if i == 2 else c for i, c in enumerate(volume.channels)]
    with pytest.raises(VolumeError, match="t2: its background is -1000, not 0; give the"):
        segmenter.segment(Volume(shifted, volume.affine))


def test_one_scan_given_as_two_modalities_is_refused(segmenter: Segmenter, volume: Volume) -> None:
    channels = [volume.channels[i] for i in (0, 1, 2, 0)]
    with pytest.raises(VolumeError, match="t1 and flair hold the same voxels"):
        segmenter.segment(Volume(channels, volume.affine))


def test_a_bundle_may_be_named_by_its_folder(tmp_path: Path) -> None:
    assert Segmenter(str(default_folder()), FP32).bundle == Bundle.default()
    with pytest.raises(BundleError, match="is not a bundle"):
        Segmenter(str(tmp_path))


def test_calls_from_many_threads_give_the_labels_of_calls_in_turn() -> None:
    def block(seed: int) -> Volume:
        images = np.random.default_rng(seed).integers(1, 900, (4, 20, 20, 20)).astype(np.int16)
        return Volume(np.pad(images, ((0, 0), *[(3, 3)] * 3)), np.eye(4))

    class Shared:
        """An engine with one buffer for its logits, like OpenVINO's."""

        info = EngineInfo("shared", "1", "fp32", "cpu")

        def __init__(self) -> None:
            self.logits = np.empty((1, 4, 32, 32, 32), np.float32)

        def infer(self, batch: np.ndarray) -> np.ndarray:
            self.logits[:] = batch * np.float32(100)
            time.sleep(0.005)
            return self.logits

    segmenter = Segmenter(options=SegmentOptions(min_voxels=0, window=32), engine=Shared())
    volumes = [block(seed) for seed in range(8)]
    expected = [segmenter.segment(volume).labels for volume in volumes]
    with ThreadPoolExecutor(8) as pool:
        found = [result.labels for result in pool.map(segmenter.segment, volumes * 3)]
    for labels, right in zip(found, expected * 3, strict=True):
        np.testing.assert_array_equal(labels, right)


@pytest.mark.parametrize("volume", [None, "scan.nii", [np.ones((8, 8, 8))]])
def test_something_else_than_a_volume_is_refused(segmenter: Segmenter, volume: object) -> None:
    with pytest.raises(VolumeError, match=r"expected a Volume, got .*; give Volume"):
        segmenter.segment(volume)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["paper", {"tta": "paper"}])
def test_something_else_than_options_is_refused(given: object) -> None:
    with pytest.raises(ConfigError, match="options must be SegmentOptions, got"):
        Segmenter(options=given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "kind"), [("overlap", ""), ("min_voxels", "whole "), ("threads", "whole ")]
)
def test_text_in_place_of_a_number_is_refused(name: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a {kind}number, got '0.5'"):
        Segmenter(options=SegmentOptions(**{name: "0.5"}))
