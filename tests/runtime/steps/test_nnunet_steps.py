"""Steps of the runtime against nnU-Net's own functions, bit by bit. Arrays are (z, y, x)."""

from __future__ import annotations

import os
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

for _name in ("raw", "preprocessed", "results"):
    os.environ.setdefault(f"nnUNet_{_name}", os.curdir)

from nnunetv2.inference.sliding_window_prediction import (  # noqa: E402
    compute_gaussian,
    compute_steps_for_sliding_window,
)
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero  # noqa: E402
from nnunetv2.preprocessing.normalization import (  # noqa: E402
    default_normalization_schemes as theirs,
)
from nnunetv2.preprocessing.resampling.default_resampling import (  # noqa: E402
    compute_new_shape,
    resample_data_or_seg_to_shape,
)

from attnseg.runtime.geometry import Box  # noqa: E402
from attnseg.runtime.steps.foreground import filled_foreground, foreground_box  # noqa: E402
from attnseg.runtime.steps.normalise import (  # noqa: E402
    normalise,
)
from attnseg.runtime.steps.preprocess import Preprocessed  # noqa: E402
from attnseg.runtime.steps.resample import Grid, resample_image  # noqa: E402
from attnseg.runtime.steps.restore import restored  # noqa: E402
from attnseg.runtime.steps.schemes import (  # noqa: E402
    ClipZScore,
    Range,
    Scheme,
    SingleZScore,
    Unchanged,
)
from attnseg.runtime.steps.windows import importance_map, plan_windows  # noqa: E402

shapes = st.tuples(*(st.integers(2, 24),) * 3)
# Isotropic, and with one thick axis in any place, so that an axis is resampled apart.
spacings = st.one_of(
    st.tuples(*(st.floats(0.6, 1.9),) * 3),
    st.tuples(st.floats(3.0, 6.0), st.floats(0.5, 0.9), st.floats(0.5, 0.9)).flatmap(
        st.permutations
    ),
)


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 300).astype(np.float32)


@settings(max_examples=200, deadline=None)
@given(shape=shapes, current=spacings, wanted=spacings, order=st.sampled_from([1, 3]))
def test_images_are_resampled_as_by_nnunet(
    shape: tuple[int, int, int],
    current: tuple[float, ...],
    wanted: tuple[float, ...],
    order: Literal[1, 3],
) -> None:
    grid = Grid(spacing_mm=tuple(wanted), order=order, separate_above=3.0)
    sampling = grid.sampling(shape, current)
    target = compute_new_shape(shape, current, wanted)
    if min(target) < 1:
        return  # nnU-Net fails, and here there is at least one voxel
    assert sampling.target == tuple(target)
    image = noise(shape)
    expected = resample_data_or_seg_to_shape(
        image[None].copy(), target, current, wanted, order=order, order_z=0, force_separate_z=None
    )
    np.testing.assert_array_equal(resample_image(image, sampling, grid), expected[0])


