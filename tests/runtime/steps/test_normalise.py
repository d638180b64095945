from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from attnseg.runtime.errors import ConfigError, VolumeError
from attnseg.runtime.geometry import Box
from attnseg.runtime.steps.foreground import foreground_box
from attnseg.runtime.steps.histogram import Histogram
from attnseg.runtime.steps.normalise import DECILES, normalise, z_score_percentiles
from attnseg.runtime.steps.schemes import (
    ClipZScore,
    LandmarkMatching,
    Range,
    Scheme,
    SingleZScore,
    Unchanged,
    ZScore,
)

LANDMARKS = LandmarkMatching(DECILES, tuple(np.linspace(-2, 3, len(DECILES)).tolist()))
Z_SCORE = ZScore()


def random_channel(seed: int, dtype: str = "int16") -> np.ndarray:
    rng = np.random.default_rng(seed)
    channel = rng.gamma(4, 90, (9, 10, 37)).astype(dtype)
    channel[:3] = 0
    return channel


def test_the_z_score_of_three_voxels_by_hand() -> None:
    # Brain voxels 1, 2, 3: mean 2, standard deviation sqrt(2/3).
    channel = np.array([0, 1, 2, 3], np.int16).reshape(1, 2, 2)
    result = normalise([channel], [Z_SCORE])
    expected = np.array([0, -(1.5**0.5), 0, 1.5**0.5]).reshape(1, 1, 2, 2)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", [np.int16, np.float32])
@pytest.mark.parametrize(
    "scheme", [ZScore("filled"), SingleZScore("filled")], ids=["double", "single"]
)
def test_the_z_score_of_a_filled_region_by_hand(scheme: Scheme, kind: type) -> None:
    """Both channels are 0 in a hole, which is a part of the region all the same."""
    second = np.zeros((5, 5, 5), kind)
    second[1:4, 1:4, 1:4] = 4
    second[2, 2, 2] = 0
    first = np.where(second > 0, 9, 0).astype(kind)
    # 27 voxels: 26 of 9 and one of 0: mean 26/3, deviation 9 sqrt(26) / 27 = sqrt(26) / 3.
    result = normalise([first, second], [scheme] * 2)
    outside = np.ones((5, 5, 5), bool)
    outside[1:4, 1:4, 1:4] = False
    assert not result[:, outside].any()
    np.testing.assert_allclose(result[0, 2, 2, 2], -(26**0.5), rtol=2e-6)
    np.testing.assert_allclose(result[:, 1, 1, 1], 1 / 26**0.5, rtol=2e-6)


HOUNSFIELD = np.array([-2000, -1000, 0, 40, 1000, 3000], np.int16).reshape(1, 2, 3)


@pytest.mark.parametrize("kind", [np.int16, np.float64])
@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (ClipZScore(-1000, 1000, 0, 500), [-2, -2, 0, 0.08, 2, 2]),
        (Range((-1000, 1000)), [-0.5, 0, 0.5, 0.52, 1, 2]),
        (Range((-1000, 1000), clip=True), [0, 0, 0.5, 0.52, 1, 1]),
        (Range((-1000, 1000), target=(-1, 1), clip=True), [-1, -1, 0, 0.04, 1, 1]),
        # Ranks 1 and 4 of 0 to 5 are -1000 and 1000.
        (Range(None, (20, 80)), [-0.5, 0, 0.5, 0.52, 1, 2]),
        (Unchanged(), [-2000, -1000, 0, 40, 1000, 3000]),
    ],
    ids=str,
)
def test_schemes_of_ct_by_hand(scheme: Scheme, expected: list[float], kind: type) -> None:
    channel = HOUNSFIELD.astype(kind)
    result = normalise([channel], [scheme])
    np.testing.assert_allclose(result.ravel(), expected, rtol=1e-6, atol=1e-6)
    curve = scheme.curve(Histogram.of(channel, "all"))
    np.testing.assert_allclose(curve(channel).ravel(), expected, rtol=1e-6, atol=1e-6)


def test_a_range_may_be_given_a_mean_and_a_deviation_by_hand() -> None:
    # Clipped to 0, 0, 1 and 1: mean 0.5 and deviation 0.5, which become 10 and 2.
    channel = np.array([-2000, -1000, 1000, 3000], np.int16).reshape(1, 1, 4)
    scheme = Range((-1000, 1000), clip=True, moments=(10, 2))
    np.testing.assert_allclose(normalise([channel], [scheme]).ravel(), [8, 8, 12, 12], rtol=1e-6)


