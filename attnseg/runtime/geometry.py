"""Boxes, axis transforms and memory layouts, shared by all steps.

Axis order is X, Y, Z throughout. Orientations are axis codes such as `LPS`: the direction of
increasing index along each axis, as in nibabel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.errors import ConfigError

Shape = tuple[int, int, int]
"""Number of voxels along X, Y and Z."""
Slices = tuple[slice, slice, slice]
"""Index of a box in an `(X, Y, Z)` array."""

_AXIS_OF = {"L": 0, "R": 0, "A": 1, "P": 1, "I": 2, "S": 2}


def shape_of(values: Sequence[int]) -> Shape:
    """Convert a sequence of three integers to a `Shape`."""
    x, y, z = values
    return int(x), int(y), int(z)


def along_axes(value: int | Sequence[int]) -> Shape:
    """One number for each axis: the number given for all of them, or the three given."""
    return (value, value, value) if isinstance(value, int) else shape_of(value)


@dataclass(frozen=True)
class Box:
    """An axis-aligned box of voxels.

    Attributes:
        start: Index of the first voxel along X, Y and Z.
        stop: Index one past the last voxel along X, Y and Z.
    """

    start: Shape
    stop: Shape

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """Box that covers an array of `shape`."""
        return cls((0, 0, 0), shape_of(shape))

    @property
    def shape(self) -> Shape:
        """Number of voxels along X, Y and Z."""
        return shape_of([b - a for a, b in zip(self.start, self.stop, strict=True)])

    def slices(self) -> Slices:
        """Index of the box in an `(X, Y, Z)` array."""
        x, y, z = (slice(a, b) for a, b in zip(self.start, self.stop, strict=True))
        return x, y, z


@dataclass(frozen=True)
class Layout:
    """Memory layout of a volume, in elements (not bytes).

    Attributes:
        shape: Number of voxels along X, Y and Z.
        strides: Distance between neighbouring voxels along X, Y and Z.
        offset: Position of voxel (0, 0, 0).
    """

    shape: Shape
    strides: Shape
    offset: int = 0

    @classmethod
    def fortran(cls, shape: Sequence[int]) -> Layout:
        """Layout of a Fortran-contiguous array, the memory order of NIfTI files."""
        x, y, z = shape
        return cls((x, y, z), (1, x, x * y))


@dataclass(frozen=True)
class AxisTransform:
    """Permutation and reversal of the last three axes, exactly invertible.

    Attributes:
        axes: Source axis of each target axis; 0 is X.
        flips: Target axes that are reversed after the permutation.
    """

    axes: Shape = (0, 1, 2)
    flips: tuple[int, ...] = ()

    @classmethod
    def between(cls, source: str, target: str) -> AxisTransform:
        """Transform from one orientation to another."""
        codes = [_AXIS_OF[code] for code in source]
        axes = shape_of([codes.index(_AXIS_OF[code]) for code in target])
        flips = (i for i, axis in enumerate(axes) if source[axis] != target[i])
        return cls(axes, tuple(flips))

    def apply(self, array: NDArray[Any]) -> NDArray[Any]:
        """Transformed view of an array `(..., X, Y, Z)`."""
        return self._flip(_permute(array, self.axes))

    def invert(self, array: NDArray[Any]) -> NDArray[Any]:
        """View of an array `(..., X, Y, Z)` with the inverse transform applied."""
        return _permute(self._flip(array), np.argsort(self.axes).tolist())

    def _flip(self, array: NDArray[Any]) -> NDArray[Any]:
        return np.flip(array, tuple(array.ndim - 3 + axis for axis in self.flips))

    def shape(self, shape: Sequence[int]) -> Shape:
        """Shape of an array of `shape` after the transform."""
        return shape_of([shape[axis] for axis in self.axes])

    def box(self, box: Box, shape: Sequence[int]) -> Box:
        """Box in the transformed array of a box in an array of `shape`."""
        ends = [(box.start[axis], box.stop[axis]) for axis in self.axes]
        for axis in self.flips:
            size, (start, stop) = shape[self.axes[axis]], ends[axis]
            ends[axis] = size - stop, size - start
        starts, stops = zip(*ends, strict=True)
        return Box(shape_of(starts), shape_of(stops))

    def layout(self, layout: Layout) -> Layout:
        """Layout of the transformed view of an array with `layout`."""
        offset, strides = layout.offset, [layout.strides[axis] for axis in self.axes]
        for axis in self.flips:
            offset += strides[axis] * (layout.shape[self.axes[axis]] - 1)
            strides[axis] = -strides[axis]
        return Layout(self.shape(layout.shape), shape_of(strides), offset)

    def matrix(self, shape: Sequence[int]) -> NDArray[np.float64]:
        """`(4, 4)` matrix from voxels of the transformed array to voxels of the source array."""
        found = np.zeros((4, 4))
        found[3, 3] = 1
        for target, source in enumerate(self.axes):
            flipped = target in self.flips
            found[source, target] = -1 if flipped else 1
            found[source, 3] = shape[source] - 1 if flipped else 0
        return found


def _permute(array: NDArray[Any], axes: Sequence[int]) -> NDArray[Any]:
    lead = array.ndim - 3
    return array.transpose(*range(lead), *(lead + axis for axis in axes))


def reorient(array: NDArray[Any], source: str, target: str) -> NDArray[Any]:
    """View of an array `(X, Y, Z)`, reoriented from `source` to `target`."""
    return AxisTransform.between(source, target).apply(array)


def format_size(values: Iterable[float]) -> str:
    """Three numbers as text, such as `240 x 240 x 155`."""
    return " x ".join(str(v) if isinstance(v, int) else f"{v:.4g}" for v in values)


def orientation_of(affine: NDArray[np.float64]) -> str:
    """Axis codes nearest to the axes of an affine `(4, 4)`, such as `LPS`."""
    from nibabel.orientations import io_orientation, ornt2axcodes

    return "".join(ornt2axcodes(io_orientation(affine)))


def check_orientation(orientation: str) -> None:
    """Raise `ConfigError` unless an orientation names each axis exactly once."""
    if sorted(_AXIS_OF.get(code, -1) for code in orientation) != [0, 1, 2]:
        raise ConfigError(f"orientation {orientation} does not name each axis once, as LPS does")
