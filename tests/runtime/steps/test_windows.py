from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data.utils import compute_importance_map, dense_patch_slices

from attnseg.runtime.errors import ConfigError, VolumeError
from attnseg.runtime.steps.windows import WindowOptions, importance_map, plan_windows

sizes = st.tuples(*[st.integers(1, 150)] * 3)
edges = st.tuples(*[st.integers(12, 96)] * 3)


@given(sizes, edges, st.sampled_from([0.0, 0.25, 0.5, 0.75]))
def test_windows_cover_every_voxel_and_stay_inside(
    shape: tuple[int, ...], window: tuple[int, ...], overlap: float
) -> None:
    plan = plan_windows(shape, window, overlap)
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
