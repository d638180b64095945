"""Preprocessing of a volume to the network's input, shared by training and inference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.case.volume import Volume
from attnseg.runtime.errors import ConfigError
from attnseg.runtime.geometry import Box, Shape, check_orientation, shape_of
from attnseg.runtime.steps.foreground import Crop, foreground_box
from attnseg.runtime.steps.normalise import normalise
from attnseg.runtime.steps.resample import Grid, Quantity, Sampling, resample_image
from attnseg.runtime.steps.schemes import Scheme
from attnseg.runtime.threads import in_threads

PreprocessingStep = Literal["resample", "crop", "normalise"]


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing steps. A volume is turned first; `order` is the order of the others.

    Attributes:
        orientation: Axis codes that X, Y and Z of volumes are turned to, such as `LPS`; None to
            keep the axes as they are stored.
        grid: Grid that volumes are resampled to; None to use the volume's own grid.
        crop: Foreground whose bounding box volumes are cropped to; `all` disables cropping.
        normalisation: Normalisation scheme of each channel.
        order: Order of the steps.
        axes: Axis of the volume, 0 for X, of each axis of the image; (2, 1, 0) for nnU-Net's
            arrays. Shapes, windows and voxel sizes of a model follow the axes of the image.

    Raises:
        ConfigError: The orientation, the axes or the order are invalid, or there is no scheme.
    """

    orientation: str | None
    grid: Grid | None
    crop: Crop
    normalisation: tuple[Scheme, ...]
    order: tuple[PreprocessingStep, ...] = ("resample", "crop", "normalise")
    axes: Shape = (0, 1, 2)

    def __post_init__(self) -> None:
        if self.orientation is not None:
            check_orientation(self.orientation)
        if not self.normalisation:
            raise ConfigError("normalisation must have a scheme for each channel")
        if sorted(self.order) != ["crop", "normalise", "resample"]:
            raise ConfigError(
                f"order must name crop, normalise and resample once, got {', '.join(self.order)}"
            )
        if self.order.index("crop") > self.order.index("normalise"):
            raise ConfigError("order must name crop before normalise")
        if sorted(self.axes) != [0, 1, 2]:
            raise ConfigError(f"axes must name each axis once, got {self.axes}")

    def orientation_of_image(self, volume: Volume) -> str:
        """Axis codes of the network's input for a volume, along the axes of the image."""
        codes = self.orientation or volume.orientation
        return "".join(codes[axis] for axis in self.axes)


@dataclass(frozen=True)
class Preprocessed:
    """Network input, and its position in the volume.

    Attributes:
        image: `(C, X, Y, Z)` float32, normalised.
        box: Part of the volume, or of the resampled volume, that the image covers.
        box_on_grid: Whether `box` is a part of the resampled volume: it was cropped after
            resampling.
        grid_shape: Number of voxels of the resampled volume or part.
        shape: Number of voxels of the volume along X, Y and Z, in the model's orientation.
        sampling: Sampling from the volume or its part to the grid; None if it was not resampled.
        back: Quantity that is resampled to the volume's grid.
    """

    image: NDArray[np.float32]
    box: Box
    box_on_grid: bool
    grid_shape: Shape
    shape: Shape
    sampling: Sampling | None
    back: Quantity

    @property
    def resampled(self) -> bool:
        """Whether the outputs are resampled to the volume's grid."""
        return self.sampling is not None

    @property
    def result_box(self) -> Box:
        """Box of the volume that the results cover."""
        return Box.whole(self.shape) if self.resampled and self.box_on_grid else self.box


class _Work:
    """Channels of a volume on their way through the steps."""

    def __init__(self, volume: Volume, rules: Preprocessing, threads: int) -> None:
        self.channels, self._volume = volume.channels, volume
        self._rules, self._threads = rules, threads
        self.box = Box.whole(volume.shape)
        self.sampling: Sampling | None = None

    def resample(self) -> None:
        grid = self._rules.grid
        if grid is None:
            return
        volume = self._volume
        sampling = grid.sampling(self.channels[0].shape, volume.spacing_mm, volume.affine)
        if sampling.changes:
            self.channels = in_threads(
                lambda channel: resample_image(channel, sampling, grid),
                self.channels,
                self._threads,
            )
            self.sampling = sampling

    def crop(self) -> None:
        self.box = foreground_box(self.channels, self._rules.crop)
        where = self.box.slices()
        self.channels = [channel[where] for channel in self.channels]

    def normalise(self) -> None:
        self.channels = normalise(self.channels, self._rules.normalisation, self._threads)


def preprocess(volume: Volume, preprocessing: Preprocessing, threads: int = 1) -> Preprocessed:
    """Turn, resample, crop and normalise a volume.

    Args:
        volume: Channels in the model's order, in any orientation.
        preprocessing: Preprocessing of the model.
        threads: Number of channels normalised concurrently.

    Raises:
        VolumeError: The foreground of a channel has fewer than two distinct values.
    """
    turned = volume.oriented(preprocessing.orientation_of_image(volume))
    work = _Work(turned, preprocessing, threads)
    steps: dict[PreprocessingStep, Callable[[], None]] = {
        "resample": work.resample,
        "crop": work.crop,
        "normalise": work.normalise,
    }
    for name in preprocessing.order:
        steps[name]()
    grid = preprocessing.grid
    return Preprocessed(
        image=np.ascontiguousarray(work.channels, np.float32),
        box=work.box,
        box_on_grid=preprocessing.order.index("resample") < preprocessing.order.index("crop"),
        grid_shape=work.sampling.target if work.sampling else turned.shape,
        shape=shape_of(turned.shape),
        sampling=work.sampling,
        back=grid.back if grid is not None else "logits",
    )
