from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from attnseg import Volume
from attnseg.runtime.errors import VolumeError
from attnseg.runtime.steps.check import InputRules, check_input
from attnseg.runtime.steps.preprocess import Preprocessing
from attnseg.runtime.steps.schemes import ClipZScore, Range, Scheme, ZScore
from attnseg.runtime.task import BRATS_CHANNELS, Channel, Label, Task
from attnseg.synthetic import SyntheticCase
from tests.conftest import PLAIN

TASK = Task(BRATS_CHANNELS, (Label("background", 0), Label("tumour", 1)), {"WT": (1,)}, ("t1",))
RULES = InputRules(TASK, PLAIN, (1.0, 1.0, 1.0), foreground_ml=1700)
UNKNOWN = replace(RULES, foreground_ml=None)
"""Rules of a model whose training data are unknown."""


@pytest.fixture
def volume(small_synthetic: SyntheticCase) -> Volume:
    return Volume(small_synthetic.images, small_synthetic.affine)


def spaced(volume: Volume, *spacing_mm: float) -> Volume:
    return replace(volume, affine=volume.affine @ np.diag([*spacing_mm, 1.0]))


@pytest.mark.parametrize("spacing_mm", [(1e-3, 1e-3, 1e-3), (1, 1, 21), (0.04, 1, 1)])
def test_an_implausible_spacing_is_refused(
    volume: Volume, spacing_mm: tuple[float, float, float]
) -> None:
    with pytest.raises(VolumeError, match=r"differs by a factor of .*; repair spacing"):
        check_input(spaced(volume, *spacing_mm), RULES)


@pytest.mark.parametrize("shape", [(4, 4, 4), (80, 88, 1), (80, 88, 4), (80, 88)])
@pytest.mark.parametrize("rules", [RULES, UNKNOWN])
def test_a_volume_of_a_few_slices_is_refused(shape: tuple[int, ...], rules: InputRules) -> None:
    channels: Any = np.random.default_rng(0).integers(1, 99, (4, *shape))
    with pytest.raises(VolumeError, match=r"at least 5 are needed along each|expected a 3-D array"):
        check_input(Volume(list(channels), np.eye(4)), rules)


def test_a_channel_and_its_file_are_named(volume: Volume) -> None:
    channels = [np.array(c) for c in volume.channels]
    channels[2] = (channels[2] > 0).astype(np.int16) * 5
    files = ("a_t1.nii", "a_t1ce.nii", "a_t2.nii", "a_flair.nii")
    with pytest.raises(VolumeError, match=r"^t2 \(a_t2\.nii\): is constant \(5\)"):
        check_input(Volume(channels, volume.affine, files=files), RULES)
    with pytest.raises(VolumeError, match=r"^t2: is constant \(5\)"):
        check_input(Volume(channels, volume.affine), UNKNOWN)


def test_a_range_below_the_smallest_float32_is_constant(volume: Volume) -> None:
    channels = [np.array(c, np.float64) for c in volume.channels]
    channels[2] *= 1e-310  # its standard deviation has no inverse
    with pytest.raises(VolumeError, match=r"^t2: is constant \("):
        check_input(Volume(channels, volume.affine), RULES)
    channels[2][40, 40, 40] = 1.0  # far beyond all others, and replaced
    with pytest.raises(VolumeError, match=r"^t2: is constant \("):
        check_input(Volume(channels, volume.affine), RULES)


def test_strict_rules_make_warnings_errors(volume: Volume) -> None:
    thick = spaced(volume, 1, 1, 2)
    assert "the scan is resampled" in check_input(thick, RULES).warnings[0]
    with pytest.raises(VolumeError, match=r"the scan is resampled.*leave strict out"):
        check_input(thick, replace(RULES, strict=True))
    assert check_input(volume, replace(RULES, strict=True)).warnings == ()


def test_a_model_of_unknown_data_warns_of_a_full_volume_and_cuts_nothing(volume: Volume) -> None:
    noise = np.random.default_rng(0).integers(1, 4, volume.shape)
    noisy = replace(volume, channels=[np.where(c == 0, noise, c) for c in volume.channels])
    found = check_input(noisy, UNKNOWN)
    assert "100% of the voxels are not 0" in found.warnings[0]
    for channel, given in zip(found.volume.channels, noisy.channels, strict=True):
        np.testing.assert_array_equal(channel, given)
    constant = replace(volume, channels=[np.asarray(c) - 1000 for c in volume.channels])
    with pytest.raises(VolumeError, match="t1: its background is -1000, the model takes 0 there"):
        check_input(constant, UNKNOWN)


def test_a_wrong_spacing_is_named_where_it_makes_the_foreground_too_large(volume: Volume) -> None:
    with pytest.raises(VolumeError, match=r"more than the object.*; spacing is 8 x 8 x 8 mm"):
        check_input(spaced(volume, 8, 8, 8), RULES)


