"""Content of a scan file: NIfTI, plain or gzipped, and errors that name what else it is.

The content decides, not the file's ending: both `.nii` files that are gzipped and `.nii.gz` files
that are not occur. A truncated scan yields a plausible but wrong segmentation, so gzip streams are
checked to the last byte and CRC. No more is inflated than the header promises, and what it promises
is bounded by the size of the file, so that a small file cannot take a large amount of memory.
gzip is decompressed with ISA-L.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from isal import igzip, isal_zlib

from attnseg.runtime.case.header import LONGEST_HEADER, Header, is_header, parse_header
from attnseg.runtime.errors import VolumeError

LARGEST_BEHIND = 1 << 20
"""Number of bytes behind the image that are ignored; more are refused."""
_LARGE_BYTES = 256 << 20  # memory of an image from which its compression is looked at
_LARGEST_RATIO = 100  # of the memory of a large image and the size of its file
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


@dataclass(frozen=True)
class Content:
    """Content of a NIfTI file.

    Attributes:
        header: The header.
        data: Bytes from the start of the header to the last voxel; more may follow.
        sha256: SHA-256 of the file as stored.
    """

    header: Header
    data: bytes
    sha256: str


def read_content(path: Path) -> Content:
    """Read a file.

    Raises:
        VolumeError: The file cannot be read, is neither NIfTI nor gzipped NIfTI, holds less or much
            more than its header promises, or promises more than a file of its size can hold.
    """
    header = parse_header(path, read_start(path))
    size = header.stored_bytes
    stored = _read(path, header)
    data = _inflate(path, stored, size) if stored[:2] == _GZIP_MAGIC else stored
    if len(data) < size:
        raise VolumeError(f"{path}: has {len(data)} bytes, its header promises {size}", _COPY_AGAIN)
    if len(data) > size + LARGEST_BEHIND:
        raise _too_much(path, size)
    return Content(header, data, hashlib.sha256(stored).hexdigest())


def _read(path: Path, header: Header) -> bytes:
    """The file as stored, if the image of `header` is plausible in it."""
    size, memory = header.stored_bytes, header.memory_bytes
    with _naming_unreadable(path):
        stored_size = path.stat().st_size
    if memory > _LARGE_BYTES and stored_size < memory / _LARGEST_RATIO:
        raise VolumeError(
            f"{path}: has {stored_size} bytes, its header promises an image that takes {memory}, "
            f"more than {_LARGEST_RATIO} times as many",
            _COPY_AGAIN,
        )
    if stored_size > size + 2 * LARGEST_BEHIND + size // 1000:  # gzip may add a few bytes
        raise _too_much(path, size)
    with _naming_unreadable(path):
        return path.read_bytes()


@contextmanager
def _naming_unreadable(path: Path) -> Iterator[None]:
    """Convert an `OSError` of the file system to a `VolumeError`."""
    try:
        yield
    except OSError as error:
        raise VolumeError(f"{path}: cannot be read ({error.strerror})") from error


def _too_much(path: Path, size: int) -> VolumeError:
    return VolumeError(
        f"{path}: holds more than {LARGEST_BEHIND} bytes behind the {size} of its header's image",
        _COPY_AGAIN,
    )


def _inflate(path: Path, stored: bytes, size: int) -> bytes:
    """The first `size` bytes of a gzip stream, whose rest is checked."""
    try:
        with igzip.IGzipFile(fileobj=io.BytesIO(stored)) as stream:  # type: ignore[no-untyped-call]
            data = bytes(stream.read(size))
            behind = len(stream.read(LARGEST_BEHIND + 1))
    except (EOFError, OSError, isal_zlib.error) as error:  # type: ignore[misc]
        raise _damaged(path, error) from error
    if behind > LARGEST_BEHIND:
        raise _too_much(path, size)
    return data


def _damaged(path: Path, error: Exception) -> VolumeError:
    return VolumeError(f"{path}: the gzip stream is truncated or damaged ({error})", _COPY_AGAIN)


def read_start(path: Path) -> bytes:
    """Read the part of a file that holds its NIfTI header.

    Raises:
        VolumeError: The file cannot be read, or does not start with a NIfTI header.
    """
    try:
        if not path.is_file() and path.exists():
            raise VolumeError(f"{path}: is not a regular file", "give the image itself")
        with path.open("rb") as raw:
            start = raw.read(LONGEST_HEADER)
        if zipped := start[:2] == _GZIP_MAGIC:
            with igzip.open(path) as stream:  # type: ignore[no-untyped-call]
                start = bytes(stream.read(LONGEST_HEADER))
    except OSError as error:
        if error.strerror is None:  # of the gzip stream
            raise _damaged(path, error) from error
        raise VolumeError(f"{path}: cannot be read ({error.strerror})") from error
    except (EOFError, isal_zlib.error) as error:  # type: ignore[misc]
        raise _damaged(path, error) from error
    except ValueError as error:  # a null character in the name
        raise VolumeError(f"{path}: cannot be read ({error})") from error
    if not is_header(start):
        raise _another_format(path, start, zipped)
    return start


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
