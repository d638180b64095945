from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data.utils import compute_importance_map, dense_patch_slices

from attnseg.runtime.errors import ConfigError, VolumeError
from attnseg.runtime.steps.windows import (
    Blending,
    Placement,
    Weights,
    WindowOptions,
    importance_map,
    plan_windows,
)

sizes = st.tuples(*[st.integers(1, 150)] * 3)
edges = st.tuples(*[st.integers(12, 96)] * 3)


@given(sizes, edges, st.sampled_from([0.0, 0.25, 0.5, 0.75]), st.sampled_from(["stride", "even"]))
def test_windows_cover_every_voxel_and_stay_inside(
    shape: tuple[int, ...], window: tuple[int, ...], overlap: float, placement: Placement
) -> None:
    plan = plan_windows(shape, window, overlap, placement)
    for axis in range(3):
        covered = np.zeros(plan.padded_shape[axis], bool)
        for place in {(w.start[axis], w.stop[axis]) for w in plan.windows}:
            assert place[1] - place[0] == window[axis]
            assert 0 <= place[0] <= place[1] <= plan.padded_shape[axis]
            covered[slice(*place)] = True
        assert covered.all()


@given(sizes, st.sampled_from([0.0, 0.25, 0.5]))
def test_positions_are_monais(shape: tuple[int, ...], overlap: float) -> None:
    window = (64, 64, 64)
    plan = plan_windows(shape, window, overlap)
    stride = tuple(
        int(w) if p == w else int(w * (1 - overlap))
        for p, w in zip(plan.padded_shape, window, strict=True)
    )
    expected = dense_patch_slices(plan.padded_shape, window, stride)
    assert [w.slices() for w in plan.windows] == list(expected)


def test_the_counts_of_the_design() -> None:
    assert len(plan_windows((240, 240, 155), (64,) * 3).windows) == 75
    assert len(plan_windows((140, 175, 140), (64,) * 3).windows) == 36
    assert len(plan_windows((192, 192, 128), (64,) * 3).windows) == 48


@pytest.mark.parametrize(
    ("size", "window", "overlap", "stride", "even"),
    [
        (10, 4, 0.5, [0, 2, 4, 6], [0, 2, 4, 6]),
        (11, 4, 0.5, [0, 2, 4, 6, 7], [0, 2, 4, 5, 7]),  # even: 1.75, 3.5 and 5.25
        (9, 4, 0.25, [0, 3, 5], [0, 2, 5]),  # even: 2.5, which is rounded to an even number
        (13, 4, 0.25, [0, 3, 6, 9], [0, 3, 6, 9]),
        (240, 128, 0.5, [0, 64, 112], [0, 56, 112]),
        (155, 128, 0.5, [0, 27], [0, 27]),
        (10, 5, 0.1, [0, 4, 5], [0, 2, 5]),  # a stride of 4.5 is rounded down, or kept
        (8, 4, 0.0, [0, 4], [0, 4]),
        (4, 4, 0.5, [0], [0]),
        (3, 4, 0.5, [0], [0]),
    ],
)
def test_starts_of_windows_by_hand(
    size: int, window: int, overlap: float, stride: list[int], even: list[int]
) -> None:
    def starts(placement: Placement) -> list[int]:
        plan = plan_windows((1, size, 1), (1, window, 1), overlap, placement)
        return [box.start[1] for box in plan.windows]

    assert starts("stride") == stride
    assert starts("even") == even


def test_options_place_and_blend_windows_as_they_say() -> None:
    blending = Blending("constant", (0, 2), "half", "run")
    plan = WindowOptions((4, 4, 4), 0.25, 1, "even", blending).plan((9, 4, 4))
    assert [box.start for box in plan.windows] == [(0, 0, 0), (2, 0, 0), (5, 0, 0)]
    assert plan.blending == blending
    assert WindowOptions((4, 4, 4)).plan((9, 4, 4)).blending == Blending()


@pytest.mark.parametrize(
    ("axes", "mirrors"),
    [
        ((), [()]),
        ((2,), [(), (2,)]),
        ((0, 2), [(), (0,), (2,), (0, 2)]),
        ((0, 1, 2), [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]),
    ],
)
def test_mirrors_are_all_combinations_of_the_axes(
    axes: tuple[int, ...], mirrors: list[tuple[int, ...]]
) -> None:
    assert list(Blending(mirror_axes=axes).mirrors) == mirrors