@pytest.mark.parametrize(("spacing_mm", "word"), [(1.5, "may be poorer"), (5, "is likely poor")])
def test_the_warning_of_thick_slices_is_stronger(
    volume: Volume, spacing_mm: float, word: str
) -> None:
    (warning,) = check_input(spaced(volume, 1, 1, spacing_mm), RULES).warnings[:1]
    assert f"the scan is resampled, and the result {word}" in warning


def test_doubts_about_the_header_are_named_with_an_implausible_spacing(volume: Volume) -> None:
    doubtful = replace(spaced(volume, 1000, 1000, 1000), warnings=("a.nii states its unit",))
    with pytest.raises(VolumeError, match=r"by a factor of 1e\+03; a\.nii states its unit"):
        check_input(doubtful, RULES)


def test_any_number_of_threads_finds_the_same(volume: Volume) -> None:
    rng = np.random.default_rng(0)
    dust = rng.integers(0, 3, volume.shape)
    channels = [np.where(c == 0, dust, c).astype(np.int16) for c in volume.channels]
    channels[1][0, 0, 0] = 32000
    one, several = (
        check_input(replace(volume, channels=channels), RULES, threads) for threads in (1, 3)
    )
    first, second = several.warnings
    assert first.startswith("t1ce: 1 voxel lies far beyond all others, up to 3.2e+04")
    assert second.startswith("t1, t1ce, t2, flair: the background is not 0")
    assert several.warnings == one.warnings
    np.testing.assert_array_equal(several.volume.channels, one.volume.channels)
    channels[2] = channels[2] * 0 + 5
    channels[3] = channels[3] * 0
    for threads in (1, 3):
        with pytest.raises(VolumeError, match="t2: is constant"):  # the first of two errors
            check_input(replace(volume, channels=channels), RULES, threads)


def test_a_model_of_unknown_voxel_size_takes_any(volume: Volume) -> None:
    rules = replace(RULES, spacing_mm=None, foreground_ml=None)
    checked = check_input(spaced(volume, 3, 0.02, 5), rules)
    assert (checked.preprocessing.grid, checked.warnings) == (None, ())


def test_a_model_of_another_framework_gets_the_voxels_of_the_scan(volume: Volume) -> None:
    channels = [np.array(c, np.float32) for c in volume.channels]
    channels[1][40, 40, 40] = 1e6
    for rules, kept in ((UNKNOWN, True), (RULES, False)):
        checked = check_input(replace(volume, channels=channels), rules)
        assert "1 voxel lies far beyond all others" in checked.warnings[0]
        assert (checked.volume.channels[1][40, 40, 40] == 1e6) == kept


def with_scheme(scheme: Scheme) -> InputRules:
    return InputRules(TASK, Preprocessing("LPS", None, "all", (scheme,) * 4), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("by_statistics", "for_ct"),
    [
        (ZScore("all"), ClipZScore(-200.0, 300.0, 50.0, 80.0)),
        (Range(percentiles=(0.5, 99.5)), Range(source=(-57.0, 164.0))),
    ],
)
def test_scans_of_another_modality_are_warned_of(
    volume: Volume, by_statistics: Scheme, for_ct: Scheme
) -> None:
    mri = [np.asarray(channel).astype(np.int16) for channel in volume.channels]
    ct = [np.where(channel == 0, -1000 - n, channel) for n, channel in enumerate(mri)]
    of_mri, of_ct = replace(volume, channels=mri), replace(volume, channels=ct)
    found = check_input(of_ct, with_scheme(by_statistics)).warnings
    assert [w.split(",")[0] for w in found] == [
        f"{name}: has values down to {low}"
        for name, low in zip(TASK.channel_names, (-1000, -1001, -1002, -1003), strict=True)
    ]
    found = check_input(of_mri, with_scheme(for_ct)).warnings
    assert len(found) == 4
    assert all("no value is below 0, the model is for CT" in w for w in found)
    from_0 = ClipZScore(0.0, 300.0, 50.0, 80.0)
    for doubtless, scheme in ((of_mri, by_statistics), (of_ct, for_ct), (of_mri, from_0)):
        assert check_input(doubtless, with_scheme(scheme)).warnings == ()


@pytest.mark.parametrize(("name", "warned"), [("T2 correction", 1), ("CT", 0), ("low-dose ct", 0)])
def test_a_channel_is_of_ct_where_a_word_of_its_name_is(name: str, warned: int) -> None:
    task = Task((Channel(name, ("",)),), TASK.labels, TASK.regions, (name,))
    rules = InputRules(task, Preprocessing("LPS", None, "all", (ZScore("all"),)), (1.0, 1.0, 1.0))
    values = np.random.default_rng(0).integers(-1000, 400, (16, 16, 16)).astype(np.int16)
    assert len(check_input(Volume([values], np.eye(4)), rules).warnings) == warned
