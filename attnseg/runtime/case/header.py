"""NIfTI headers: the layout of the voxels, and the position of the volume in space.

A header may state the position up to three times: by `sform`, by `qform` with `pixdim`, and by
`pixdim` alone. As in nibabel, the first with a code other than 0 counts. Statements that contradict
each other are warned of with both readings, because other programs may follow another one.
The format is NIfTI-1/2 (https://nifti.nimh.nih.gov).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from attnseg.runtime.case.volume import Affine, check_affine, corner_distance_mm
from attnseg.runtime.errors import VolumeError
from attnseg.runtime.geometry import format_size, orientation_of

LONGEST_HEADER = 540  # bytes
_SILENT_DISTANCE = 0.1  # largest difference of qform and sform that needs no warning, in voxels
_SPACING_TOLERANCE = 0.01  # relative
_UNITS = {1: ("meter", 1e3), 2: ("mm", 1.0), 3: ("micron", 1e-3)}
"""Name of each unit of space by its code, and its length in mm."""

# nibabel logs its repairs; those that matter are warnings of the volume.
_SILENT = logging.Logger("nibabel, silent")
_SILENT.addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Header:
    """Content of a NIfTI header that matters for reading.

    Attributes:
        stored: The header as stored, without repairs.
        shape: Number of voxels along each axis, without trailing axes of 1 beyond the third.
        dtype: Type of the stored voxels.
        offset: Position of the first voxel in bytes.
        slope: Factor from stored to real values.
        intercept: Summand from stored to real values.
        affine: `(4, 4)` matrix from voxel to world coordinates in mm.
        warnings: Warnings, without the name of the file.
    """

    stored: nib.Nifti1Header
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    intercept: float
    affine: Affine
    warnings: tuple[str, ...]

    @property
    def scaled(self) -> bool:
        """Whether the real values differ from the stored ones."""
        return (self.slope, self.intercept) != (1.0, 0.0)

    @property
    def read_dtype(self) -> np.dtype[Any]:
        """Type of the voxels as read: in native byte order, and float if they are scaled."""
        native = self.dtype.newbyteorder("=")
        scaled = self.scaled and native.kind in "iuf"
        return np.result_type(native, np.float32) if scaled else native

    @property
    def stored_bytes(self) -> int:
        """Number of bytes from the start of the header to the last voxel."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    @property
    def memory_bytes(self) -> int:
        """Number of bytes that reading takes: stored voxels and, if converted, those as read."""
        converted = self.scaled or not self.dtype.isnative
        read_bytes = math.prod(self.shape) * self.read_dtype.itemsize if converted else 0
        return self.stored_bytes + read_bytes


def parse_header(path: Path, data: bytes) -> Header:
    """Parse the header at the start of `data`, for which `is_header` is true.

    Raises:
        VolumeError: The header is damaged, or its affine is singular or not finite.
    """
    kind, _ = _kind(data)
    assert kind is not None, "is_header was true"
    try:
        # Sizes and positions near the bounds of their types overflow; `check_affine` refuses them.
        with np.errstate(all="ignore"):
            header = _parse(kind(data[: kind.sizeof_hdr], check=False))
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
    check_affine(path, header.affine)
    return header


def is_header(data: bytes) -> bool:
    """Whether `data` starts with a header of NIfTI-1 or NIfTI-2."""
    kind, magic = _kind(data)
    return kind is not None and magic in data[: kind.sizeof_hdr]


def _kind(data: bytes) -> tuple[Any, bytes]:
    """Header class and magic text by the size field; None for other formats."""
    versions = {348: (nib.Nifti1Header, b"n+1"), 540: (nib.Nifti2Header, b"n+2")}
    none = (None, b"")
    kind, magic = versions.get(
        int.from_bytes(data[:4], "little"), versions.get(int.from_bytes(data[:4], "big"), none)
    )
    return (kind, magic) if kind is not None and len(data) >= kind.sizeof_hdr else none


