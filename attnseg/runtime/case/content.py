"""Content of a scan file: NIfTI, plain or gzipped, and errors that name what else it is.

The content decides, not the file's ending: both `.nii` files that are gzipped and `.nii.gz` files
that are not occur. A truncated scan yields a plausible but wrong segmentation, so gzip streams are
checked to the last byte and CRC. gzip is decompressed with ISA-L.
"""

from __future__ import annotations

from pathlib import Path

from isal import igzip, isal_zlib

from attnseg.runtime.case.header import LONGEST_HEADER, is_header
from attnseg.runtime.errors import VolumeError

_GZIP_MAGIC = b"\x1f\x8b"
_COPY_AGAIN = "copy or download it again"
_OTHERS = (
    (0, b"version https://git-lfs", "a pointer of Git LFS", "fetch the file with git lfs pull"),
    (0, b"PK\x03\x04", "a ZIP archive", "unpack it"),
    (0, b"NRRD", "an NRRD image", "convert it to .nii.gz"),
    (0, b"<", "a web page or XML file", "download it again"),
    (128, b"DICM", "a DICOM file", "convert its series with dcm2niix"),
)
"""Offset and text by which another format is recognised, its name and the mend."""


def read_content(path: Path) -> tuple[bytes, bytes]:
    """Read a file: its bytes as stored, and the bytes of its NIfTI image.

    Raises:
        VolumeError: The file cannot be read, or is neither NIfTI nor gzipped NIfTI.
    """
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise VolumeError(f"{path}: cannot be read ({error.strerror})") from error
    data = stored
    if stored[:2] == _GZIP_MAGIC:
        try:
            data = bytes(igzip.decompress(stored))  # type: ignore[no-untyped-call]
        except (EOFError, OSError, isal_zlib.error) as error:  # type: ignore[misc]
            raise VolumeError(
                f"{path}: the gzip stream is truncated or damaged ({error})", _COPY_AGAIN
            ) from error
    if not is_header(data):
        raise _another_format(path, data, data is not stored)
    return stored, data


def read_start(path: Path) -> bytes:
    """Read the part of a file that holds its NIfTI header.

    Raises:
        VolumeError: The file cannot be read.
    """
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == _GZIP_MAGIC
        with igzip.open(path) if zipped else path.open("rb") as stream:  # type: ignore[no-untyped-call]
            return bytes(stream.read(LONGEST_HEADER))
    except (OSError, EOFError, isal_zlib.error) as error:  # type: ignore[misc]
        raise VolumeError(f"{path}: cannot be read ({error})") from error


def _another_format(path: Path, data: bytes, zipped: bool) -> VolumeError:
    """Error for content that is no NIfTI image."""
    if not data:
        return VolumeError(f"{path}: is empty", _COPY_AGAIN)
    if zipped and data[:2] == _GZIP_MAGIC:
        return VolumeError(f"{path}: is gzipped twice", "unpack it once with gunzip")
    for offset, text, name, mend in _OTHERS:
        if data[offset:].startswith(text):
            return VolumeError(f"{path}: is {name}, not a NIfTI image", mend)
    if b"ni1\0" in data[:LONGEST_HEADER]:
        return VolumeError(
            f"{path}: its image is in another file (.hdr and .img)", "convert it to one .nii.gz"
        )
    return VolumeError(f"{path}: is not a NIfTI image (.nii or .nii.gz)", _COPY_AGAIN)
