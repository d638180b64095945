"""Reading of volumes from NIfTI files, and encoding of labels.

Reading is strict, because a truncated scan yields a plausible but wrong segmentation: gzip
streams are checked to the last byte and CRC, and sizes and values are validated before use.
The format is NIfTI-1/2 (https://nifti.nimh.nih.gov); gzip is (de)compressed with ISA-L.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from nibabel.imageglobals import LoggingOutputSuppressor
from numpy.typing import NDArray

from attnseg.runtime.case.volume import Affine, Volume, check_affine, check_finite
from attnseg.runtime.errors import VolumeError

LABEL_DESCRIPTION = b"attnseg labels"
"""Value of the header field `descrip` in label files."""
_AFFINE_TOLERANCE_MM = 1e-3
_GZIP_MAGIC = b"\x1f\x8b"
_HEADER_BYTES = 1 << 16  # header, with room for extensions


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
            raise VolumeError(f"{path}: is not a gzip file", "copy or download it again")
        return data
    try:
        return bytes(igzip.decompress(data))  # type: ignore[no-untyped-call]
    except (EOFError, OSError, isal_zlib.error) as error:  # type: ignore[misc]
        raise VolumeError(
            f"{path}: the gzip stream is truncated or damaged ({error})",
            "copy or download it again",
        ) from error


@dataclass(frozen=True)
class _Layout:
    """Position, type and scaling of the voxels, as stated in the header."""

    header: nib.Nifti1Header
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    intercept: float
    affine: Affine


def _parse_header(path: Path, data: bytes) -> _Layout:
    """Parse a header of NIfTI-1 or NIfTI-2, as determined by its size field."""
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
                shape=tuple(int(size) for size in header.get_data_shape()),
                dtype=header.get_data_dtype(),
                offset=int(header.get_data_offset()),
                slope=1.0 if slope is None else float(slope),
                intercept=0.0 if intercept is None else float(intercept),
                affine=np.asarray(header.get_best_affine(), np.float64),
            )
    except (
        nib.spatialimages.HeaderDataError,
        nib.wrapstruct.WrapStructError,
        ValueError,
        TypeError,
        OverflowError,
        KeyError,
    ) as error:  # nibabel uses some fields before it validates them
        reason = " ".join(str(error).split())
        raise VolumeError(
            f"{path}: its NIfTI header is damaged ({reason})", "copy or download it again"
        ) from error
    if header["magic"].item()[:3] != magic:
        raise VolumeError(f"{path}: header and image are two files", "convert it to one .nii.gz")
    return layout


def _header_warnings(path: Path, header: nib.Nifti1Header) -> tuple[str, ...]:
    warnings = []
    if header["qform_code"] == 0 and header["sform_code"] == 0:
        warnings.append(f"{path.name} states no orientation (qform and sform codes are 0)")
    code = int(header["xyzt_units"]) & 7  # the unit of space; nibabel fails on undefined codes
    if code not in (0, 2):  # unknown, mm
        unit = {1: "meter", 3: "micron"}.get(code, f"undefined code {code}")
        warnings.append(f"{path.name} states its unit as {unit}; mm is assumed")
    return tuple(warnings)


def _read_image(path: Path, volumes: int = 1) -> _Image:
    """Read the image of a file: `(X, Y, Z)`, or `(X, Y, Z, volumes)` if `volumes` > 1."""
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise VolumeError(f"{path}: cannot be read ({error.strerror})") from error
    data = _inflate(path, stored)
    layout = _parse_header(path, data)
    array = _voxels(path, data, layout, volumes)
    check_finite(path, array)
    check_affine(path, layout.affine)
    checksum = hashlib.sha256(stored).hexdigest()
    warnings = _header_warnings(path, layout.header)
    return _Image(array, layout.affine, layout.header, checksum, warnings)


def _voxels(path: Path, data: bytes, layout: _Layout, volumes: int) -> NDArray[Any]:
    """Scaled voxels in the memory order of the file; a view of `data` if possible."""
    shape, dtype = layout.shape, layout.dtype
    if volumes > 1 and shape[3:] != (volumes,):
        raise VolumeError(
            f"{path}: shape {shape} is not one 4-D image of {volumes} volumes, which the model "
            "takes as its channels"
        )
    if len(shape) != 3 + (volumes > 1) or min(shape) < 2:
        raise VolumeError(
            f"{path}: shape {shape} is not a 3-D image", "save one volume per file, with three axes"
        )
    if dtype.kind not in "iuf":
        raise VolumeError(f"{path}: voxels of type {dtype} are not real numbers", "convert them")
    size = math.prod(shape) * dtype.itemsize
    if layout.offset < layout.header.sizeof_hdr or len(data) < layout.offset + size:
        raise VolumeError(
            f"{path}: has {len(data)} bytes, its header promises {layout.offset + size}",
            "copy or download it again",
        )
    array = np.frombuffer(data, dtype, math.prod(shape), layout.offset).reshape(shape, order="F")
    if not dtype.isnative:
        array = array.astype(dtype.newbyteorder("="), order="K")
    if (layout.slope, layout.intercept) != (1.0, 0.0):
        with np.errstate(over="ignore", invalid="ignore"):  # check_finite reports them
            array = array * np.float32(layout.slope) + np.float32(layout.intercept)
    return array


def _check_same_grid(first: Path, image: _Image, path: Path, other: _Image) -> None:
    if other.array.shape != image.array.shape:
        raise VolumeError(
            f"{path}: shape {other.array.shape} differs from {image.array.shape} of {first.name}",
            "resample both to one grid",
        )
    if not np.allclose(other.affine, image.affine, atol=_AFFINE_TOLERANCE_MM):
        raise VolumeError(
            f"{path}: its affine differs from that of {first.name}", "register both to one grid"
        )


def read_volume(paths: Sequence[Path], threads: int = 2) -> Volume:
    """Read one file per channel.

    Args:
        paths: `.nii` or `.nii.gz` files in channel order. A file listed several times is 4-D,
            and its volumes are those channels.
        threads: Number of files read concurrently.

    Returns:
        Volume with the dtype and memory order of the files; float if the header specifies
        scaling.

    Raises:
        VolumeError: A file is missing, truncated, damaged or not 3-D, holds NaN or infinite
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
            raise VolumeError(f"{path}: holds only zeros", "check that the right file was given")
    return Volume(
        [i.array for i in images],
        images[0].affine,
        images[0].header,
        tuple(i.sha256 for i in images),
        tuple(dict.fromkeys(w for i in images for w in i.warnings)),
        checked=True,
    )