def test_small_volumes_are_padded_on_both_sides() -> None:
    plan = plan_windows((61, 64, 10), (64, 64, 64))
    assert plan.padded_shape == (64, 64, 64)
    assert plan.pad_before == (1, 0, 27)
    assert plan.inner == (slice(1, 62), slice(0, 64), slice(27, 37))


@pytest.mark.parametrize("window", [(64, 64, 64), (16, 32, 48), (5, 6, 7), (1, 1, 1)])
def test_the_importance_map_is_monais(window: tuple[int, ...]) -> None:
    expected = compute_importance_map(window, mode="gaussian", sigma_scale=0.125)
    assert isinstance(expected, torch.Tensor)
    np.testing.assert_allclose(importance_map(window), expected.numpy(), rtol=1e-5)


def test_constant_weights_are_1() -> None:
    weights = importance_map((2, 3, 4), "constant")
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights, np.ones((2, 3, 4)))


def test_the_map_of_nnunet_by_hand() -> None:
    """The deviation is 8 / 8 = 1 voxel, and the centre is voxel 8 // 2 = 4."""
    weights = importance_map((8, 1, 1), "gaussian-nnunet")
    assert weights.dtype == np.float32
    distance = np.array([4, 3, 2, 1, 0, 1, 2, 3])
    expected = (10 * np.exp(-(distance**2) / 2)).astype(np.float16)
    np.testing.assert_array_equal(weights.ravel(), expected)
    assert weights.ravel()[[3, 4, 5]].tolist() == [6.06640625, 10, 6.06640625]
    assert importance_map((1, 1, 1), "gaussian-nnunet").item() == 10
    assert importance_map((3, 1, 1), "gaussian-nnunet").argmax() == 1


def test_weights_of_nnunet_that_are_0_in_fp16_are_raised_to_the_least() -> None:
    # At distances 4, 4 and 2 the weight is 10 exp(-18) = 1.523e-7, 3 of the least steps of fp16
    # (2 ** -24); at 4, 4 and 3 it is 10 exp(-20.5) = 1.25e-8, less than half a step.
    weights = importance_map((8, 8, 8), "gaussian-nnunet")
    assert weights[0, 0, 2] == weights[0, 0, 1] == weights[0, 0, 0] == weights.min() == 3 * 2**-24
    assert weights[4, 4, 4] == weights.max() == 10


@pytest.mark.parametrize("weights", ["gaussian", "gaussian-nnunet", "constant"])
@given(window=st.tuples(*[st.integers(1, 20)] * 3))
def test_every_voxel_of_a_window_counts(weights: Weights, window: tuple[int, int, int]) -> None:
    found = importance_map(window, weights)
    assert (found.shape, found.dtype) == (window, np.float32)
    assert np.isfinite(found).all() and (found > 0).all()


@pytest.mark.parametrize("overlap", [-0.1, 1.0, 2.0])
def test_overlap_out_of_range_is_refused(overlap: float) -> None:
    with pytest.raises(ConfigError, match=f"overlap must be .* got {overlap}"):
        plan_windows((64, 64, 64), (64, 64, 64), overlap)


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="window must be at least 1 voxel"):
        plan_windows((64, 64, 64), (64, 0, 64))


def test_windows_that_would_pad_an_image_to_many_times_its_size_are_refused() -> None:
    options = WindowOptions((64, 64, 64), 0.25, 16)
    with pytest.raises(VolumeError, match="32767 x 5 x 5 voxels would be padded to 134213632"):
        options.plan((32767, 5, 5))
    assert options.plan((512, 512, 5)).padded_shape == (512, 512, 64)  # 13 times as many
    assert options.plan((6, 6, 6)).padded_shape == (64, 64, 64)  # of no size


def test_an_overlap_that_needs_too_many_windows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"overlap 0\.99 needs 5545233 windows, more than 100000"):
        plan_windows((240, 240, 240), (64, 64, 64), 0.99)
