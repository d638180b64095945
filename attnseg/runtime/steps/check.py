"""Check of a volume before processing: errors for invalid, warnings for doubtful input."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.case.volume import Volume, check_volume
from attnseg.runtime.errors import ScanError, Setting, VolumeError
from attnseg.runtime.geometry import AxisTransform, format_size
from attnseg.runtime.steps.background import clean_background
from attnseg.runtime.steps.extremes import replace_extremes
from attnseg.runtime.steps.foreground import background_value
from attnseg.runtime.steps.preprocess import Preprocessing
from attnseg.runtime.steps.resample import Grid
from attnseg.runtime.steps.schemes import ClipZScore, LandmarkMatching, Range, Scheme, ZScore
from attnseg.runtime.task import Task
from attnseg.runtime.threads import Each, mapping

Resample = Literal["auto", "never"]
"""Treatment of scans whose voxel size is not the model's: resample or refuse them."""

_SPACING_TOLERANCE = 0.05  # relative; beyond it a scan is resampled
_LARGEST_FACTOR = 20.0  # between the voxel sizes of scan and model
_THICK = 2.0  # times the model's largest voxel edge, beyond which detail is missing
_FEWEST_VOXELS = 5  # along an axis
_FULL = 0.9  # fraction of non-zero voxels above which a background of 0 is unlikely
_LEAST_RANGE = float(np.finfo(np.float32).tiny)  # of intensities; a smaller one overflows
_LEAST_MRI = -500.0  # CT has air at -1000; resampled MRI is hardly below 0
_WHICH_FILE = "check that the right file was given"


@dataclass(frozen=True)
class InputRules:
    """Requirements of a model on its input.

    Attributes:
        task: Task of the model.
        preprocessing: Preprocessing of the model.
        spacing_mm: Voxel size of the training data along X, Y and Z; None if it is unknown, and
            scans of any voxel size are taken as they are.
        foreground_ml: Largest foreground of the training cases, whose background was 0; None if
            their background is unknown.
        resample: Treatment of scans with another voxel size.
        strict: Whether warnings are errors.
    """

    task: Task
    preprocessing: Preprocessing
    spacing_mm: tuple[float, float, float] | None
    foreground_ml: float | None = None
    resample: Resample = "auto"
    strict: bool = False


@dataclass(frozen=True)
class Checked:
    """A checked volume.

    Attributes:
        volume: The volume, without dust in its background and without extreme values.
        preprocessing: Preprocessing of this volume, with a grid if it is to be resampled.
        warnings: Warnings for readers of the result.
    """

    volume: Volume
    preprocessing: Preprocessing
    warnings: tuple[str, ...]


def check_channel_count(volume: Volume, task: Task) -> None:
    """Raise `ScanError` unless a volume has the task's number of channels."""
    if len(volume.channels) != len(task.channels):
        raise ScanError(
            f"the model takes {', '.join(task.channel_names)}, got {len(volume.channels)} channels",
            "give the channels first: (C, X, Y, Z), or a list of (X, Y, Z)",
        )


def check_input(volume: Volume, rules: InputRules, threads: int = 1) -> Checked:
    """Check a volume in host memory against the requirements of a model.

    Args:
        volume: The volume.
        rules: Requirements of the model.
        threads: Number of CPU threads.

    Raises:
        ScanError: The number of channels is wrong.
        VolumeError: The channels are not finite arrays of one 3-D shape; the volume is too small or
            has an implausible voxel size; a channel is constant, has a background that is not 0 or
            contradicts the others; two channels are equal; or, if `rules` are strict, there is a
            warning.
    """
    check_channel_count(volume, rules.task)
    check_volume(volume)
    preprocessing, resampled = choose_grid(volume, rules)
    try:
        with mapping(min(threads, len(volume.channels))) as each:
            cleaned, doubts = clean_channels(volume, rules, each)
    except VolumeError as error:  # a wrong voxel size may be the cause
        cause = "; ".join((error.cause, *resampled))
        raise VolumeError(cause, error.mend, *error.settings) from error
    warnings = (*volume.warnings, *resampled, *doubts)
    check_strict(warnings, rules)
    return Checked(cleaned, preprocessing, warnings)


