"""Results of the CUDA pipeline: labels and numbers in device memory, and the numbers parsed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.cuda import kernels
from attnseg.runtime.cuda.device import Device, Region
from attnseg.runtime.cuda.memory import aligned

NOT_FINITE, REMOVED, COUNTS = 0, 1, 2  # indices in `Results.numbers`, which are int32
_NUMBERS = COUNTS + kernels.MOST_CLASSES


@dataclass(frozen=True)
class Outcome:
    """Numbers that are downloaded with the labels of a volume.

    Attributes:
        finite: Whether every logit was finite.
        components_removed: Number of components that the clean-up removed.
        voxels: `(K,)` number of voxels of each class index; 0 for background, never counted.
    """

    finite: bool
    components_removed: int
    voxels: NDArray[np.int64]

    @classmethod
    def of(cls, content: NDArray[np.uint8], classes: int) -> Outcome:
        """Parse the bytes of `Results.numbers` for a number of classes."""
        numbers = content.view(np.int32)
        counts = numbers[COUNTS:][:classes].astype(np.int64)
        return cls(not numbers[NOT_FINITE], int(numbers[REMOVED]), counts)


@dataclass(frozen=True)
class Results:
    """Device memory of a volume's results, which may be downloaded while the next volume runs.

    Attributes:
        labels: Region of the labels, one byte per voxel.
        numbers: Region of the numbers of `Outcome`.
        probabilities: Region of the probabilities of the regions, float32; None if they are not
            requested.
    """

    labels: Region
    numbers: Region
    probabilities: Region | None

    @classmethod
    def allocate(cls, device: Device, voxels: int, regions: int) -> Results:
        """Allocate the results of a volume, and clear its labels and numbers.

        Args:
            device: The device.
            voxels: Number of voxels of the volume.
            regions: Number of regions whose probabilities are requested.
        """
        given = device.allocate(aligned(voxels) + 4 * _NUMBERS)
        device.clear(given)
        size_bytes = 4 * regions * voxels
        maps = Region.of(device.allocate(size_bytes), 0, size_bytes) if regions else None
        return cls(
            labels=Region.of(given, 0, voxels),
            numbers=Region.of(given, aligned(voxels), 4 * _NUMBERS),
            probabilities=maps,
        )

    def number(self, index: int) -> int:
        """Device address of one of the numbers: `NOT_FINITE`, `REMOVED` or `COUNTS`."""
        return self.numbers.pointer + 4 * index
