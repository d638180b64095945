"""Volume: the channels of one case, read from NIfTI and written back.

Reading is strict, because a half-read scan gives a plausible but wrong segmentation: gzip
streams are checked to their last byte and CRC, sizes and values are checked before use.
The format is NIfTI-1/2 (https://nifti.nimh.nih.gov); gzip runs through ISA-L.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt2axcodes,
    ornt_transform,
)
from numpy.typing import NDArray

from attnseg.runtime.errors import VolumeError

Affine = NDArray[np.float64]
Channels = Sequence[NDArray[Any]] | NDArray[Any]
"""C arrays `(X, Y, Z)`, or one array `(C, X, Y, Z)`."""
LABEL_DESCRIPTION = b"attnseg labels"
"""What the header of every label file written here says."""
_AFFINE_TOLERANCE_MM = 1e-3
_GZIP_MAGIC = b"\x1f\x8b"
_HEADER_BYTES = 1 << 16  # room for extensions


@dataclass(frozen=True)
class Volume:
    """All channels of one case, on one grid.

    Attributes:
        channels: C arrays `(X, Y, Z)` of any real dtype, or one array `(C, X, Y, Z)`, in the
            order that the model takes.
        affine: `(4, 4)` voxel to world, in mm, RAS+ as in NIfTI.
        header: header of the first channel's file, kept so that results carry the same
            orientation codes; None for arrays that came from no file.
        sha256: checksum of each channel's file as stored, empty for arrays.
        warnings: what a reader should know of the files.
    """

    channels: Channels
    affine: Affine
    header: nib.Nifti1Header | None = None
    sha256: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along X, Y and Z."""
        x, y, z = self.channels[0].shape
        return x, y, z

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along X, Y and Z."""
        x, y, z = (float(v) for v in np.linalg.norm(self.affine[:3, :3], axis=0))
        return x, y, z

    @property
    def orientation(self) -> str:
        """Directions in which X, Y and Z grow, such as `LPS`."""
        return "".join(ornt2axcodes(io_orientation(self.affine)))

    def oriented(self, orientation: str) -> Self:
        """The same volume with flipped and swapped axes; views, no voxel is copied."""
        turn = _turn(self.orientation, orientation)
        affine = self.affine @ inv_ornt_aff(turn, self.shape)
        channels = [apply_orientation(c, turn) for c in self.channels]
        return type(self)(channels, affine, self.header, self.sha256, self.warnings)


def _turn(source: str, target: str) -> NDArray[np.float64]:
    return np.asarray(ornt_transform(axcodes2ornt(source), axcodes2ornt(target)))


def reorient(array: NDArray[Any], source: str, target: str) -> NDArray[Any]:
    """View of `array` `(X, Y, Z)` in orientation `source`, turned to `target`."""
    return np.asarray(apply_orientation(array, _turn(source, target)))


def turned_strides(
    shape: Sequence[int], strides: Sequence[int], source: str, target: str
) -> tuple[int, tuple[int, int, int], tuple[int, int, int]]:
    """What `reorient` does to an array, without the array.

    Args:
        shape: X, Y, Z.
        strides: steps along X, Y and Z.
        source: orientation of the array.
        target: orientation wanted.

    Returns:
        Steps from element (0, 0, 0) of the array to that of the view; its shape; its strides.
    """
    offset, sizes, steps = 0, [0, 0, 0], [0, 0, 0]
    for axis, (place, direction) in enumerate(_turn(source, target).astype(int).tolist()):
        sizes[place], steps[place] = shape[axis], direction * strides[axis]
        if direction < 0:
            offset += strides[axis] * (shape[axis] - 1)
    return offset, (sizes[0], sizes[1], sizes[2]), (steps[0], steps[1], steps[2])


@dataclass(frozen=True)
class _Image:
    array: NDArray[Any]
    affine: Affine
    header: nib.Nifti1Header
    sha256: str
    warnings: tuple[str, ...]


def _inflate(path: Path, data: bytes) -> bytes:
    if data[:2] != _GZIP_MAGIC:
        if path.name.endswith(".gz"):
            raise VolumeError(f"{path}: is not a gzip file; copy or download it again")
        return data
    try:
        return bytes(igzip.decompress(data))  # type: ignore[no-untyped-call]
    except (EOFError, OSError, isal_zlib.error) as error:  # type: ignore[misc]
        raise VolumeError(
            f"{path}: the gzip stream is truncated or damaged ({error}); copy or download it again"
        ) from error


@dataclass(frozen=True)
class _Layout:
    """What a header says of the voxels behind it."""

    header: nib.Nifti1Header
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    intercept: float
    affine: Affine


def _parse_header(path: Path, data: bytes) -> _Layout:
    """The layout by the NIfTI version that the header's size names."""
    versions = {348: (nib.Nifti1Header, b"n+1"), 540: (nib.Nifti2Header, b"n+2")}
    size = data[:4]
    kind, magic = versions.get(
        int.from_bytes(size, "little"), versions.get(int.from_bytes(size, "big"), (None, b""))
    )
    if kind is None:
        raise VolumeError(f"{path}: is not a NIfTI image (.nii or .nii.gz)")
    try:
        with LoggingOutputSuppressor():
            header = kind.from_fileobj(io.BytesIO(data))
            slope, intercept = header.get_slope_inter()
            layout = _Layout(
                header,
                tuple(int(size) for size in header.get_data_shape()),
                header.get_data_dtype(),
                int(header.get_data_offset()),
                1.0 if slope is None else float(slope),
                0.0 if intercept is None else float(intercept),
                np.asarray(header.get_best_affine(), np.float64),
            )
    except (
        nib.spatialimages.HeaderDataError,
        nib.wrapstruct.WrapStructError,
        ValueError,
        TypeError,
        OverflowError,
        KeyError,
    ) as error:  # nibabel meets nonsense in a field before it checks it
        reason = " ".join(str(error).split())
        raise VolumeError(
            f"{path}: its NIfTI header is damaged ({reason}); copy or download it again"
        ) from error
    if header["magic"].item()[:3] != magic:
        raise VolumeError(f"{path}: header and image are two files; convert it to one .nii.gz")
    return layout