@pytest.mark.parametrize(
    "scheme", [ClipZScore(-1000, 1000, 0, 500), Range((0, 10)), Unchanged()], ids=str
)
def test_fixed_numbers_need_no_contrast(scheme: Scheme) -> None:
    """A scan of air alone is no reason to stop: the statistics are those of the training set."""
    for value in (0, 5):
        found = normalise([np.full((2, 2, 2), value, np.int16)], [scheme])
        assert np.isfinite(found).all()


def test_landmarks_map_percentiles_onto_targets_by_hand() -> None:
    # Values 1..101: percentile p is p + 1. Targets: 10 -> 0, 90 -> 4, so 1 + v maps to (v - 10)/20,
    # beyond the ends too.
    channel = np.arange(1, 102, dtype=np.int16).reshape(1, 1, 101)
    scheme = LandmarkMatching((10.0, 90.0), (0.0, 4.0), "all")
    result = normalise([channel], [scheme])
    np.testing.assert_allclose(result.ravel(), (np.arange(101) - 10) / 20, atol=1e-6)


@pytest.mark.parametrize("dtype", ["int16", "uint8", "uint16", "int32"])
@pytest.mark.parametrize("scheme", [Z_SCORE, LANDMARKS])
def test_the_table_and_the_float_path_agree(dtype: str, scheme: Scheme) -> None:
    channel = np.minimum(random_channel(0), 250).astype(dtype)
    by_table = normalise([channel], [scheme])
    by_voxel = normalise([channel.astype(np.float64)], [scheme])
    np.testing.assert_allclose(by_table, by_voxel, atol=1e-6)


@settings(max_examples=60)
@given(hnp.arrays(np.int16, (3, 4, 18), elements=st.integers(-300, 300)))
def test_table_and_float_path_agree_on_any_integers(channel: np.ndarray) -> None:
    try:
        by_table = normalise([channel], [LANDMARKS])
    except VolumeError:
        with pytest.raises(VolumeError):
            normalise([channel.astype(np.float32)], [LANDMARKS])
        return
    by_voxel = normalise([channel.astype(np.float32)], [LANDMARKS])
    np.testing.assert_allclose(by_table, by_voxel, atol=1e-4, rtol=1e-4)
    assert np.all(by_table[0][channel == 0] == 0)


def test_large_integers_take_no_large_table() -> None:
    channel = np.array([10**9, 10**9 + 1, 10**9 + 2], np.int32).reshape(1, 1, 3)
    result = normalise([channel], [Z_SCORE]).ravel()
    np.testing.assert_allclose(result, [-(1.5**0.5), 0, 1.5**0.5], rtol=1e-6)
    spread = np.array([-(2**31), 0, 2**31 - 1], np.int32).reshape(1, 1, 3)
    assert np.isfinite(normalise([spread], [Z_SCORE])).all()


@pytest.mark.parametrize("order", ["C", "F"])
def test_memory_order_and_threads_do_not_change_the_result(order: str) -> None:
    channels = [np.array(random_channel(seed), order=order) for seed in range(3)]
    expected = np.stack([normalise([c], [Z_SCORE])[0] for c in channels])
    result = normalise(channels, [Z_SCORE] * 3, threads=2)
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
    (own,) = z_score_percentiles([channel], "nonzero")
    matched = LandmarkMatching(DECILES, tuple(own.tolist()))
    result = normalise([channel], [matched])
    np.testing.assert_allclose(result, normalise([channel], [Z_SCORE]), atol=1e-5)


def test_matching_takes_out_gain_and_offset() -> None:
    channel = random_channel(2, "float64")
    brain = channel != 0
    other = np.where(brain, 3.7 * channel + 55, 0)
    options = [LANDMARKS]
    np.testing.assert_allclose(
        normalise([channel], options), normalise([other], options), atol=1e-5
    )


def test_coarsely_quantised_images_keep_their_order() -> None:
    channel = np.array([0, 1, 1, 1, 1, 1, 1, 2, 2, 3], np.int16).reshape(1, 1, -1)
    result = normalise([channel], [LANDMARKS]).ravel()
    assert np.isfinite(result).all()
    assert result[1] < result[7] < result[9]


