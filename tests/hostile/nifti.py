"""Hostile NIfTI files, plain and gzipped."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from attnseg.runtime.case.nifti import encode_labels, read_affine, read_labels, read_volume
from attnseg.runtime.case.volume import Volume
from tests.hostile.drive import SilentlyWrongError
from tests.hostile.mutate import change_bytes, extremes_of, pick

FILE = "image.nii"
_DTYPES = ("u1", "i1", "<i2", ">i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f4", ">f4", "<f8", "c8")
_LARGEST_CHECKED = 1 << 24  # bytes
_LARGE = 1 << 28  # bytes; an image of this size is accepted from a file of any size

_LARGEST = 95 * 9_900_000  # bytes; 100 times a file below 10 MB, and a little less


def plain_image(rng: Generator) -> bytes:
    """A valid image of a few voxels: any type, byte order, version, position and scaling."""
    shape = tuple(int(v) for v in rng.integers(1, 9, pick(rng, (3, 3, 3, 3, 4, 2))))
    dtype = np.dtype(pick(rng, _DTYPES))
    voxels = rng.integers(0, 100, shape).astype(dtype)
    kind = pick(rng, (nib.Nifti1Image, nib.Nifti1Image, nib.Nifti2Image))
    affine = np.diag([*pick(rng, ((1.0, 1.0, 1.0), (0.5, 1.0, 3.0), (-1.0, -1.0, 2.0))), 1.0])
    affine[:3, 3] = rng.integers(-100, 100, 3)
    if rng.random() < 0.3:
        affine[:3, :3] = affine[:3, rng.permutation(3)]
    image = kind(voxels, affine, dtype=dtype.newbyteorder("="))  # int64 must be asked for
    image.header.set_xyzt_units(*pick(rng, (("mm", "sec"), ("unknown", "unknown"), ("micron", 0))))
    if rng.random() < 0.3:
        image.set_qform(affine, int(rng.integers(0, 5)))
        image.set_sform(affine, int(rng.integers(0, 5)))
    header = image.header.as_byteswapped("<>"[dtype.byteorder == ">"])
    if rng.random() < 0.3:
        header["scl_slope"], header["scl_inter"] = pick(rng, ((2, 1), (1, 0), (0.01, -5), (-1, 3)))
    header["vox_offset"] = header.single_vox_offset
    header["magic"] = header.single_magic
    padding = bytes(header.single_vox_offset - header.sizeof_hdr)
    return bytes(header.binaryblock) + padding + voxels.tobytes(order="F")


def _change_header(rng: Generator, stored: bytes) -> bytes:
    """The file with extreme values in one to three fields of its header."""
    version = 348 if b"n+1" in stored[:348] else 540
    kind = {348: nib.Nifti1Header, 540: nib.Nifti2Header}[version]
    header = kind(stored[:version], check=False)
    fields = header.structarr
    for _ in range(int(rng.integers(1, 4))):
        name = pick(rng, fields.dtype.names)
        dtype, shape = fields.dtype[name].base, fields.dtype[name].shape
        value = pick(rng, extremes_of(dtype))
        with np.errstate(over="ignore"):
            if shape and rng.random() < 0.8:
                fields[name][int(rng.integers(shape[0]))] = value
            else:
                fields[name] = value
    return bytes(header.binaryblock) + stored[version:]


def _zeros_behind(rng: Generator, stored: bytes) -> bytes:
    return stored + bytes(pick(rng, (1, 1000, 1 << 20, (1 << 20) + 1, 5 << 20)))


def _members(rng: Generator, stored: bytes) -> bytes:
    """The file as several gzip members, some of them empty."""
    cuts = sorted({0, len(stored), *(int(v) for v in rng.integers(0, len(stored) + 1, 3))})
    parts = [gzip.compress(stored[a:b], 1) for a, b in pairwise(cuts)]
    empty = gzip.compress(b"") * pick(rng, (0, 1, 3, 1000, 5000))
    parts.insert(int(rng.integers(len(parts) + 1)), empty)
    return b"".join(parts)


def _with_fields(rng: Generator, stored: bytes) -> bytes:
    """A gzip member with optional fields and any flags, perhaps contradictory."""
    deflate = zlib.compressobj(int(rng.integers(0, 10)), zlib.DEFLATED, -15)
    flags = int(rng.integers(0, 256)) if rng.random() < 0.5 else 0b11100
    extra = rng.bytes(int(rng.integers(0, 300)))
    optional = b"" if not flags & 4 else struct.pack("<H", len(extra)) + extra
    optional += b"name\0" * (flags >> 3 & 1) + b"comment\0" * (flags >> 4 & 1)
    head = b"\x1f\x8b\x08" + bytes([flags]) + rng.bytes(6) + optional
    crc = b"" if not flags & 2 else struct.pack("<H", zlib.crc32(head) & 0xFFFF)
    sizes = (len(stored), len(stored), 0, 2**32 - 1)
    end = struct.pack("<II", zlib.crc32(stored), pick(rng, sizes))
    return head + crc + deflate.compress(stored) + deflate.flush() + end


def _compress(rng: Generator, stored: bytes) -> bytes:
    how = rng.random()
    if how < 0.6:
        return gzip.compress(stored, int(rng.integers(0, 10)), mtime=0)
    return _members(rng, stored) if how < 0.8 else _with_fields(rng, stored)


def _large(rng: Generator) -> bytes:
    """A file below 10 MB of a large image, up to as large as a file of its size may hold."""
    size = int(pick(rng, (_LARGE // 2, _LARGE, _LARGE * 3 // 2, _LARGEST, _LARGEST)))
    dtype = np.dtype(pick(rng, ("u1", "<i2", "<f8") if size == _LARGEST else _DTYPES))
    header = nib.Nifti1Header(endianness="<>"[dtype.byteorder == ">"])
    header.set_data_dtype(dtype)
    header["dim"][:4] = 3, 16384, 4, size // dtype.itemsize // (4 * 16384)
    header["srow_x"][0] = header["srow_y"][1] = header["srow_z"][2] = header["sform_code"] = 1
    header["vox_offset"], header["magic"] = 352, header.single_magic
    header["scl_slope"], header["scl_inter"] = (
        (1, 0) if size == _LARGEST else pick(rng, ((1, 0), (2, 1), (0.5, 0)))
    )
    count = size // 125 if size > _LARGE or rng.random() < 0.5 else 16
    noise = rng.integers(0, 0x40, count, np.uint8).tobytes()  # finite as any type
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=1, mtime=0) as zipped:
        zipped.write(bytes(header.binaryblock) + bytes(4) + noise)
        for start in range(len(noise), size, 1 << 24):
            zipped.write(bytes(min(size - start, 1 << 24)))
    return stream.getvalue()


class Nifti:
    """One image file, read as a channel, as labels and for its affine."""

    def __init__(self, _: Path) -> None:
        nib.imageglobals.logger.disabled = True  # `decode` would log its repairs

    def make(self, rng: Generator, folder: Path) -> None:
        """See `Reader.make`."""
        if rng.random() < 0.003:
            stored = _large(rng)
        else:
            stored = plain_image(rng)
            if rng.random() < 0.7:
                stored = _change_header(rng, stored)
            if rng.random() < 0.15:
                stored = change_bytes(rng, stored)
            if rng.random() < 0.1:
                stored = _zeros_behind(rng, stored)
            if rng.random() < 0.6:
                stored = _compress(rng, stored)
                if rng.random() < 0.3:
                    stored = change_bytes(rng, stored)
        (folder / FILE).write_bytes(stored)

    def read(self, folder: Path) -> None:
        """See `Reader.read`."""
        file = folder / FILE
        volume = read_volume([file])
        voxels = volume.channels[0]
        if voxels.nbytes > _LARGEST_CHECKED:  # the check would take more memory than the reader
            return
        compare("affine alone", read_affine(file), volume.affine)
        compare("labels", read_labels(file).channels[0], voxels)
        wanted, wanted_affine = decode(file.read_bytes())
        compare("voxels", voxels, wanted.reshape(voxels.shape, order="F"))
        compare("affine", volume.affine, wanted_affine)
        _check_labels(folder, volume)


def compare(what: str, found: NDArray[Any], wanted: NDArray[Any]) -> None:
    """Raise `SilentlyWrongError` unless two arrays are equal, floats within their rounding."""
    rounding = 1e-6 * float(np.abs(wanted).max(initial=0)) if wanted.dtype.kind == "f" else 0
    if found.shape != wanted.shape or not np.allclose(found, wanted, 1e-6, rounding):
        raise SilentlyWrongError(f"{what}: {found.shape} {found.ravel()[:20]} is not {wanted}")


def _check_labels(folder: Path, volume: Volume) -> None:
    """Check that labels on the grid of a volume are written and read back where it is."""
    labels = np.arange(np.prod(volume.shape), dtype=np.int64).reshape(volume.shape).astype(np.uint8)
    (folder / "labels.nii.gz").write_bytes(encode_labels(labels, volume))
    stored = read_labels(folder / "labels.nii.gz", folder / FILE)
    compare("written labels", stored.channels[0], labels)
    compare("affine of written labels", stored.affine, volume.affine)


_UNITS = {1: 1000.0, 3: 0.001}  # mm


def decode(stored: bytes) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Voxels and affine as the standard library and nibabel read them.

    The two repairs that docs/scans.md states are applied, which nibabel refuses or does not make.
    """
    if stored[:2] == b"\x1f\x8b":
        stored = _inflate(stored)
    second = 540 in (int.from_bytes(stored[:4], order) for order in ("little", "big"))
    kind = nib.Nifti2Header if second else nib.Nifti1Header
    header = kind(stored[: kind.sizeof_hdr], check=False)
    length_mm = _UNITS.get(int(header["xyzt_units"]) & 7, 1.0)
    if header["scl_slope"] and not np.isfinite(header["scl_inter"]):
        header["scl_inter"] = 0
    if not header["vox_offset"]:
        header["vox_offset"] = header.single_vox_offset
    stored = bytes(header.binaryblock) + stored[kind.sizeof_hdr :]
    image_kind = nib.Nifti1Image if kind is nib.Nifti1Header else nib.Nifti2Image
    with np.errstate(all="ignore"):
        try:
            image = image_kind.from_bytes(stored)
            return np.asarray(image.dataobj), np.diag([length_mm] * 3 + [1.0]) @ image.affine
        except Exception as error:
            raise SilentlyWrongError(f"accepted what nibabel refuses: {error}") from error


def _inflate(stored: bytes) -> bytes:
    """The content of all gzip members, as the standard library finds it."""
    try:
        return gzip.decompress(stored)
    except (OSError, EOFError, zlib.error) as error:
        raise SilentlyWrongError(f"accepted a gzip stream with {error}") from error
