"""From a volume to the network's input: the same steps for training and for inference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.grid import Grid, resample_volume, restore_logits
from attnseg.runtime.normalise import Box, Normalisation, brain_box, normalise
from attnseg.runtime.volume import Volume
from attnseg.runtime.windows import Shape


@dataclass(frozen=True)
class Prepared:
    """A network's input, and where it lies.

    Attributes:
        image: `(C, X, Y, Z)` float32, normalised, of the box.
        box: of the image in the grid.
        grid_shape: of the whole grid.
        shape: of the volume that it was made from.
        resampled: whether the grid is not the volume's own.
    """

    image: NDArray[np.float32]
    box: Box
    grid_shape: Shape
    shape: Shape
    resampled: bool

    @property
    def result_box(self) -> Box:
        """Where in the volume the result of `restore` lies."""
        x, y, z = (slice(0, size) for size in self.shape)
        return (x, y, z) if self.resampled else self.box

    def restore(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits `(K, X, Y, Z)` of the image, on the `result_box` of the volume."""
        if not self.resampled:
            return logits
        return restore_logits(logits, self.box, self.grid_shape, self.shape)


def prepare(
    volume: Volume, grid: Grid | None, normalisation: Normalisation, threads: int = 1
) -> Prepared:
    """Resample to the grid, crop to the foreground, normalise.

    Args:
        volume: in the model's orientation.
        grid: of the model; None for the volume's own.
        normalisation: of the model.
        threads: channels normalised at the same time.

    Raises:
        VolumeError: a channel has no foreground, or one value only.
    """
    placed = resample_volume(volume, grid)
    box = brain_box(placed.channels, normalisation.foreground)
    image = normalise([c[box] for c in placed.channels], normalisation, threads)
    return Prepared(image, box, placed.shape, volume.shape, grid is not None)