def _header_warnings(path: Path, header: nib.Nifti1Header) -> tuple[str, ...]:
    warnings = []
    if header["qform_code"] == 0 and header["sform_code"] == 0:
        warnings.append(f"{path.name} states no orientation (qform and sform codes are 0)")
    unit = header.get_xyzt_units()[0]
    if unit not in ("mm", "unknown"):
        warnings.append(f"{path.name} states its unit as {unit}; it was taken for mm")
    return tuple(warnings)


def _check_affine(path: Path | str, affine: Affine) -> None:
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise VolumeError(f"{path}: its affine is singular or not finite; repair the header")


def _check_finite(path: Path | str, array: NDArray[Any]) -> None:
    if array.dtype.kind != "f":
        return
    bad = ~np.isfinite(array)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise VolumeError(
            f"{path}: {np.count_nonzero(bad)} voxels are NaN or infinite, the first at {where}; "
            "replace them"
        )


def _read_image(path: Path, volumes: int = 1) -> _Image:
    """The image of a file, `(X, Y, Z)`, or `(X, Y, Z, volumes)` where several are asked for."""
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise VolumeError(f"{path}: cannot be read ({error.strerror})") from error
    data = _inflate(path, stored)
    layout = _parse_header(path, data)
    array = _voxels(path, data, layout, volumes)
    _check_finite(path, array)
    _check_affine(path, layout.affine)
    checksum = hashlib.sha256(stored).hexdigest()
    warnings = _header_warnings(path, layout.header)
    return _Image(array, layout.affine, layout.header, checksum, warnings)


def _voxels(path: Path, data: bytes, layout: _Layout, volumes: int) -> NDArray[Any]:
    """The scaled voxels, in the memory order of the file; a view where it can be."""
    shape, dtype = layout.shape, layout.dtype
    if volumes > 1 and shape[3:] != (volumes,):
        raise VolumeError(
            f"{path}: shape {shape} is not one 4-D image of {volumes} volumes, which the model "
            "takes as its channels"
        )
    if len(shape) != 3 + (volumes > 1) or min(shape) < 2:
        raise VolumeError(
            f"{path}: shape {shape} is not a 3-D image; save one volume per file, with three axes"
        )
    if dtype.kind not in "iuf":
        raise VolumeError(f"{path}: voxels of type {dtype} are not real numbers; convert them")
    size = math.prod(shape) * dtype.itemsize
    if layout.offset < layout.header.sizeof_hdr or len(data) < layout.offset + size:
        raise VolumeError(
            f"{path}: has {len(data)} bytes, its header promises {layout.offset + size}; "
            "copy or download it again"
        )
    array = np.frombuffer(data, dtype, math.prod(shape), layout.offset).reshape(shape, order="F")
    if not dtype.isnative:
        array = array.astype(dtype.newbyteorder("="), order="K")
    if (layout.slope, layout.intercept) != (1.0, 0.0):
        with np.errstate(over="ignore", invalid="ignore"):  # found as not finite afterwards
            array = array * np.float32(layout.slope) + np.float32(layout.intercept)
    return array


def _check_same_grid(first: Path, image: _Image, path: Path, other: _Image) -> None:
    if other.array.shape != image.array.shape:
        raise VolumeError(
            f"{path}: shape {other.array.shape} differs from {image.array.shape} of "
            f"{first.name}; resample both to one grid"
        )
    if not np.allclose(other.affine, image.affine, atol=_AFFINE_TOLERANCE_MM):
        raise VolumeError(
            f"{path}: its affine differs from that of {first.name}; register both to one grid"
        )