def check_strict(warnings: Sequence[str], rules: InputRules) -> None:
    """Raise `VolumeError` if there is a warning and the rules are strict."""
    if warnings and rules.strict:
        more = f" (and {len(warnings) - 1} more warnings)" if warnings[1:] else ""
        raise VolumeError(
            f"{warnings[0]}{more}", "mend the scan, or leave {} out", Setting("strict")
        )


def choose_grid(volume: Volume, rules: InputRules) -> tuple[Preprocessing, tuple[str, ...]]:
    """Preprocessing with the grid of a volume, and a warning if the volume is resampled for it.

    Raises:
        VolumeError: Size or voxel size are implausible, or resampling is needed but not allowed.
    """
    preprocessing = rules.preprocessing
    if min(volume.shape) < _FEWEST_VOXELS:
        raise VolumeError(
            f"the volume has {format_size(volume.shape)} voxels, at least {_FEWEST_VOXELS} are "
            "needed along each axis",
            "give the whole scan",
        )
    target = preprocessing.orientation_of_image(volume)
    turn = AxisTransform.between(volume.orientation, target)
    if rules.spacing_mm is None:
        return preprocessing, ()
    spacing = np.array([volume.spacing_mm[axis] for axis in turn.axes])
    wanted = np.array(rules.spacing_mm)
    said = (
        f"spacing is {format_size(spacing)} mm, the model was trained at {format_size(wanted)} mm"
    )
    factor = float(np.exp(np.abs(np.log(spacing / wanted)).max()))
    if not factor <= _LARGEST_FACTOR:
        cause = "; ".join((f"{said}, which differs by a factor of {factor:.3g}", *volume.warnings))
        raise VolumeError(cause, "repair spacing or unit in the header")
    if np.allclose(spacing, wanted, rtol=_SPACING_TOLERANCE):
        return preprocessing, ()
    if preprocessing.grid is not None:  # a fixed shape does not change with the voxel size
        return preprocessing, (f"{said}: results may be poor",) if preprocessing.grid.shape else ()
    if rules.resample == "never":
        raise VolumeError(said, "resample the scan, or leave {} out", Setting("resample"))
    effect = "may be poorer"
    if spacing.max() > _THICK * wanted.max():
        effect = "is likely poor, as detail is missing"
    warning = f"{said}: the scan is resampled, and the result {effect}"
    return replace(preprocessing, grid=Grid(spacing_mm=rules.spacing_mm)), (warning,)


def channel_labels(volume: Volume, task: Task) -> list[str]:
    """Name of each channel, with its file if known, for messages."""
    files = volume.files or ("",) * len(volume.channels)
    pairs = zip(task.channel_names, files, strict=True)
    return [f"{name} ({file})" if file else name for name, file in pairs]


def clean_channels(
    volume: Volume, rules: InputRules, each: Each = map
) -> tuple[Volume, tuple[str, ...]]:
    """Check the intensities of a volume; extreme values are replaced, and dust is cut to 0.

    Args:
        volume: The volume.
        rules: Requirements of the model.
        each: Function that calls another with each channel.

    Returns:
        The volume and warnings for readers of the result.

    Raises:
        VolumeError: See `check_input`.
    """
    names = channel_labels(volume, rules.task)
    channels: list[NDArray[Any]] = list(volume.channels)
    deque(each(_check_varies, names, channels), maxlen=0)
    known = rules.foreground_ml is not None  # otherwise, another framework preprocessed its data
    channels, extremes = replace_extremes(channels, names, each, replace=known)
    if extremes:
        deque(each(_check_varies, names, channels), maxlen=0)
    channels, doubts = _check_background(channels, names, volume, rules, each)
    _check_distinct(channels, names)
    schemes = rules.preprocessing.normalisation
    modality = _other_modality(channels, names, rules.task.channel_names, schemes)
    warnings = (*extremes, *doubts, *modality)
    return replace(volume, channels=channels), warnings


