from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from attnseg.runtime.errors import ConfigError, VolumeError
from attnseg.runtime.normalise import (
    DECILES,
    Histogram,
    Landmarks,
    Normalisation,
    brain_box,
    normalise,
    z_score_percentiles,
)

LANDMARKS = Landmarks(DECILES, (tuple(np.linspace(-2, 3, len(DECILES)).tolist()),))


def random_channel(seed: int, dtype: str = "int16") -> np.ndarray:
    rng = np.random.default_rng(seed)
    channel = rng.gamma(4, 90, (9, 10, 37)).astype(dtype)
    channel[:3] = 0
    return channel


def test_the_z_score_of_three_voxels_by_hand() -> None:
    # Brain voxels 1, 2, 3: mean 2, standard deviation sqrt(2/3).
    channel = np.array([0, 1, 2, 3], np.int16).reshape(1, 2, 2)
    result = normalise([channel], Normalisation())
    expected = np.array([0, -(1.5**0.5), 0, 1.5**0.5]).reshape(1, 1, 2, 2)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_landmarks_map_percentiles_onto_targets_by_hand() -> None:
    # Values 1..101: percentile p is p + 1. Targets: 10 -> 0, 90 -> 4, so 1 + v maps to (v - 10)/20,
    # beyond the ends too.
    channel = np.arange(1, 102, dtype=np.int16).reshape(1, 1, 101)
    landmarks = Landmarks((10.0, 90.0), ((0.0, 4.0),))
    result = normalise([channel], Normalisation("all", landmarks))
    np.testing.assert_allclose(result.ravel(), (np.arange(101) - 10) / 20, atol=1e-6)


@pytest.mark.parametrize("dtype", ["int16", "uint8", "uint16", "int32"])
@pytest.mark.parametrize("landmarks", [None, LANDMARKS])
def test_the_table_and_the_float_path_agree(dtype: str, landmarks: Landmarks | None) -> None:
    channel = np.minimum(random_channel(0), 250).astype(dtype)
    by_table = normalise([channel], Normalisation("nonzero", landmarks))
    by_voxel = normalise([channel.astype(np.float64)], Normalisation("nonzero", landmarks))
    np.testing.assert_allclose(by_table, by_voxel, atol=1e-6)


@settings(max_examples=60)
@given(hnp.arrays(np.int16, (3, 4, 18), elements=st.integers(-300, 300)))
def test_table_and_float_path_agree_on_any_integers(channel: np.ndarray) -> None:
    try:
        by_table = normalise([channel], Normalisation("nonzero", LANDMARKS))
    except VolumeError:
        with pytest.raises(VolumeError):
            normalise([channel.astype(np.float32)], Normalisation("nonzero", LANDMARKS))
        return
    by_voxel = normalise([channel.astype(np.float32)], Normalisation("nonzero", LANDMARKS))
    np.testing.assert_allclose(by_table, by_voxel, atol=1e-4, rtol=1e-4)
    assert np.all(by_table[0][channel == 0] == 0)


def test_large_integers_take_no_large_table() -> None:
    channel = np.array([10**9, 10**9 + 1, 10**9 + 2], np.int32).reshape(1, 1, 3)
    result = normalise([channel], Normalisation()).ravel()
    np.testing.assert_allclose(result, [-(1.5**0.5), 0, 1.5**0.5], rtol=1e-6)
    spread = np.array([-(2**31), 0, 2**31 - 1], np.int32).reshape(1, 1, 3)
    assert np.isfinite(normalise([spread], Normalisation())).all()


@pytest.mark.parametrize("order", ["C", "F"])
def test_memory_order_and_threads_do_not_change_the_result(order: str) -> None:
    channels = [np.array(random_channel(seed), order=order) for seed in range(3)]
    expected = np.stack([normalise([c], Normalisation())[0] for c in channels])
    result = normalise(channels, Normalisation(), threads=2)
    np.testing.assert_array_equal(result, expected)
    assert result.flags.c_contiguous


@settings(max_examples=80)
@given(
    hnp.arrays(np.int16, st.integers(2, 60), elements=st.integers(-50, 50)),
    st.lists(st.floats(0, 100), min_size=1, max_size=5),
)
def test_histogram_statistics_are_numpys(values: np.ndarray, percent: list[float]) -> None:
    if len(np.unique(values)) < 2:
        values = np.append(values, [100, 101])
    histogram = Histogram.of(values.reshape(1, 1, -1), "all")
    assert histogram.mean == pytest.approx(values.mean(), abs=1e-9)
    assert histogram.std == pytest.approx(values.std(), abs=1e-9)
    np.testing.assert_allclose(
        histogram.percentiles(percent), np.percentile(values, percent), atol=1e-9
    )


def test_matching_to_its_own_landmarks_changes_nothing() -> None:
    channel = random_channel(1)
    own = z_score_percentiles(channel, "nonzero")
    matched = Normalisation("nonzero", Landmarks(DECILES, (tuple(own.tolist()),)))
    result = normalise([channel], matched)
    np.testing.assert_allclose(result, normalise([channel], Normalisation()), atol=1e-5)


def test_matching_takes_out_gain_and_offset() -> None:
    channel = random_channel(2, "float64")
    brain = channel != 0
    other = np.where(brain, 3.7 * channel + 55, 0)
    options = Normalisation("nonzero", LANDMARKS)
    np.testing.assert_allclose(
        normalise([channel], options), normalise([other], options), atol=1e-5
    )


def test_coarsely_quantised_images_keep_their_order() -> None:
    channel = np.array([0, 1, 1, 1, 1, 1, 1, 2, 2, 3], np.int16).reshape(1, 1, -1)
    result = normalise([channel], Normalisation("nonzero", LANDMARKS)).ravel()
    assert np.isfinite(result).all()
    assert result[1] < result[7] < result[9]


def test_channels_without_contrast_are_refused() -> None:
    with pytest.raises(VolumeError, match="channel 1 holds only zeros"):
        normalise([np.zeros((2, 2, 2), np.int16)], Normalisation())
    with pytest.raises(VolumeError, match="channel 1 holds no value but 7"):
        normalise([np.full((2, 2, 2), 7, np.int16)], Normalisation())


def test_landmarks_must_ascend_and_fit_the_channels() -> None:
    with pytest.raises(ConfigError, match="ascending"):
        Landmarks((1.0, 2.0), ((1.0, 1.0),))
    with pytest.raises(ConfigError, match="one value per percentile"):
        Landmarks((1.0, 2.0), ((1.0,),))
    with pytest.raises(ConfigError, match="for 1 channels, got 2"):
        normalise([random_channel(0)] * 2, Normalisation("nonzero", LANDMARKS))


@settings(max_examples=60)
@given(hnp.arrays(np.int16, (2, 4, 5, 6), elements=st.sampled_from([0, 0, 0, 0, 0, -3, 9])))
def test_the_brain_box_is_the_extent_of_the_voxels(channels: np.ndarray) -> None:
    where = np.argwhere(channels.any(axis=0))
    if len(where) == 0:
        with pytest.raises(VolumeError, match="all voxels of all channels are zero"):
            brain_box(channels)
        return
    box = brain_box(channels)
    assert [s.start for s in box] == where.min(axis=0).tolist()
    assert [s.stop for s in box] == (where.max(axis=0) + 1).tolist()


def test_the_box_of_all_is_the_volume() -> None:
    assert brain_box([np.zeros((2, 3, 4))], "all") == (slice(0, 2), slice(0, 3), slice(0, 4))
