"""Reading of volumes from NIfTI files, and encoding of labels.

Reading is strict: sizes and values are validated before use. Channels may be stored in different
axis orders of one space; they are turned to that of the first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip
from numpy.typing import NDArray

from attnseg.runtime.case.content import read_content, read_start
from attnseg.runtime.case.header import Header, parse_header
from attnseg.runtime.case.volume import Affine, Volume, check_finite, corner_distance_mm
from attnseg.runtime.errors import VolumeError
from attnseg.runtime.geometry import AxisTransform, orientation_of
from attnseg.runtime.threads import in_threads

LABEL_DESCRIPTION = b"attnseg labels"
"""Value of the header field `descrip` in label files."""
_PROBABILITY_DESCRIPTION = b"attnseg probabilities"
SAME_GRID = 0.1
"""Largest distance between two grids that count as one, in voxels, at the farthest corner."""


@dataclass(frozen=True)
class _Image:
    path: Path
    array: NDArray[Any]
    affine: Affine
    header: nib.Nifti1Header
    sha256: str
    warnings: tuple[str, ...]


def _read_image(path: Path, volumes: int = 1) -> _Image:
    """Read the image of a file: `(X, Y, Z)`, or `(X, Y, Z, volumes)` if `volumes` > 1."""
    content = read_content(path)
    header = content.header
    array = _voxels(path, content.data, header, volumes)
    check_finite(path, array)
    return _Image(path, array, header.affine, header.stored, content.sha256, header.warnings)


def _voxels(path: Path, data: bytes, header: Header, volumes: int) -> NDArray[Any]:
    """Scaled voxels in the memory order of the file; a view of `data` if possible."""
    shape, dtype = header.shape, header.dtype
    if volumes > 1 and shape[3:] != (volumes,):
        raise VolumeError(
            f"{path}: shape {shape} is not one 4-D image of {volumes} volumes, which the model "
            "takes as its channels"
        )
    if len(shape) != 3 + (volumes > 1) or min(shape) < 1:
        raise VolumeError(
            f"{path}: shape {shape} is not a 3-D image", "save one volume per file, with three axes"
        )
    if dtype.kind not in "iuf":
        raise VolumeError(f"{path}: voxels of type {dtype} are not real numbers", "convert them")
    array = np.frombuffer(data, dtype, math.prod(shape), header.offset).reshape(shape, order="F")
    if header.scaled:
        with np.errstate(over="ignore", invalid="ignore"):  # check_finite reports them
            array = np.multiply(array, np.float32(header.slope), dtype=header.read_dtype)
            array += np.float32(header.intercept)
    elif not dtype.isnative:
        array = array.astype(header.read_dtype, order="K")
    return array


def _turned(image: _Image, first: _Image) -> _Image:
    """The 3-D image in the axis order of `first`."""
    transform = AxisTransform.between(orientation_of(image.affine), orientation_of(first.affine))
    affine = image.affine @ transform.matrix(image.array.shape)
    return replace(image, array=transform.apply(image.array), affine=affine)


def _distance_mm(image: _Image, first: _Image) -> float:
    """Largest distance between two grids, infinite if their shapes differ."""
    if image.array.shape != first.array.shape:
        return math.inf
    return corner_distance_mm(first.array.shape, first.affine, image.affine)


def _on_grid_of(image: _Image, first: _Image) -> _Image:
    """The 3-D image in the axis order of `first`, on whose grid it must be."""
    voxel_mm = float(np.linalg.norm(first.affine[:3, :3], axis=0).min())
    if _distance_mm(image, first) <= SAME_GRID * voxel_mm:
        return image
    turned = _turned(image, first)
    distance_mm = _distance_mm(turned, first)
    if distance_mm <= SAME_GRID * voxel_mm:
        return turned
    if distance_mm == math.inf:
        raise VolumeError(
            f"{image.path}: shape {image.array.shape} differs from {first.array.shape} of "
            f"{first.path.name}",
            "resample both to one grid",
        )
    doubts = "".join(f"; it {warning}" for warning in image.warnings)
    raise VolumeError(
        f"{image.path}: its grid is up to {distance_mm:.3g} mm away from that of "
        f"{first.path.name}, more than {SAME_GRID:g} of a voxel{doubts}",
        "register both to one grid",
    )


def _warnings(images: Sequence[_Image]) -> tuple[str, ...]:
    """Warnings of all files; one that several files share is stated once."""
    files: dict[str, list[str]] = {}
    for image in images:
        for warning in image.warnings:
            files.setdefault(warning, []).append(image.path.name)
    return tuple(
        f"{names[0]}{_and_others(len(set(names)) - 1)} {warning}"
        for warning, names in files.items()
    )


def _and_others(count: int) -> str:
    return f" (the same in {count} other file{'s' if count > 1 else ''})" if count else ""


def read_volume(paths: Sequence[Path], threads: int = 2) -> Volume:
    """Read one file per channel.

    Args:
        paths: `.nii` or `.nii.gz` files in channel order. A file listed several times is 4-D,
            and its volumes are those channels.
        threads: Number of files read concurrently.

    Returns:
        Volume with the dtype of the files, float if the header specifies scaling, on the grid and
        in the axis order of the first file.

    Raises:
        VolumeError: A file is missing, truncated, damaged or not 3-D, holds NaN or infinite
            voxels or only zeros, or is on another grid than the first file.
        ResourceError: No thread can be started.
    """
    volumes = Counter(paths)
    found = in_threads(lambda path: _read_image(path, volumes[path]), volumes, threads)
    read = dict(zip(volumes, found, strict=True))
    images: list[_Image] = []
    for index, path in enumerate(paths):
        image = read[path]
        if volumes[path] > 1:
            image = replace(image, array=image.array[..., list(paths[:index]).count(path)])
        images.append(_on_grid_of(image, images[0] if images else image))
        if not image.array.any():
            raise VolumeError(f"{path}: holds only zeros", "check that the right file was given")
    return Volume(
        [i.array for i in images],
        images[0].affine,
        images[0].header,
        tuple(path.name for path in paths),
        tuple(i.sha256 for i in images),
        _warnings(images),
        checked=True,
    )


def read_affine(path: Path) -> Affine:
    """Read the `(4, 4)` affine from the header of a file.

    Raises:
        VolumeError: The header cannot be read, or the affine is singular or not finite.
    """
    return parse_header(path, read_start(path)).affine


def read_labels(path: Path, scan: Path | None = None, scan_volumes: int = 1) -> Volume:
    """Read a label file as a volume of one channel; all labels may be 0.

    Args:
        path: Label file, `.nii` or `.nii.gz`.
        scan: Scan file whose grid the labels must share, and to whose axis order they are turned;
            None to skip this check.
        scan_volumes: Number of volumes in the scan file; more than one if it is 4-D.

    Raises:
        VolumeError: A file is invalid (see `read_volume`), or the two grids differ.
    """
    labels = _read_image(path)
    if scan is not None:
        image = _read_image(scan, scan_volumes)
        first = image.array if scan_volumes == 1 else image.array[..., 0]
        labels = _on_grid_of(labels, replace(image, array=first))
    return Volume(
        [labels.array],
        labels.affine,
        labels.header,
        (path.name,),
        (labels.sha256,),
        _warnings([labels]),
        checked=True,
    )


def encode_labels(labels: NDArray[np.uint8], volume: Volume) -> bytes:
    """Encode `labels`, `(X, Y, Z)` uint8 on the grid of `volume`, as a gzipped NIfTI file.

    Affines, orientation codes, voxel sizes and units are copied byte by byte from the header of the
    volume's file. Texts and extensions, which may identify a patient, are not copied.
    """
    return _encode(labels, volume, LABEL_DESCRIPTION)


def encode_probabilities(probabilities: NDArray[np.float32], volume: Volume) -> bytes:
    """Encode probabilities `(R, X, Y, Z)` on the grid of `volume` as a gzipped 4-D NIfTI file.

    The fourth axis of the file is that of the R regions. See `encode_labels` for the header.
    """
    return _encode(np.moveaxis(probabilities, 0, -1), volume, _PROBABILITY_DESCRIPTION)


def _encode(array: NDArray[Any], volume: Volume, description: bytes) -> bytes:
    header = _result_header(array, volume)
    header["descrip"] = description
    padding = bytes(header.single_vox_offset - header.sizeof_hdr)
    stored = header.binaryblock + padding + array.tobytes(order="F")
    # No time stamp, so that the output is deterministic.
    return bytes(igzip.compress(stored, compresslevel=1, mtime=0))


def _result_header(array: NDArray[Any], volume: Volume) -> nib.Nifti1Header:
    """Header of a file with an array `(X, Y, Z)` or `(X, Y, Z, R)` on the grid of a volume.

    The stored header is not repaired: a program that reads it in another way places the labels
    where it places the scan.
    """
    if volume.header is None:
        return nib.Nifti1Image(array, volume.affine).header  # with its sizes and affine
    header: nib.Nifti1Header = volume.header.copy()
    sizes = (*array.shape, 1, 1, 1, 1)[:7]
    header["dim"] = [array.ndim, *sizes]  # `set_data_shape` changes voxel sizes too
    header.set_data_dtype(array.dtype)
    for text in {"data_type", "db_name", "intent_name", "aux_file", "unused_str"} & set(header):
        header[text] = b""
    header["cal_max"] = header["cal_min"] = 0
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["vox_offset"], header["magic"] = header.single_vox_offset, header.single_magic
    return header
