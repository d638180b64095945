from __future__ import annotations

import numpy as np
import pytest

from attnseg.runtime.steps.extremes import replace_extremes

VALUES = np.random.default_rng(0).integers(1, 1001, (40, 40, 40))
"""The 1st and 99th percentile are near 10 and 990; the limits are near -9790 and 10790."""


def test_usual_values_are_returned_as_they_are() -> None:
    channel = VALUES.astype(np.int16)
    channel[3, 4, 5] = 9000
    (found,), warnings = replace_extremes([channel], ["t1"])
    assert found is channel
    assert warnings == ()


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        ("i4", 2_000_000_000, 990),
        ("i4", -2_000_000_000, 10),
        ("f4", 1e6, 990),
        ("f8", 1e300, 990),
        ("u2", 65535, 990),
    ],
)
def test_a_voxel_far_beyond_all_others_becomes_a_percentile_with_a_warning(
    dtype: str, value: float, expected: float
) -> None:
    channel, other = VALUES.astype(dtype), VALUES.astype(dtype)[::-1]
    channel[3, 4, 5] = value
    (found, same), (warning,) = replace_extremes([channel, other], ["t1 (a_t1.nii)", "t2"])
    assert same is other
    assert found.dtype == channel.dtype
    assert float(found[3, 4, 5]) == pytest.approx(expected, abs=10)
    rest = np.ones(found.shape, bool)
    rest[3, 4, 5] = False
    np.testing.assert_array_equal(found[rest], channel[rest])
    assert warning.startswith("t1 (a_t1.nii): 1 voxel lies far beyond all others, up to ")
    assert "the first at (3, 4, 5)" in warning


def test_a_voxel_far_beyond_all_others_may_be_kept_with_a_warning() -> None:
    channel = VALUES.astype(np.int32)
    channel[3, 4, 5] = 2_000_000_000
    (found,), (warning,) = replace_extremes([channel], ["t1"], replace=False)
    assert found is channel
    assert "up to 2e+09" in warning and "kept" in warning


def test_a_voxel_in_the_background_of_the_other_channels_becomes_0() -> None:
    channel, other = VALUES.astype(np.int32), VALUES.astype(np.int32)
    channel[:5] = other[:5] = 0
    channel[2, 2, 2] = 2_000_000_000
    (found, _), warnings = replace_extremes([channel, other], ["t1", "t2"])
    assert not found[:5].any()
    assert len(warnings) == 1


def test_a_channel_of_two_values_is_returned_as_it_is() -> None:
    channel = np.zeros((20, 20, 20), np.int32)
    channel[5:15, 5:15, 5:15] = 1_000_000
    (found,), warnings = replace_extremes([channel], ["mask"])
    assert found is channel
    assert warnings == ()


def test_half_precision_voxels_are_looked_at_in_single_precision() -> None:
    channel = (VALUES * 30).astype(np.float16)  # up to 3e4; sums of its percentiles overflow
    (found,), warnings = replace_extremes([channel], ["t1"])
    assert found is channel
    assert warnings == ()
