"""Validation of a volume before processing: errors for invalid, warnings for doubtful input."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from attnseg.runtime.case.volume import Volume, check_volume
from attnseg.runtime.errors import ScanError, VolumeError
from attnseg.runtime.steps.foreground import background_value
from attnseg.runtime.steps.preprocess import Preprocessing
from attnseg.runtime.task import Task

_SPACING_TOLERANCE = 0.05  # relative; a larger deviation is reported as a warning
_FULL = 0.9  # fraction of non-zero voxels above which a background of 0 is unlikely


def check_channel_count(volume: Volume, task: Task) -> None:
    """Raise `ScanError` unless a volume has the task's number of channels."""
    if len(volume.channels) != len(task.channels):
        raise ScanError(
            f"the model takes {', '.join(task.channel_names)}, got {len(volume.channels)} channels"
        )


def check_input(
    volume: Volume, task: Task, preprocessing: Preprocessing, spacing_mm: Sequence[float]
) -> tuple[str, ...]:
    """Check a volume in host memory against the input requirements of a model.

    Args:
        volume: Channels in the model's order.
        task: Task of the model.
        preprocessing: Preprocessing of the model.
        spacing_mm: Voxel size of the training data along X, Y and Z.

    Returns:
        Warnings for readers of the result.

    Raises:
        ScanError: The number of channels is wrong.
        VolumeError: The channels are not finite arrays of one 3-D shape, a channel has a non-zero
            background where the model requires 0, or two channels are equal.
    """
    check_channel_count(volume, task)
    check_volume(volume)
    _check_background(volume, task, preprocessing)
    _check_distinct(volume, task)
    return (
        *volume.warnings,
        *_spacing_warnings(volume, preprocessing, spacing_mm),
        *_background_warnings(volume, preprocessing),
    )


def _check_background(volume: Volume, task: Task, preprocessing: Preprocessing) -> None:
    schemes = preprocessing.normalisation
    for name, scheme, channel in zip(task.channel_names, schemes, volume.channels, strict=True):
        value = background_value(channel)
        if scheme.foreground == "nonzero" and value != 0:
            raise VolumeError(
                f"{name}: its background is {value:g}, the model takes 0 there",
                "set the voxels outside the brain to 0",
            )


def _check_distinct(volume: Volume, task: Task) -> None:
    middle = volume.shape[0] // 2
    named = zip(task.channel_names, volume.channels, strict=True)
    for (a, first), (b, second) in combinations(named, 2):
        if not np.array_equal(first[middle], second[middle]):
            continue  # fast path: one differing slice settles it
        if np.array_equal(first, second) and first.any():
            raise VolumeError(f"{a} and {b} hold the same voxels", "check which file is which")


def _spacing_warnings(
    volume: Volume, preprocessing: Preprocessing, spacing_mm: Sequence[float]
) -> list[str]:
    grid, wanted = preprocessing.grid, np.array(spacing_mm)
    spacing = np.array(volume.oriented(preprocessing.orientation).spacing_mm)
    resampled = grid is not None and grid.spacing_mm is not None
    if resampled or np.allclose(spacing, wanted, rtol=_SPACING_TOLERANCE):
        return []
    got, want = (" x ".join(f"{v:g}" for v in s.round(3)) for s in (spacing, wanted))
    return [
        f"spacing is {got} mm, the model was trained at {want} mm: results may be poor; "
        "resample the scan first"
    ]


def _background_warnings(volume: Volume, preprocessing: Preprocessing) -> list[str]:
    share = np.count_nonzero(volume.channels[0]) / volume.channels[0].size
    if preprocessing.crop == "all" or share <= _FULL:
        return []
    return [
        f"{share:.0%} of the voxels are not 0: the model takes skull-stripped scans with "
        "a background of 0, and the result is likely wrong"
    ]