def test_channels_without_contrast_are_refused() -> None:
    with pytest.raises(VolumeError, match="channel 1 holds only zeros"):
        normalise([np.zeros((2, 2, 2), np.int16)], [Z_SCORE])
    with pytest.raises(VolumeError, match=r"channel 1 is constant \(7\); check"):
        normalise([np.full((2, 2, 2), 7, np.int16)], [Z_SCORE])


def test_landmarks_must_ascend_and_fit_the_channels() -> None:
    with pytest.raises(ConfigError, match="ascending"):
        LandmarkMatching((1.0, 2.0), (1.0, 1.0))
    with pytest.raises(ConfigError, match="one value per percentile"):
        LandmarkMatching((1.0, 2.0), (1.0,))
    with pytest.raises(ConfigError, match="for 1 channels, got 2"):
        normalise([random_channel(0)] * 2, [LANDMARKS])


@settings(max_examples=60)
@given(hnp.arrays(np.int16, (2, 4, 5, 6), elements=st.sampled_from([0, 0, 0, 0, 0, -3, 9])))
def test_the_brain_box_is_the_extent_of_the_voxels(channels: np.ndarray) -> None:
    where = np.argwhere(channels.any(axis=0))
    if len(where) == 0:
        with pytest.raises(VolumeError, match="all voxels of all channels are zero"):
            foreground_box(channels)
        return
    box = foreground_box(channels)
    assert list(box.start) == where.min(axis=0).tolist()
    assert list(box.stop) == (where.max(axis=0) + 1).tolist()


def test_the_box_of_all_is_the_volume() -> None:
    assert foreground_box([np.zeros((2, 3, 4))], "all") == Box((0, 0, 0), (2, 3, 4))


def test_landmarks_that_are_no_z_scores_are_refused() -> None:
    with pytest.raises(ConfigError, match="landmarks are z-scores, at most 10000, got"):
        LandmarkMatching((0, 100), (-1e38, 1.0))


def test_percentiles_that_differ_by_rounding_count_as_equal() -> None:
    intensities = np.array([1.0, 1.0 + 1e-15, 2.0, 3.0])
    curve = LandmarkMatching((0, 100 / 3, 200 / 3, 100), (-2.0, 0.0, 1.0, 3.0)).curve(
        Histogram(intensities, np.ones(4, np.int64))
    )
    np.testing.assert_array_equal(curve.source, [1, 2, 3])
    np.testing.assert_array_equal(curve.target, [-1, 1, 3])  # the mean of -2 and 0


@pytest.mark.parametrize("scheme", [ZScore, SingleZScore])
@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_a_z_score_is_that_of_its_region_by_hand(scheme: type[ZScore], dtype: str) -> None:
    """A shell of 13 voxels of 1 and 13 of 3 around a hole, in a background of 0."""
    channel = np.zeros((5, 5, 5), dtype)
    channel[1:4, 1:4, 1:4] = np.where(np.indices((3, 3, 3)).sum(axis=0) % 2, 1, 3)
    channel[1, 1, 1] = 1  # 13 of each
    channel[2, 2, 2] = 0
    expected = {
        "nonzero": (channel - 2.0) * (channel != 0),
        "all": (channel - 52 / 125) / np.sqrt(130 / 125 - (52 / 125) ** 2),
        "filled": np.zeros(channel.shape),
    }
    mean, std = 52 / 27, np.sqrt(130 / 27 - (52 / 27) ** 2)  # the hole counts
    expected["filled"][1:4, 1:4, 1:4] = (channel[1:4, 1:4, 1:4] - mean) / std
    for region, values in expected.items():
        result = normalise([channel], [scheme(region)])[0]  # type: ignore[arg-type]
        np.testing.assert_allclose(result, values, atol=1e-6)


def test_curves_of_constant_foregrounds_map_their_value_to_the_first_target() -> None:
    """As the functions of nnU-Net and MONAI do, which divide by at least 1e-8."""
    for value in (0.0, 7.0, -3e9):
        found = Histogram.of_counts(np.array([value]), np.array([5]), "all", varied=False)
        schemes = (SingleZScore("all"), Range(percentiles=(1, 99), target=(0, 2)))
        for curve in (scheme.curve(found) for scheme in schemes):
            assert curve(np.array([value])) == 0
