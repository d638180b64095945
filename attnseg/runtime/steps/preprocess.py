"""Preprocessing of a volume to the network's input, shared by training and inference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.case.volume import Volume
from attnseg.runtime.errors import ConfigError
from attnseg.runtime.geometry import Box, Shape, check_orientation
from attnseg.runtime.steps.foreground import Foreground, foreground_box
from attnseg.runtime.steps.normalise import Scheme, normalise
from attnseg.runtime.steps.resample import Grid, resample_volume, restore_logits


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing steps, applied in the order of the attributes.

    Attributes:
        orientation: Axis codes that volumes are reoriented to, such as `LPS`.
        grid: Grid that volumes are resampled to; None to use the volume's own grid.
        crop: Foreground whose bounding box volumes are cropped to; `all` disables cropping.
        normalisation: Normalisation scheme of each channel.

    Raises:
        ConfigError: The orientation is invalid, or there is no scheme.
    """

    orientation: str
    grid: Grid | None
    crop: Foreground
    normalisation: tuple[Scheme, ...]

    def __post_init__(self) -> None:
        check_orientation(self.orientation)
        if not self.normalisation:
            raise ConfigError("normalisation must have a scheme for each channel")


@dataclass(frozen=True)
class Preprocessed:
    """Network input, and its position in the volume.

    Attributes:
        image: `(C, X, Y, Z)` float32, normalised and cropped to `box`.
        box: Position of the image on the grid.
        grid_shape: Number of voxels of the grid along X, Y and Z.
        shape: Number of voxels of the volume along X, Y and Z, in the model's orientation.
        resampled: Whether the volume was resampled.
    """

    image: NDArray[np.float32]
    box: Box
    grid_shape: Shape
    shape: Shape
    resampled: bool

    @property
    def result_box(self) -> Box:
        """Box of the volume covered by the result of `restore`."""
        return Box.whole(self.shape) if self.resampled else self.box

    def restore(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map logits `(K, X, Y, Z)` of the image to the `result_box` of the volume."""
        if not self.resampled:
            return logits
        return restore_logits(logits, self.box, self.grid_shape, self.shape)


def preprocess(volume: Volume, preprocessing: Preprocessing, threads: int = 1) -> Preprocessed:
    """Reorient, resample, crop and normalise a volume.

    Args:
        volume: Channels in the model's order, in any orientation.
        preprocessing: Preprocessing of the model.
        threads: Number of channels normalised concurrently.

    Raises:
        VolumeError: The foreground of a channel has fewer than two distinct values.
    """
    turned = volume.oriented(preprocessing.orientation)
    placed = resample_volume(turned, preprocessing.grid)
    box = foreground_box(placed.channels, preprocessing.crop)
    cropped = [channel[box.slices()] for channel in placed.channels]
    image = normalise(cropped, preprocessing.normalisation, threads)
    return Preprocessed(image, box, placed.shape, turned.shape, preprocessing.grid is not None)
