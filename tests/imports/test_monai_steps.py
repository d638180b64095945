"""Steps of the runtime against MONAI's transforms, on random images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import (
    NormalizeIntensity,
    Orientation,
    ScaleIntensity,
    ScaleIntensityRange,
    ScaleIntensityRangePercentiles,
    Spacing,
)

from attnseg import Volume
from attnseg.runtime.errors import ConfigError
from attnseg.runtime.steps.histogram import Histogram
from attnseg.runtime.steps.normalise import normalise
from attnseg.runtime.steps.preprocess import Preprocessing, preprocess
from attnseg.runtime.steps.resample import Grid
from attnseg.runtime.steps.restore import restored
from attnseg.runtime.steps.schemes import Range, ZScore
from tests.imports.monai_bundles import affine_of, tilted

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

sizes = st.integers(2, 12)
shapes = st.tuples(sizes, sizes, sizes)
millimetres = st.sampled_from([0.5, 0.7, 1.0, 1.0005, 1.5, 2.0, 3.3])
spacings = st.tuples(millimetres, millimetres, millimetres)
orientations = st.sampled_from(["RAS", "LPS", "PIR", "SAL"])


def noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(sum(shape)).random(shape, np.float32)


def resampled(
    shape: tuple[int, ...], affine: np.ndarray, spacing_mm: tuple[float, float, float]
) -> None:
    """Compare an image, and probabilities on the way back, with those of MONAI."""
    image = noise(shape)
    turned = Orientation("RAS")(MetaTensor(image[None], affine=affine))
    spacing = Spacing(spacing_mm, mode="bilinear")
    wanted = spacing(turned)
    grid = Grid(spacing_mm=spacing_mm, alignment="centres", back="probabilities")
    steps = Preprocessing("RAS", grid, "all", (Range(source=(0.0, 1.0)),))
    scan = preprocess(Volume([image], affine), steps)
    assert scan.image.shape == tuple(wanted.shape)
    np.testing.assert_allclose(scan.image, wanted.numpy(), atol=1e-5)
    outputs = noise((3, *scan.image.shape[1:]))
    back = spacing.inverse(MetaTensor(outputs).copy_meta_from(wanted))
    ours = np.concatenate(
        list(restored([outputs], scan, np.zeros(len(outputs), np.float32))), axis=1
    )
    np.testing.assert_allclose(ours, back.numpy(), atol=1e-5)


@given(shapes, spacings, spacings, orientations)
@example((4, 5, 6), (1.0, 1.0, 1.0), (2.0, 2.0, 2.0), "RAS")  # half a voxel rounds to even
@example((5, 5, 5), (1.0, 1.0, 1.0), (1.0005, 1.0, 1.0), "RAS")  # kept as it is
@settings(max_examples=40, deadline=None)
def test_resampling_is_that_of_spacing(
    shape: tuple[int, int, int],
    own: tuple[float, float, float],
    wanted: tuple[float, float, float],
    orientation: str,
) -> None:
    resampled(shape, affine_of(orientation, own), wanted)


@given(shapes, spacings, spacings, orientations, st.sampled_from([0.01, 3, 20]))
@settings(max_examples=40, deadline=None)
def test_resampling_of_oblique_scans_is_that_of_spacing(
    shape: tuple[int, int, int],
    own: tuple[float, float, float],
    wanted: tuple[float, float, float],
    orientation: str,
    degrees: float,
) -> None:
    resampled(shape, tilted(affine_of(orientation, own), degrees), wanted)


def test_first_centres_coincide_unless_the_axes_are_oblique() -> None:
    grid = Grid(spacing_mm=(2.0, 2.0, 2.0), alignment="centres")
    straight = grid.sampling((9, 9, 9), (1.0, 1.0, 1.0))
    assert (straight.target, straight.offset) == ((5, 5, 5), (0, 0, 0))
    # The stored columns of Y and Z are not quite at right angles; all axes are aligned otherwise.
    affine = tilted(affine_of("RAS", (1.0, 0.7, 0.9)), 25)
    oblique = grid.sampling((9, 9, 9), (1.0, 0.7, 0.9), affine)
    assert (oblique.target[0], oblique.scale[0]) == (5, 2)
    assert oblique.offset[0] == pytest.approx(9 / 2 - 2 * 5 / 2)


def test_an_oblique_scan_of_the_wanted_size_is_not_resampled() -> None:
    affine = tilted(affine_of("RAS", (1.0, 0.7, 0.9)), 25)
    grid = Grid(spacing_mm=(1.0005, 0.7, 0.9), alignment="centres")
    assert not grid.sampling((9, 9, 9), (1.0, 0.7, 0.9), affine).changes


def test_a_grid_of_centres_has_a_largest_size() -> None:
    grid = Grid(spacing_mm=(0.001,) * 3, alignment="centres")
    with pytest.raises(ConfigError, match="999001 x 999001 x 999001 voxels, more than"):
        grid.sampling((1000, 1000, 1000), (1.0, 1.0, 1.0))


SCHEMES: dict[str, tuple[Any, Any]] = {
    "nonzero": (ZScore("nonzero"), NormalizeIntensity(nonzero=True, channel_wise=True)),
    "all": (ZScore("all"), NormalizeIntensity(channel_wise=True)),
    "fixed": (Range(source=(3.0, 5.5)), NormalizeIntensity(subtrahend=3.0, divisor=2.5)),
    "range": (
        Range(source=(-57.0, 164.0), target=(-1.0, 2.0), clip=True),
        ScaleIntensityRange(-57, 164, -1, 2, clip=True),
    ),
    "extremes": (
        Range(percentiles=(0.0, 100.0), target=(-1.0, 1.0)),
        ScaleIntensity(-1.0, 1.0, channel_wise=True),
    ),
    "percentiles": (
        Range(percentiles=(1.0, 97.5), clip=True),
        ScaleIntensityRangePercentiles(1, 97.5, 0, 1, clip=True, channel_wise=True),
    ),
}


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize("name", SCHEMES)
def test_normalisation_is_that_of_monai(name: str, dtype: type) -> None:
    scheme, theirs = SCHEMES[name]
    rng = np.random.default_rng(0)
    image = (rng.standard_normal((2, 9, 8, 17)) * 120).astype(dtype)
    image[:, :3] = 0
    wanted = theirs(torch.tensor(image.astype(np.float32)))
    ours = np.stack(normalise(list(image), (scheme, scheme)))
    np.testing.assert_allclose(ours, np.asarray(wanted), atol=1e-4)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("target", [(0.0, 1.0), (-1.0, 2.0)])
def test_equal_percentiles_shift_only_as_in_monai(clip: bool, target: tuple[float, float]) -> None:
    image = np.full((1, 10, 10, 10), 5, np.int16)
    image[0, 0, 0, :3] = (7, -2, 300)  # 3 of 1000 voxels are beyond the percentiles
    scheme = Range(percentiles=(1.0, 99.0), target=target, clip=clip)
    theirs = ScaleIntensityRangePercentiles(1, 99, *target, clip=clip, channel_wise=True)
    with pytest.warns(Warning, match="Divide by zero"):
        wanted = np.asarray(theirs(torch.tensor(image.astype(np.float32))))
    assert wanted[0, 0, 0, :4].tolist() == [
        2 + target[0],
        -7 + target[0],
        295 + target[0],
        target[0],
    ]
    np.testing.assert_array_equal(np.stack(normalise(list(image), (scheme,))), wanted)
    counted = np.unique(image, return_counts=True)
    curve = scheme.curve(Histogram.of_counts(*counted, scheme.foreground))
    np.testing.assert_allclose(curve(image), wanted, rtol=1e-6)


def test_equal_percentiles_of_large_intensities_have_a_curve() -> None:
    counted = np.unique(np.full(4, 1e20), return_counts=True)
    curve = Range(percentiles=(1.0, 99.0)).curve(Histogram.of_counts(*counted, "all", varied=False))
    assert curve(np.array([1e20])).tolist() == [0]
