"""Volume: the channels of one case on one grid, from files or from arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.errors import VolumeError
from attnseg.runtime.geometry import AxisTransform, orientation_of

if TYPE_CHECKING:
    import nibabel as nib

Affine = NDArray[np.float64]
"""`(4, 4)` float64 matrix from voxel to world coordinates in mm, RAS+ as in NIfTI."""
_LARGEST_AFFINE = 1e9  # mm, after a conversion from metres
_LEAST_DETERMINANT = 1e-3  # of axes of length 1: those of a volume are nearly at right angles
_ROUNDING = 1e-6  # of the norm of an axis, whose numbers are float32
_REPAIR = "repair the header"
Channels = Sequence[NDArray[Any]] | NDArray[Any]
"""C arrays `(X, Y, Z)`, or one array `(C, X, Y, Z)`."""


@dataclass(frozen=True)
class Volume:
    """All channels of one case, on one grid.

    Attributes:
        channels: C arrays `(X, Y, Z)` of any real dtype, or one array `(C, X, Y, Z)`, in the
            model's channel order. Trailing axes of one voxel are dropped.
        affine: `(4, 4)` matrix from voxel to world coordinates in mm, RAS+ as in NIfTI.
        header: Header of the first channel's file as stored, from which results copy the
            geometry; None for volumes created from arrays.
        files: Name of each channel's file, for messages; empty for arrays.
        sha256: SHA-256 of each channel's file as stored; empty for arrays.
        warnings: Warnings about the files, for readers of the result.
        checked: Whether all voxels are known to be finite, as for volumes read from files.

    Raises:
        VolumeError: There is no channel, or the affine is not a matrix of numbers.
    """

    channels: Channels
    affine: Affine
    header: nib.Nifti1Header | None = None
    files: tuple[str, ...] = ()
    sha256: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    checked: bool = False

    def __post_init__(self) -> None:
        if not _has_items(self.channels):
            kind = type(self.channels).__name__
            raise VolumeError(f"channels: expected arrays (X, Y, Z), got {kind} without any")
        object.__setattr__(self, "channels", _without_axes_of_one(self.channels))
        object.__setattr__(self, "affine", _as_affine(self.affine))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels along X, Y and Z."""
        x, y, z = self.channels[0].shape
        return x, y, z

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along X, Y and Z in millimetres.

        NIfTI rounds the affine to single precision. A size of the affine that the header states
        (`pixdim`) up to that rounding is taken as stated, as SimpleITK and nnU-Net take it.
        """
        sizes = np.linalg.norm(self.affine[:3, :3], axis=0)
        if self.header is not None:
            stated = np.asarray(self.header["pixdim"][1:4], np.float64)
            nearest = stated[np.abs(stated[:, None] - sizes).argmin(axis=0)]
            sizes = np.where(np.abs(nearest - sizes) <= _ROUNDING * sizes, nearest, sizes)
        x, y, z = sizes.tolist()
        return x, y, z

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000

    @property
    def orientation(self) -> str:
        """Axis codes of X, Y and Z, such as `LPS`; see `geometry`."""
        return orientation_of(self.affine)

    def oriented(self, orientation: str) -> Self:
        """Volume in another orientation; its channels are views, no voxel is copied."""
        transform = AxisTransform.between(self.orientation, orientation)
        return replace(
            self,
            channels=[transform.apply(channel) for channel in self.channels],
            affine=self.affine @ transform.matrix(self.shape),
        )


def _has_items(channels: object) -> bool:
    try:
        return len(channels) > 0  # type: ignore[arg-type]
    except TypeError:
        return False


def _without_axes_of_one(channels: Any) -> Any:
    """Channels without trailing axes of one voxel beyond Z, such as those of `(X, Y, Z, 1)`."""

    def trimmed(array: Any, axes: int) -> Any:
        while isinstance(array, np.ndarray) and array.ndim > axes and array.shape[-1] == 1:
            array = array[..., 0]
        return array

    if isinstance(channels, np.ndarray):
        return trimmed(channels, 4)
    if isinstance(channels, (list, tuple)):
        return [trimmed(channel, 3) for channel in channels]
    return channels


def _as_affine(affine: object) -> Affine:
    try:
        if np.iscomplexobj(np.asarray(affine)):
            raise TypeError("its imaginary part would be lost")
        return np.asarray(affine, np.float64)
    except (TypeError, ValueError) as error:
        raise VolumeError(
            f"volume: its affine must be (4, 4) numbers, got {type(affine).__name__}"
        ) from error


def corner_distance_mm(shape: Sequence[int], first: Affine, second: Affine) -> float:
    """Largest distance of the corner voxels of a grid of `shape` between two affines, in mm."""
    corners = np.stack(np.meshgrid(*((0, size - 1) for size in shape), [1], indexing="ij"))
    moved = (first - second)[:3] @ corners.reshape(4, -1)
    return float(np.linalg.norm(moved, axis=0).max())


def check_affine(name: object, affine: Affine) -> None:
    """Raise `VolumeError` unless an affine is `(4, 4)`, finite and non-singular."""
    if np.shape(affine) != (4, 4):
        raise VolumeError(f"{name}: its affine must be (4, 4), got {np.shape(affine)}")
    if not np.isfinite(affine).all() or np.abs(affine).max() > _LARGEST_AFFINE:
        raise VolumeError(f"{name}: its affine is not finite or absurdly large", _REPAIR)
    axes = affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    if not lengths.all() or abs(np.linalg.det(axes / lengths)) < _LEAST_DETERMINANT:
        raise VolumeError(f"{name}: its affine is singular: its axes do not span space", _REPAIR)
    if not np.array_equal(affine[3], (0, 0, 0, 1)):
        raise VolumeError(f"{name}: its affine must end in the row 0, 0, 0, 1", _REPAIR)


def check_finite(name: object, array: NDArray[Any]) -> None:
    """Raise `VolumeError` if a voxel is NaN, infinite or beyond the range of float32."""
    if array.dtype.kind != "f":
        return
    finite = np.isfinite(array)
    if not finite.all():
        count = finite.size - np.count_nonzero(finite)
        where = tuple(int(i) for i in np.unravel_index(int(finite.argmin()), finite.shape))
        raise VolumeError(
            f"{name}: {count} voxels are NaN or infinite, the first at {where}",
            "replace them",
        )
    if array.dtype.itemsize <= 4:
        return
    largest = max(float(array.max()), -float(array.min()))  # without a copy of the image
    if largest > float(np.finfo(np.float32).max):
        raise VolumeError(
            f"{name}: holds values up to {largest:.3g}, beyond the range of float32",
            "scale the image",
        )


def check_volume(volume: Volume) -> None:
    """Apply the checks of file readers to a volume of numpy arrays.

    Raises:
        VolumeError: The channels are not 3-D arrays of one shape, hold NaN or infinite voxels, or
            the affine is singular or not finite.
    """
    for index, channel in enumerate(volume.channels):
        name = f"channel {index + 1}"
        if not isinstance(channel, np.ndarray):
            raise VolumeError(f"{name}: expected a numpy array, got {type(channel).__name__}")
        if channel.ndim != 3 or min(channel.shape) < 1 or channel.dtype.kind not in "iuf":
            raise VolumeError(
                f"{name}: expected a 3-D array (X, Y, Z) of real numbers, got {channel.shape} of "
                f"{channel.dtype}"
            )
        if isinstance(channel, np.ma.MaskedArray):
            raise VolumeError(f"{name}: is a masked array", "fill the masked voxels")
        if channel.shape != volume.shape:
            raise VolumeError(
                f"{name}: shape {channel.shape} differs from {volume.shape} of channel 1"
            )
        if not volume.checked:
            check_finite(name, channel)
    check_affine("volume", volume.affine)
