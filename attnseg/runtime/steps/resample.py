"""Resampling between the scan's grid and the voxel grid of the model.

Two conventions are supported. `faces`: the outer faces of both grids coincide, as in
`scipy.ndimage.zoom` with `grid_mode=True`, `skimage.transform.resize` and nnU-Net. `centres`: the
centres of the first voxels coincide, as in MONAI's `Spacing`; see `_spacing_of_monai` for its
exceptions. Interpolation is separable, so that logits are resampled plane by plane, see
`Restoration` in `attnseg.runtime.steps.restore`.

Source: the paper trains on volumes resized to 192x192x128 (section 3.3); nnU-Net 2.8.1,
`resample_data_or_seg_to_shape`, whose splines of order 3 and separate axis are followed bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.case.volume import Volume
from attnseg.runtime.errors import ConfigError
from attnseg.runtime.geometry import Shape, format_size, shape_of

LARGEST_GRID = 1 << 28  # voxels, 1 GiB per channel; more indicates a wrong unit

Order = Literal[0, 1, 3]
"""Order of the interpolating spline: nearest neighbour, linear or cubic."""
Alignment = Literal["faces", "centres"]
"""Whether the outer faces of the grids coincide, or the centres of their first voxels."""
Quantity = Literal["logits", "probabilities"]
"""What is resampled to the scan's grid."""

Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class Grid:
    """Target grid of resampling, and the interpolation to it and back.

    Attributes:
        shape: Number of voxels along X, Y and Z; None if `spacing_mm` is given.
        spacing_mm: Voxel size along X, Y and Z; None if `shape` is given.
        order: Order of the interpolation of images. Values of order 3 are clipped to the range of
            the image.
        alignment: Which points of both grids coincide.
        separate_above: Ratio of the largest and the least voxel edge of either grid above which
            the axis of the largest is resampled by the nearest neighbour, as in nnU-Net (3); None
            for no such axis.
        back: What is resampled, linearly, to the scan's grid.

    Raises:
        ConfigError: Both or neither of `shape` and `spacing_mm` are given, or a value is out of
            range.
    """

    shape: Shape | None = None
    spacing_mm: Spacing | None = None
    order: Order = 1
    alignment: Alignment = "faces"
    separate_above: float | None = None
    back: Quantity = "logits"

    def __post_init__(self) -> None:
        if (self.shape is None) == (self.spacing_mm is None):
            raise ConfigError("a grid needs either a shape or a spacing_mm")
        values = self.shape or self.spacing_mm or ()
        if len(values) != 3 or not all(0 < v < math.inf for v in values):
            raise ConfigError(f"a grid needs three positive numbers, got {values}")
        if self.shape is not None and math.prod(self.shape) > LARGEST_GRID:
            raise ConfigError(f"a grid has at most {LARGEST_GRID} voxels, got {self.shape}")
        if self.shape is not None and self.alignment == "centres":
            raise ConfigError("alignment centres needs a spacing_mm, not a shape")
        ratio = self.separate_above
        if ratio is not None and not 1 <= ratio < math.inf:
            raise ConfigError(f"separate_above must be at least 1, got {ratio}")

    def sampling(
        self,
        shape: Sequence[int],
        spacing_mm: Sequence[float],
        affine: NDArray[np.float64] | None = None,
    ) -> Sampling:
        """Sampling of an image to this grid.

        Args:
            shape: Number of voxels along X, Y and Z.
            spacing_mm: Voxel size along X, Y and Z.
            affine: `(4, 4)` matrix from voxels to mm, which the alignment `centres` depends on;
                None for axes at right angles.

        Raises:
            ConfigError: The result has more than `LARGEST_GRID` voxels.
        """
        if self.alignment == "centres":
            return self._sampling_of_centres(
                shape, np.diag([*spacing_mm, 1.0]) if affine is None else affine
            )
        wanted = self.spacing_mm or tuple(
            s * n / m for s, n, m in zip(spacing_mm, shape, self.shape or (), strict=True)
        )
        target = self.shape or self._shape_for(shape, spacing_mm)
        self._check_size(target)
        i, j, k = (n / m for n, m in zip(shape, target, strict=True))
        separate = back = None
        if self.separate_above is not None:
            separate = separate_axis(spacing_mm, wanted, self.separate_above)
            back = separate_axis(wanted, spacing_mm, self.separate_above)
        return Sampling(
            source=shape_of(shape),
            target=target,
            scale=(i, j, k),
            offset=((i - 1) / 2, (j - 1) / 2, (k - 1) / 2),
            separate=separate,
            separate_back=back,
        )

    def _sampling_of_centres(self, shape: Sequence[int], affine: NDArray[np.float64]) -> Sampling:
        assert self.spacing_mm is not None
        target, scale, offset = _spacing_of_monai(shape, affine, self.spacing_mm)
        self._check_size(target)
        return Sampling(shape_of(shape), target, scale, offset, aligned_faces=False)

    def _check_size(self, target: Shape) -> None:
        if math.prod(target) > LARGEST_GRID:
            raise ConfigError(
                f"spacing_mm {self.spacing_mm} resamples a scan to {format_size(target)} voxels, "
                f"more than {LARGEST_GRID}",
                "give a larger spacing",
            )

    def _shape_for(self, shape: Sequence[int], spacing_mm: Sequence[float]) -> Shape:
        assert self.spacing_mm is not None
        sizes = zip(shape, spacing_mm, self.spacing_mm, strict=True)
        least = 1 if self.separate_above is not None else 2
        return shape_of([max(least, round(own / wanted * n)) for n, own, wanted in sizes])