def read_affine(path: Path) -> Affine:
    """Read the `(4, 4)` affine from the header of a file.

    Raises:
        VolumeError: The header cannot be read, or the affine is singular or not finite.
    """
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == _GZIP_MAGIC
        with igzip.open(path) if zipped else path.open("rb") as stream:  # type: ignore[no-untyped-call]
            start = stream.read(_HEADER_BYTES)
    except (OSError, EOFError, isal_zlib.error) as error:  # type: ignore[misc]
        raise VolumeError(f"{path}: cannot be read ({error})") from error
    affine = _parse_header(path, bytes(start)).affine
    check_affine(path, affine)
    return affine


def read_labels(path: Path, scan: Path | None = None, scan_volumes: int = 1) -> Volume:
    """Read a label file as a volume of one channel; all labels may be 0.

    Args:
        path: Label file, `.nii` or `.nii.gz`.
        scan: Scan file whose grid the labels must share; None to skip this check.
        scan_volumes: Number of volumes in the scan file; more than one if it is 4-D.

    Raises:
        VolumeError: A file is invalid (see `read_volume`), or the two grids differ.
    """
    labels = _read_image(path)
    if scan is not None:
        image = _read_image(scan, scan_volumes)
        first = image.array if scan_volumes == 1 else image.array[..., 0]
        _check_same_grid(scan, replace(image, array=first), path, labels)
    return Volume([labels.array], labels.affine, labels.header, (labels.sha256,), labels.warnings)


def _label_header(volume: Volume) -> nib.Nifti1Header:
    """Header of `volume` without texts and extensions, which may identify a patient."""
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
    """Encode `labels`, `(X, Y, Z)` uint8 on the grid of `volume`, as a gzipped NIfTI file.

    Affines, orientation codes and units are copied bit-exactly from the volume's header.
    """
    header = _label_header(volume)
    header.set_data_dtype(np.uint8)
    header["descrip"] = LABEL_DESCRIPTION
    kind: Any = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    affine = None if volume.header is not None else volume.affine
    stored: bytes = kind(labels, affine, header).to_bytes()
    # No time stamp, so that the output is deterministic.
    return bytes(igzip.compress(stored, compresslevel=1, mtime=0))
