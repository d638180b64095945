from __future__ import annotations

import gzip
import io
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

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