_SAME = 1e-3  # MONAI's AFFINE_TOL, in mm or voxels


def _spacing_of_monai(
    shape: Sequence[int], affine: NDArray[np.float64], spacing_mm: Spacing
) -> tuple[Shape, Spacing, Spacing]:
    """Shape, scale and offset of the grid of MONAI's `Spacing`, in its order of operations.

    A voxel size within 0.001 mm of the wanted one is kept. The centres of the first voxels
    coincide where the axes are at right angles to about 1e-10. Those of oblique scans rarely are,
    as NIfTI stores single precision; there, `compute_shape_offset` makes half the number of voxels
    of both grids coincide instead. An image is not resampled if that would change next to nothing.
    """
    own = np.linalg.norm(affine[:3, :3], axis=0)
    wanted = np.where(np.abs(own - spacing_mm) <= _SAME, own, spacing_mm)
    upper = np.linalg.cholesky(affine[:3, :3].T @ affine[:3, :3]).T
    grid = np.eye(4)
    grid[:3, :3] = affine[:3, :3] @ np.linalg.inv(upper) @ np.diag(wanted)
    ends = np.meshgrid(*[(0.0, size - 1.0) for size in shape], [1.0], indexing="ij")
    corners = np.linalg.solve(grid, affine) @ np.reshape(ends, (4, -1))
    target = np.round(np.ptp(corners[:3], axis=1) + 1).astype(int)
    half = np.array([*(np.array(shape) / 2), 1.0])
    if np.allclose((corners - corners[:, :1])[:3].min(axis=1), 0):
        grid[:3, 3] = affine[:3, 3]
    else:
        grid[:3, 3] = (affine @ half)[:3] - grid[:3, :3] @ (target / 2)
    step = np.linalg.solve(affine, grid)
    same = np.allclose(affine, grid, atol=_SAME) or np.allclose(step, np.eye(4), atol=_SAME)
    if same and target.tolist() == list(shape):
        step = np.eye(4)
    (i, j, k), (x, y, z) = np.diag(step)[:3].tolist(), step[:3, 3].tolist()
    return shape_of(target.tolist()), (i, j, k), (x, y, z)


def separate_axis(
    current_mm: Sequence[float], wanted_mm: Sequence[float], above: float
) -> int | None:
    """Axis that is resampled apart from the others; None for none.

    It is the axis of the largest voxel edge of the first of both grids whose edges differ by more
    than the factor `above`, unless two axes have that edge: nnU-Net's
    `determine_do_sep_z_and_axis`.
    """
    for spacing in (np.array(current_mm), np.array(wanted_mm)):
        if spacing.max() / spacing.min() > above:
            largest = np.flatnonzero(spacing.max() / spacing == 1)
            return int(largest[0]) if len(largest) == 1 else None
    return None