def _parse(stored: nib.Nifti1Header) -> Header:
    repaired = stored.copy()
    repaired.check_fix(logger=_SILENT)
    shape = tuple(int(size) for size in repaired.get_data_shape())
    if not shape or min(shape) < 1:
        raise ValueError(f"its dimensions are {shape}")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    name, length_mm = _unit(stored)
    affine = np.asarray(repaired.get_best_affine(), np.float64)
    slope, intercept = float(stored["scl_slope"]), float(stored["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        slope, intercept = 1.0, 0.0  # the format: not scaled
    return Header(
        stored=stored,
        shape=shape,
        dtype=repaired.get_data_dtype(),
        offset=int(repaired.get_data_offset()) or stored.single_vox_offset,
        slope=slope,
        intercept=intercept if math.isfinite(intercept) else 0.0,
        affine=np.diag([length_mm] * 3 + [1.0]) @ affine,
        warnings=tuple(_doubts(stored, repaired, affine, name)),
    )


def _unit(stored: nib.Nifti1Header) -> tuple[str, float]:
    """Name of the unit of space, and its length in mm; nibabel fails on undefined codes."""
    code = int(stored["xyzt_units"]) & 7
    if code == 0:
        return "mm", 1.0
    return _UNITS.get(code, (f"undefined code {code}", 1.0))


def _doubts(
    stored: nib.Nifti1Header, repaired: nib.Nifti1Header, affine: Affine, unit: str
) -> Iterator[str]:
    """Warnings of what the header leaves open or states twice."""
    if int(stored["vox_offset"]) == 0:
        yield f"states no position of its voxels; {stored.single_vox_offset} is used"
    scaled = float(stored["scl_slope"]) != 0 and np.isfinite(stored["scl_slope"])
    if scaled and not np.isfinite(stored["scl_inter"]):
        yield f"states {float(stored['scl_inter'])} as its intercept; 0 is used"
    for form in ("qform", "sform"):
        code = int(stored[f"{form}_code"])
        if code != int(repaired[f"{form}_code"]):
            yield f"states an undefined {form} code, {code}; {form} is not used, other programs may"
    if repaired["qform_code"] == 0 and repaired["sform_code"] == 0:
        yield (
            f"states no orientation (qform and sform codes are 0); {orientation_of(affine)} is "
            "assumed, and left and right, or front and back, may be exchanged"
        )
    if unit in ("meter", "micron"):
        yield f"states its unit as {unit}; converted to mm, which other programs may not do"
    elif unit != "mm":
        yield f"states its unit as {unit}; mm is assumed"
    qfac = float(stored["pixdim"][0])
    if repaired["sform_code"] == 0 and repaired["qform_code"] != 0 and qfac not in (-1, 0, 1):
        yield f"states {qfac:g} as its qfac (pixdim[0]); 1 is used, other programs may use -1"
    spacing = list(_spacing_doubts(stored, repaired, affine))
    yield from spacing
    if repaired["qform_code"] != 0 and repaired["sform_code"] != 0 and not spacing:
        yield from _form_doubts(repaired, affine)


def _spacing_doubts(
    stored: nib.Nifti1Header, repaired: nib.Nifti1Header, affine: Affine
) -> Iterator[str]:
    said = np.asarray(stored["pixdim"][1:4], np.float64)
    read = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.allclose(said, read, rtol=_SPACING_TOLERANCE, atol=0):
        source = "sform states" if repaired["sform_code"] != 0 else "it is read as"
        yield (
            f"states its spacing as {format_size(said)} (pixdim), while {source} "
            f"{format_size(read)}, which is used"
        )


def _form_doubts(repaired: nib.Nifti1Header, sform: Affine) -> Iterator[str]:
    try:
        qform = np.asarray(repaired.get_qform(), np.float64)
    except (nib.spatialimages.HeaderDataError, ValueError):
        qform = np.full((4, 4), np.nan)
    distance = corner_distance_mm(repaired.get_data_shape()[:3], sform, qform)
    if not math.isfinite(distance):
        yield "states a qform that is no rotation; sform is used"
    elif distance > _SILENT_DISTANCE * np.linalg.norm(sform[:3, :3], axis=0).min():
        yield (
            f"states its position twice, up to {distance:.3g} mm apart (qform and sform); sform is "
            "used, other programs may use qform"
        )
