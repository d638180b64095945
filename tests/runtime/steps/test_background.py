from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from attnseg.runtime.errors import VolumeError
from attnseg.runtime.steps.background import clean_background

SHAPE = (60, 64, 48)
NAMES = ("t1", "t1ce", "t2", "flair")
RNG = np.random.default_rng(0)
GRID = np.stack(np.meshgrid(*(np.arange(n) - n / 2 for n in SHAPE), indexing="ij"))
RADIUS = np.sqrt((GRID**2).sum(axis=0))
BRAIN = RADIUS < 16
BRAIN_ML = np.count_nonzero(BRAIN) / 1000


def brain(seed: int) -> NDArray[np.int16]:
    """A ball of tissue of 200 to 800 on a background of 0."""
    values = np.random.default_rng(seed).integers(200, 800, SHAPE)
    return np.where(BRAIN, values, 0).astype(np.int16)


CLEAN = [brain(seed) for seed in range(4)]


def clean(channels: list[NDArray], largest_ml: float = BRAIN_ML) -> tuple[list, tuple[str, ...]]:
    found = clean_background(channels, NAMES[: len(channels)], 1e-3, largest_ml)
    return found.channels, found.warnings


def test_a_clean_scan_is_returned_as_it_is() -> None:
    channels, warnings = clean(CLEAN)
    assert warnings == ()
    assert all(a is b for a, b in zip(channels, CLEAN, strict=True))


@pytest.mark.parametrize(
    "dust",
    [
        lambda c: np.where(c == 0, np.float32(1e-5), c),
        lambda c: np.where(c == 0, RNG.normal(0, 1e-5, SHAPE), c),
        lambda c: np.where(c == 0, RNG.integers(0, 2, SHAPE), c).astype(np.int16),
        lambda c: np.where((c == 0) & (RADIUS < 22), 1, c).astype(np.int16),  # a halo
        lambda c: np.where(c == 0, -1, c).astype(np.int16),
    ],
    ids=["constant", "normal", "0 and 1", "halo", "-1"],
)
@pytest.mark.parametrize("dusty", [(1, 2, 3), (0, 1, 2, 3), (2,)])
def test_dust_is_cut_to_0_with_a_warning_and_tissue_is_kept(
    dust: object, dusty: tuple[int, ...]
) -> None:
    given = [dust(c) if i in dusty else c for i, c in enumerate(CLEAN)]  # type: ignore[operator]
    channels, warnings = clean(given)
    for channel, expected in zip(channels, CLEAN, strict=True):
        np.testing.assert_array_equal(channel, expected)
    (warning,) = warnings
    names = ", ".join(NAMES[i] for i in dusty)
    assert warning.startswith(f"{names}: the background is not 0; ")


@pytest.mark.parametrize("index", range(4))
def test_noise_of_the_order_of_the_signal_is_refused_by_channel(index: int) -> None:
    noise = np.abs(RNG.normal(0, 30, SHAPE))
    given = [np.where(c == 0, noise, c) if i == index else c for i, c in enumerate(CLEAN)]
    with pytest.raises(
        VolumeError, match=f"^{NAMES[index]}: its background must be 0: .*; give the"
    ):
        clean(given)


@pytest.mark.parametrize("value", [-1024, 300])
def test_another_background_is_refused_with_its_value(value: int) -> None:
    given = [*CLEAN[:3], np.where(CLEAN[3] == 0, value, CLEAN[3])]
    with pytest.raises(VolumeError, match=f"^flair: its background is {value}, not 0"):
        clean(given)


def with_shell(gap: float, thickness: float) -> list[NDArray]:
    shell = (16 + gap < RADIUS) & (16 + gap + thickness > RADIUS)
    return [np.where(shell, 500, c).astype(np.int16) for c in CLEAN]


@pytest.mark.parametrize("gap", [2, 4])
def test_a_skull_on_a_background_of_0_is_refused(gap: float) -> None:
    with pytest.raises(VolumeError, match="a shell encloses the object, as the skull does"):
        clean(with_shell(gap, 3), largest_ml=1e6)


def test_a_skull_that_the_volume_cuts_off_is_refused() -> None:
    cut = [c[:, :, 16:] for c in with_shell(3, 3)]  # open below, as a head at the neck
    with pytest.raises(VolumeError, match="a shell encloses the object, as the skull does"):
        clean(cut, largest_ml=1e6)


def test_a_cavity_in_the_brain_is_no_shell() -> None:
    given = [np.where(RADIUS < 9, 0, c) for c in CLEAN]
    assert clean(given)[1] == ()


def test_a_foreground_larger_than_in_training_is_warned_of_or_refused() -> None:
    # Without a gap: a ball of radius 16 + t has (1 + t / 16) ** 3 times the volume.
    (warning,) = clean(with_shell(0, 2))[1]  # 1.42 times
    assert "such as skull or noise, may be left" in warning
    with pytest.raises(VolumeError, match="it holds more than the object, such as the skull"):
        clean(with_shell(0, 5))  # 2.26 times


def test_a_channel_that_lies_elsewhere_is_warned_of_or_refused_by_name() -> None:
    warnings = clean([*CLEAN[:3], np.roll(CLEAN[3], 6, axis=0)])[1]
    assert len(warnings) == 2
    assert all(w.startswith("flair: ") for w in warnings)
    with pytest.raises(VolumeError, match=r"^flair: .* most channels"):
        clean([*CLEAN[:3], np.roll(CLEAN[3], 25, axis=0)], largest_ml=1e6)


def test_a_brain_that_the_volume_cuts_off_is_taken() -> None:
    cut = [c[14:46, 16:48, 20:28] for c in CLEAN]  # a slab whose brain touches every face
    assert clean(cut)[1] == ()


def test_real_interpolation_leaves_dust_that_is_cut() -> None:
    given = [ndimage.shift(c.astype(np.float32), (0.3, 0, 0), order=3) for c in CLEAN]
    channels, warnings = clean(given)
    assert "the background is not 0" in warnings[0]
    far = RADIUS > 24
    assert all(np.count_nonzero(g[far]) > 1000 for g in given)
    assert not any(c[far].any() for c in channels)