@dataclass(frozen=True)
class Sampling:
    """Positions of the voxels of one grid in another: `scale * index + offset` along each axis.

    Attributes:
        source: Number of voxels of the source along X, Y and Z.
        target: Number of voxels of the target along X, Y and Z.
        scale: Distance of neighbouring voxels of the target, in voxels of the source.
        offset: Position of the target's first voxel, in voxels of the source.
        separate: Axis resampled by the nearest neighbour; None for none.
        separate_back: The same for the sampling from the target back to the source.
        aligned_faces: Whether the outer faces of both grids coincide.
    """

    source: Shape
    target: Shape
    scale: Spacing
    offset: Spacing
    separate: int | None = None
    separate_back: int | None = None
    aligned_faces: bool = True

    @property
    def changes(self) -> bool:
        """Whether any voxel of the target is not one of the source."""
        moved = not self.aligned_faces and any(self.offset)
        return self.source != self.target or moved or any(s != 1 for s in self.scale)

    def inverse(self) -> Sampling:
        """Sampling from the target back to the source."""
        scale = tuple(1 / s for s in self.scale)
        offset = tuple(-o / s for o, s in zip(self.offset, self.scale, strict=True))
        x, y, z = zip(scale, offset, strict=True)
        return Sampling(
            source=self.target,
            target=self.source,
            scale=(x[0], y[0], z[0]),
            offset=(x[1], y[1], z[1]),
            separate=self.separate_back,
            separate_back=self.separate,
            aligned_faces=self.aligned_faces,
        )

    def positions(self, axis: int) -> NDArray[np.float64]:
        """Position in the source of each voxel of the target, clipped to the source's voxels."""
        size = self.source[axis]
        index = np.arange(self.target[axis])
        if self.aligned_faces:  # in the order of operations of scipy and skimage
            return np.clip(size / self.target[axis] * (index + 0.5) - 0.5, 0, size - 1)
        return np.clip(self.scale[axis] * index + self.offset[axis], 0, size - 1)

    def taps(self, axis: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
        """Linear interpolation along an axis: both source indices, and the second's weight."""
        at = self.positions(axis)
        if axis == self.separate:
            nearest = np.floor(at + 0.5).astype(np.intp)
            return nearest, nearest, np.zeros(len(at))
        first = np.floor(at).astype(np.intp)
        second = np.minimum(first + 1, self.source[axis] - 1)
        return first, second, at - first


def resample(array: NDArray[Any], shape: Sequence[int], nearest: bool = False) -> NDArray[Any]:
    """Resample an array `(X, Y, Z)` to `shape` over the same extent; the dtype is preserved."""
    if array.shape == tuple(shape):
        return array
    return _zoom(array, shape, 0 if nearest else 1)


def _zoom(array: NDArray[Any], shape: Sequence[int], order: int) -> NDArray[Any]:
    from scipy import ndimage  # slow import that most models do not need

    factors = [wanted / own for wanted, own in zip(shape, array.shape, strict=True)]
    return np.asarray(ndimage.zoom(array, factors, order=order, mode="nearest", grid_mode=True))


def _resize(array: NDArray[np.float64], shape: Sequence[int], order: int) -> NDArray[np.float64]:
    """`skimage.transform.resize` with mode `edge` and without smoothing."""
    if array.shape == tuple(shape):
        return array
    resized = _zoom(array, shape, order)
    return np.clip(resized, array.min(), array.max(), out=resized) if order > 1 else resized


def resample_image(channel: NDArray[Any], sampling: Sampling, grid: Grid) -> NDArray[Any]:
    """Resample a channel `(X, Y, Z)` to a grid.

    Returns:
        Float32, except that linear interpolation over the same extent preserves the dtype.
    """
    if not sampling.changes:
        return channel
    if grid.alignment == "centres":
        return _at_centres(channel, sampling, grid.order)
    if grid.order == 1 and sampling.separate is None:
        return resample(channel, sampling.target)
    values, axis = channel.astype(np.float64), sampling.separate
    if axis is None:
        return _resize(values, sampling.target, grid.order).astype(np.float32)
    plane = [size for own, size in enumerate(sampling.target) if own != axis]
    planes = np.stack([_resize(p, plane, grid.order) for p in np.moveaxis(values, axis, 0)])
    if len(planes) != sampling.target[axis]:
        planes = planes[sampling.taps(axis)[0]]
    return np.moveaxis(planes, 0, axis).astype(np.float32)


def _at_centres(channel: NDArray[Any], sampling: Sampling, order: int) -> NDArray[Any]:
    """Resample a channel at the positions of a sampling; edges are repeated."""
    from scipy import ndimage

    values = ndimage.affine_transform(
        channel.astype(np.float64),
        sampling.scale,
        sampling.offset,
        output_shape=sampling.target,
        order=order,
        mode="nearest",
    )
    return np.asarray(values).astype(np.float32)


def resample_volume(volume: Volume, grid: Grid | None) -> Volume:
    """Resample `volume` to `grid`; returned unchanged if `grid` is None."""
    if grid is None:
        return volume
    sampling = grid.sampling(volume.shape, volume.spacing_mm, volume.affine)
    step = np.diag([*sampling.scale, 1.0])
    step[:3, 3] = sampling.offset  # centre of the first voxel
    channels = [resample_image(channel, sampling, grid) for channel in volume.channels]
    return replace(volume, channels=channels, affine=volume.affine @ step)