def _check_background(
    channels: list[NDArray[Any]],
    names: Sequence[str],
    volume: Volume,
    rules: InputRules,
    each: Each,
) -> tuple[list[NDArray[Any]], tuple[str, ...]]:
    """Channels without dust, and warnings."""
    schemes = rules.preprocessing.normalisation
    if any(scheme.foreground != "nonzero" for scheme in schemes):
        return channels, ()
    if rules.foreground_ml is not None:
        cleaned = clean_background(channels, names, volume.voxel_ml, rules.foreground_ml, each)
        return cleaned.channels, cleaned.warnings
    for name, channel in zip(names, channels, strict=True):
        value = background_value(channel)
        if value != 0:
            raise VolumeError(
                f"{name}: its background is {value:g}, the model takes 0 there",
                "set the voxels of the background to 0",
            )
    share = np.count_nonzero(channels[0]) / channels[0].size
    if share <= _FULL:
        return channels, ()
    warning = (
        f"{share:.0%} of the voxels are not 0: the model takes a background of 0, and the result "
        "is likely wrong"
    )
    return channels, (warning,)


def _other_modality(
    channels: Sequence[NDArray[Any]],
    labels: Sequence[str],
    names: Sequence[str],
    schemes: Sequence[Scheme],
) -> tuple[str, ...]:
    """Warnings about CT for a model of MRI, and the reverse, by the intensities."""
    warnings = []
    for channel, label, name, scheme in zip(channels, labels, names, schemes, strict=True):
        lowest = float(channel[::2, ::2, ::2].min())
        if _for_ct(scheme) and lowest >= 0:
            warnings.append(
                f"{label}: no value is below 0, the model is for CT in Hounsfield units, in which "
                "air is -1000: the result is likely wrong"
            )
        named_ct = re.search(r"\bct\b", name.lower()) is not None
        if _by_statistics(scheme) and lowest < _LEAST_MRI and not named_ct:
            warnings.append(
                f"{label}: has values down to {lowest:g}, as CT has; the model is for intensities "
                "of MRI: the result is likely wrong"
            )
    return tuple(warnings)


def _for_ct(scheme: Scheme) -> bool:
    """Whether a scheme maps a fixed range of intensities that begins below 0."""
    if isinstance(scheme, Range):
        return scheme.source is not None and scheme.source[0] < 0
    return isinstance(scheme, ClipZScore) and scheme.low < 0


def _by_statistics(scheme: Scheme) -> bool:
    """Whether a scheme maps intensities by the statistics of the scan, as is usual for MRI."""
    if isinstance(scheme, Range):
        return scheme.source is None
    return isinstance(scheme, ZScore | LandmarkMatching)


def _check_varies(name: str, channel: NDArray[Any]) -> None:
    """Raise `VolumeError` if a channel holds a single value, within rounding, apart from 0."""
    for values in (channel[::4, ::4, ::4], channel):  # a few voxels settle it most times
        found = values[values != 0]
        if found.size and float(found.max()) - float(found.min()) > _LEAST_RANGE:
            return
    if not found.size:
        raise VolumeError(f"{name}: holds only zeros", _WHICH_FILE)
    raise VolumeError(f"{name}: is constant ({float(found[0]):g})", _WHICH_FILE)


def _check_distinct(channels: Sequence[NDArray[Any]], names: Sequence[str]) -> None:
    middle = channels[0].shape[0] // 2
    for (a, first), (b, second) in combinations(zip(names, channels, strict=True), 2):
        if not np.array_equal(first[middle], second[middle]):
            continue  # one differing slice settles it
        if np.array_equal(first, second):
            raise VolumeError(f"{a} and {b} hold the same voxels", "check which file is which")