def logits_resampled_back(
    shape: tuple[int, int, int], current: tuple[float, ...], wanted: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a grid on a scan of `shape`: by the runtime in float32, by nnU-Net in float16."""
    grid = Grid(spacing_mm=tuple(wanted), order=3, separate_above=3.0)
    sampling = grid.sampling(shape, current)
    logits = (noise((3, *sampling.target)) / 30).astype(np.float16)
    expected = resample_data_or_seg_to_shape(
        logits, shape, wanted, current, order=1, order_z=0, force_separate_z=None
    )
    scan = Preprocessed(
        image=logits.astype(np.float32),
        box=Box.whole(shape),
        box_on_grid=False,
        grid_shape=sampling.target,
        shape=shape,
        sampling=sampling,
        back="logits",
    )
    parts = np.array_split(scan.image, min(3, len(scan.image[0])), axis=1)
    return np.concatenate(list(restored(parts, scan, np.empty(0), half=True)), axis=1), expected


@settings(max_examples=150, deadline=None)
@given(shape=shapes, current=spacings, wanted=spacings)
def test_logits_are_resampled_back_as_by_nnunet(
    shape: tuple[int, int, int], current: tuple[float, ...], wanted: tuple[float, ...]
) -> None:
    # nnU-Net stores logits in float16. Sums in another order differ by 1e-16, which matters only
    # for values half way between two of float16, such as means of two neighbours.
    found, expected = logits_resampled_back(shape, current, wanted)
    step = np.spacing(np.abs(expected)).astype(np.float32)
    assert (np.abs(found - expected.astype(np.float32)) <= step).all()


@pytest.mark.parametrize("current", [(1.13, 0.87, 1.31), (4.7, 0.71, 0.71)])
def test_logits_resampled_back_hardly_ever_round_otherwise(current: tuple[float, ...]) -> None:
    found, expected = logits_resampled_back((24, 30, 20), current, (1.0, 1.0, 1.0))
    assert found.size == 3 * 24 * 30 * 20
    assert np.count_nonzero(found != expected) < 1e-3 * found.size


@settings(max_examples=300, deadline=None)
@given(size=st.integers(16, 500), window=st.integers(16, 192))
def test_windows_start_where_nnunets_do(size: int, window: int) -> None:
    padded = max(size, window)
    plan = plan_windows((padded, window, window), (window,) * 3, 0.5, "even")
    (expected, _, _) = compute_steps_for_sliding_window(
        (padded, window, window), (window,) * 3, 0.5
    )
    assert [box.start[0] for box in plan.windows] == expected


@pytest.mark.parametrize("window", [(16, 24, 32), (28, 160, 160), (96, 128, 96), (7, 33, 65)])
def test_the_weights_of_a_window_are_nnunets(window: tuple[int, int, int]) -> None:
    expected = compute_gaussian(window, 1 / 8, 10, device=torch.device("cpu")).numpy()
    np.testing.assert_array_equal(importance_map(window, "gaussian-nnunet"), expected)


def scan(seed: int, hole: bool = True) -> np.ndarray:
    """Two channels of different extents, with zeros inside, in `(C, Z, Y, X)`."""
    rng = np.random.default_rng(seed)
    image = np.zeros((2, 14, 17, 19), np.int16)
    low, high = rng.integers(1, 4, 3), rng.integers(10, 13, 3)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    image[0][box] = rng.integers(1, 900, image[0][box].shape)
    shifted = tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))
    image[1][shifted] = rng.integers(1, 500, image[1][shifted].shape)
    if hole:
        image[:, 6:8, 6:8, 6:8] = 0
    return image


@pytest.mark.parametrize("seed", range(5))
def test_the_crop_and_the_mask_are_nnunets(seed: int) -> None:
    image = scan(seed)
    _, mask, box = crop_to_nonzero(image.copy())
    found = foreground_box(image)
    assert [[s.start, s.stop] for s in found.slices()] == [list(along) for along in box]
    cropped = image[(slice(None), *found.slices())]
    np.testing.assert_array_equal(filled_foreground(cropped), mask[0] >= 0)
    assert ndimage.binary_fill_holes(cropped[0] != 0).sum() > np.count_nonzero(cropped[0])


PROPERTIES = {"mean": 99.4, "std": 39.4, "percentile_00_5": -15.0, "percentile_99_5": 197.0}
SCHEMES: dict[str, tuple[Scheme, type, bool]] = {
    "z-score over the mask": (SingleZScore("filled"), theirs.ZScoreNormalization, True),
    "z-score over the crop": (SingleZScore("all"), theirs.ZScoreNormalization, False),
    "CT": (ClipZScore(-15.0, 197.0, 99.4, 39.4), theirs.CTNormalization, False),
    "none": (Unchanged(), theirs.NoNormalization, False),
    "0 to 1": (Range(percentiles=(0.0, 100.0)), theirs.RescaleTo01Normalization, False),
}


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize("name", SCHEMES)
def test_normalisation_is_nnunets(name: str, dtype: type) -> None:
    scheme, kind, masked = SCHEMES[name]
    for seed in range(4):
        image, mask, _ = crop_to_nonzero(scan(seed).astype(dtype))
        found = normalise(list(image), (scheme, scheme))
        for channel, own in zip(image, found, strict=True):
            normaliser = kind(masked, PROPERTIES)
            expected = normaliser.run(channel.astype(np.float32), mask[0])
            np.testing.assert_array_equal(own, expected)


@pytest.mark.parametrize("values", [[5, 5], [0, 0], [0, 1e-9], [0, 1e-7]])
def test_a_range_that_is_nearly_constant_is_scaled_as_in_nnunet(values: list[float]) -> None:
    image = np.array(values, np.float32).reshape(1, 2, 1, 1)
    (found,) = normalise(list(image), (Range(percentiles=(0.0, 100.0)),))
    expected = theirs.RescaleTo01Normalization(False, PROPERTIES).run(image[0].copy(), None)
    np.testing.assert_array_equal(found, expected)
