from __future__ import annotations

import numpy as np
import pytest

from attnseg.runtime.steps.extremes import limit_extremes

VALUES = np.random.default_rng(0).integers(1, 1001, (40, 40, 40))
"""The 1st and 99th percentile are near 10 and 990, so that the limits are near -9790 and 10790."""


def test_usual_values_are_returned_as_they_are() -> None:
    channel = VALUES.astype(np.int16)
    channel[3, 4, 5] = 9000
    found, warnings = limit_extremes("t1", channel)
    assert found is channel
    assert warnings == ()


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("i4", 2_000_000_000), ("i4", -2_000_000_000), ("f4", 1e6), ("f8", 1e300), ("u2", 65535)],
)
def test_a_voxel_far_beyond_all_others_is_limited_with_a_warning(dtype: str, value: float) -> None:
    channel = VALUES.astype(dtype)
    channel[3, 4, 5] = value
    found, (warning,) = limit_extremes("t1 (a_t1.nii)", channel)
    assert found.dtype == channel.dtype
    assert abs(float(found[3, 4, 5])) == pytest.approx(10300, abs=700)
    rest = np.ones(found.shape, bool)
    rest[3, 4, 5] = False
    np.testing.assert_array_equal(found[rest], channel[rest])
    assert warning.startswith("t1 (a_t1.nii): 1 voxel lies far beyond all others, up to ")


def test_a_channel_of_two_values_is_returned_as_it_is() -> None:
    channel = np.zeros((20, 20, 20), np.int32)
    channel[5:15, 5:15, 5:15] = 1_000_000
    found, warnings = limit_extremes("mask", channel)
    assert found is channel
    assert warnings == ()
