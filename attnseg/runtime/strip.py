"""Skull-stripping: a brain mask by a second model, for models of skull-stripped scans.

The mask is computed from one channel and applied to all of them, which share its grid. It is the
largest component of the second model's foreground, with its holes filled.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.case.volume import Volume
from attnseg.runtime.errors import ConfigError, VolumeError
from attnseg.runtime.pipelines.base import Segmentation
from attnseg.runtime.task import Task

log = logging.getLogger(__name__)

_PLAUSIBLE_ML = (700.0, 2200.0)
"""Volume of adult brains with margin; a mask outside this range is doubtful."""


class Segments(Protocol):
    """A segmenter."""

    def segment(self, volume: Volume) -> Segmentation:
        """Segment one volume."""


def mask_channel(task: Task, mask_task: Task) -> int:
    """Index of the channel of a model that the model of the mask takes, by name.

    Raises:
        ConfigError: The model of the mask takes several channels, or one that the model lacks.
    """
    names = [name.lower() for name in task.channel_names]
    wanted = [name.lower() for name in mask_task.channel_names]
    if len(wanted) != 1:
        raise ConfigError(
            f"the model for skull-stripping takes {len(wanted)} channels, not one",
            "give one that takes a single channel of the model",
        )
    if wanted[0] not in names:
        raise ConfigError(
            f"the model for skull-stripping takes {', '.join(mask_task.channel_names)}; the model "
            f"has {', '.join(task.channel_names)}",
            "give one that takes a single channel of the model",
        )
    return names.index(wanted[0])


def brain_of(labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Largest component (26-connected) of the voxels above 0, with its holes filled."""
    from scipy import ndimage

    components, count = ndimage.label(labels > 0, np.ones((3, 3, 3)))
    if not count:
        return np.zeros(labels.shape, bool)
    sizes = np.bincount(components.ravel(order="K"))
    sizes[0] = 0
    return np.asarray(ndimage.binary_fill_holes(components == sizes.argmax()))


class SkullStripper:
    """Sets the voxels outside the brain to 0. May be called from several threads."""

    def __init__(self, segmenter: Segments, channel: int, name: str) -> None:
        """Use a segmenter for one channel; `name` is that of its model, for messages."""
        self._segmenter, self._channel, self._name = segmenter, channel, name
        self._one_at_a_time = threading.Lock()

    def strip(self, volume: Volume) -> Volume:
        """Volume whose voxels outside the brain are 0 in all channels.

        It has a warning if the volume of the brain is implausible.

        Raises:
            VolumeError: No brain is found.
        """
        single = replace(
            volume, channels=[volume.channels[self._channel]], files=(), sha256=(), warnings=()
        )
        with self._one_at_a_time:
            found = self._segmenter.segment(single)
        brain = brain_of(found.labels)
        size_ml = float(np.count_nonzero(brain)) * volume.voxel_ml
        if not size_ml:
            raise VolumeError(f"{self._name} finds no brain", "check that the right file was given")
        channels = [np.where(brain, channel, channel.dtype.type(0)) for channel in volume.channels]
        warnings = (*volume.warnings, *found.warnings, *self._doubts(size_ml))
        return replace(volume, channels=channels, warnings=warnings)

    def _doubts(self, size_ml: float) -> Sequence[str]:
        said = f"skull-stripped by {self._name}: the brain has {size_ml:.0f} ml"
        low, high = _PLAUSIBLE_ML
        if low <= size_ml <= high:
            log.info("%s", said)
            return ()
        return (f"{said}, which is implausible for an adult; check the mask in the picture",)