def read_volume(paths: Sequence[Path], threads: int = 2) -> Volume:
    """Read one file per channel.

    Args:
        paths: `.nii` or `.nii.gz`, in channel order. A file that is named several times is
            4-D, and its volumes are those channels.
        threads: files read at the same time.

    Returns:
        The channels in the dtype and memory order of their files; scaled where the header
        says so (floating point then).

    Raises:
        VolumeError: a file is missing, truncated, damaged, not 3-D, holds NaN or infinite
            voxels or only zeros, or its shape or affine differs from the first file's.
    """
    volumes = Counter(paths)
    with ThreadPoolExecutor(threads) as pool:
        read = dict(zip(volumes, pool.map(_read_image, volumes, volumes.values()), strict=True))
    images = []
    for index, path in enumerate(paths):
        image = read[path]
        if volumes[path] > 1:
            image = replace(image, array=image.array[..., list(paths[:index]).count(path)])
        images.append(image)
    for path, image in zip(paths, images, strict=True):
        _check_same_grid(paths[0], images[0], path, image)
        if not image.array.any():
            raise VolumeError(f"{path}: holds only zeros; check that the right file was given")
    return Volume(
        [i.array for i in images],
        images[0].affine,
        images[0].header,
        tuple(i.sha256 for i in images),
        tuple(dict.fromkeys(w for i in images for w in i.warnings)),
    )


def read_affine(path: Path) -> Affine:
    """The `(4, 4)` affine of a file, from its header alone.

    Raises:
        VolumeError: the header cannot be read, or its affine is none.
    """
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == _GZIP_MAGIC
        with igzip.open(path) if zipped else path.open("rb") as stream:  # type: ignore[no-untyped-call]
            start = stream.read(_HEADER_BYTES)
    except (OSError, EOFError, isal_zlib.error) as error:  # type: ignore[misc]
        raise VolumeError(f"{path}: cannot be read ({error})") from error
    affine = _parse_header(path, bytes(start)).affine
    _check_affine(path, affine)
    return affine


def read_labels(path: Path, scan: Path | None = None, scan_volumes: int = 1) -> Volume:
    """Read a label file, which may be empty, as a volume of one channel.

    Args:
        path: `.nii` or `.nii.gz`.
        scan: a file that the labels must share the grid of.
        scan_volumes: that it holds; more than one if it is 4-D.

    Raises:
        VolumeError: as for `read_volume`.
    """
    labels = _read_image(path)
    if scan is not None:
        image = _read_image(scan, scan_volumes)
        first = image.array if scan_volumes == 1 else image.array[..., 0]
        _check_same_grid(scan, replace(image, array=first), path, labels)
    return Volume([labels.array], labels.affine, labels.header, (labels.sha256,), labels.warnings)


def check_volume(volume: Volume) -> None:
    """Check arrays that came from no file as strictly as files are checked.

    Raises:
        VolumeError: channels are not 3-D or of one shape, hold NaN or infinite voxels, or the
            affine is singular or not finite.
    """
    for index, channel in enumerate(volume.channels):
        name = f"channel {index + 1}"
        if not isinstance(channel, np.ndarray):
            raise VolumeError(f"{name}: expected a numpy array, got {type(channel).__name__}")
        if channel.ndim != 3 or min(channel.shape) < 1 or channel.dtype.kind not in "iuf":
            raise VolumeError(f"{name}: expected a 3-D array of real numbers, got {channel.shape}")
        if channel.shape != volume.shape:
            raise VolumeError(
                f"{name}: shape {channel.shape} differs from {volume.shape} of channel 1"
            )
        _check_finite(name, channel)
    check_affine(volume)


def check_affine(volume: Volume) -> None:
    """Check the affine of arrays that came from no file.

    Raises:
        VolumeError: it is not `(4, 4)`, singular or not finite.
    """
    if np.shape(volume.affine) != (4, 4):
        raise VolumeError(f"volume: its affine must be (4, 4), got {np.shape(volume.affine)}")
    _check_affine("volume", volume.affine)


def _label_header(volume: Volume) -> nib.Nifti1Header:
    """Header of `volume` with its geometry alone: texts and extensions may name a patient."""
    if volume.header is None:
        return nib.Nifti1Header()
    header: nib.Nifti1Header = volume.header.copy()
    header.extensions.clear()
    texts = {"data_type", "db_name", "intent_name", "aux_file", "unused_str"}
    for text in texts & set(header.keys()):
        header[text] = b""
    header["cal_max"] = header["cal_min"] = 0
    header.set_slope_inter(1, 0)
    return header


def encode_labels(labels: NDArray[np.uint8], volume: Volume) -> bytes:
    """A gzipped NIfTI file of `labels` `(X, Y, Z)` on the grid of `volume`.

    Affines, orientation codes and units are those of the volume's file, to the bit.
    """
    header = _label_header(volume)
    header.set_data_dtype(np.uint8)
    header["descrip"] = LABEL_DESCRIPTION
    kind: Any = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    affine = None if volume.header is not None else volume.affine
    stored: bytes = kind(labels, affine, header).to_bytes()
    # No time stamp: the same labels give the same bytes.
    return bytes(igzip.compress(stored, compresslevel=1, mtime=0))
