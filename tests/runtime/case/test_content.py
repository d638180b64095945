from __future__ import annotations

import gzip
import io
import os
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from attnseg.runtime.case.content import LARGEST_BEHIND
from attnseg.runtime.case.nifti import read_volume
from attnseg.runtime.errors import VolumeError

VOXELS = np.arange(1, 121, dtype=np.int16).reshape(4, 5, 6)
PLAIN = nib.Nifti1Image(VOXELS, np.eye(4)).to_bytes()


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.nii", PLAIN)
    return stream.getvalue()


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.NII.GZ"])
@pytest.mark.parametrize("content", [PLAIN, gzip.compress(PLAIN)], ids=["plain", "gzip"])
def test_the_content_decides_and_not_the_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    np.testing.assert_array_equal(read_volume([tmp_path / name]).channels[0], VOXELS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; copy or download it again"),
        (gzip.compress(gzip.compress(PLAIN)), "is gzipped twice; unpack it once"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "a pointer of Git LFS, .*; fetch",
        ),
        (b"<!DOCTYPE html><html>", "is a web page or XML file, not a NIfTI image"),
        (zipped(), "is a ZIP archive, not a NIfTI image; unpack it"),
        (
            b"\0" * 128 + b"DICM" + bytes(400),
            "is a DICOM file, .*; convert its series",
        ),
        (gzip.compress(b"NRRD0004\n" + bytes(400)), "is an NRRD image, .*; convert it"),
        (PLAIN[:344] + b"ni1" + PLAIN[347:], "its image is in another file"),
        (b"scan of Monday", r"is not a NIfTI image \(\.nii or \.nii\.gz\)"),
    ],
)
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_content_of_another_kind_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VolumeError, match=f"{name}: .*{message}"):
        read_volume([tmp_path / name])


def header_of(shape: tuple[int, ...], dtype: str = "<i2") -> bytes:
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(dtype)
    header.set_sform(np.eye(4), 1)
    header["vox_offset"] = 352
    return bytes(header.binaryblock) + bytes(4)


@pytest.mark.parametrize("behind", [0, 1000, LARGEST_BEHIND])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_little_behind_the_image_is_ignored(
    tmp_path: Path, behind: int, compress: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "a.nii").write_bytes(compress(PLAIN + b"\1" * behind))
    np.testing.assert_array_equal(read_volume([tmp_path / "a.nii"]).channels[0], VOXELS)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_more_behind_the_image_is_refused(
    tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "a.nii").write_bytes(compress(PLAIN + bytes(LARGEST_BEHIND * 5)))
    with pytest.raises(VolumeError, match="holds more than 1048576 bytes behind the 592 of"):
        read_volume([tmp_path / "a.nii"])


def test_a_small_file_does_not_take_much_memory(tmp_path: Path) -> None:
    tracemalloc.start()
    bomb = gzip.compress(PLAIN) + gzip.compress(bytes(1 << 24)) * 64  # 1 GiB behind the image
    (tmp_path / "a.nii.gz").write_bytes(bomb)
    tracemalloc.reset_peak()
    with pytest.raises(VolumeError, match="behind the 592"):
        read_volume([tmp_path / "a.nii.gz"])
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_an_image_that_a_file_of_its_size_cannot_hold_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_bytes(header_of((2000, 2000, 2000)))
    message = r"has 352 bytes, .* an image that takes 16000000352, more than 100 times as many"
    with pytest.raises(VolumeError, match=message):
        read_volume([tmp_path / "a.nii"])


def test_the_memory_of_scaled_voxels_counts_too(tmp_path: Path) -> None:
    header = nib.Nifti1Header()
    header.set_data_shape((1024, 1024, 64))  # 64 MiB as stored, 256 MiB as float32
    header.set_data_dtype(np.uint8)
    header.set_sform(np.eye(4), 1)
    header["vox_offset"], header["scl_slope"] = 352, 2
    content = bytes(header.binaryblock) + bytes(4 + (64 << 20))
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content, 1))
    with pytest.raises(VolumeError, match=r"an image that takes 335544672, more than 100 times"):
        read_volume([tmp_path / "a.nii.gz"])


def test_many_empty_members_are_read_in_no_time(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(PLAIN) + gzip.compress(b"") * 40_000)
    began = time.process_time()
    read_volume([tmp_path / "a.nii.gz"])
    assert time.process_time() - began < 5  # took minutes when each member was copied


@pytest.mark.parametrize("shape", [(4, 5, 0), (4, 5, -6), (-1, 5, 6)])
def test_dimensions_below_1_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    content = bytearray(PLAIN)
    content[42:48] = np.array(shape, "<i2").tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(VolumeError, match=r"its NIfTI header is damaged \(.*"):
        read_volume([tmp_path / "a.nii"])


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.nii")
    with pytest.raises(VolumeError, match=r"a\.nii: is not a regular file"):
        read_volume([tmp_path / "a.nii"])


def test_a_medium_that_fails_while_a_file_is_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.nii").write_bytes(PLAIN)

    def fail(_: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(VolumeError, match=r"a\.nii: cannot be read \(Input/output error\)"):
        read_volume([tmp_path / "a.nii"])


def test_a_name_with_a_null_character_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"cannot be read \(embedded null byte\)"):
        read_volume([tmp_path / "a\0b.nii.gz"])
