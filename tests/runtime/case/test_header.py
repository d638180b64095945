from __future__ import annotations

import gzip
import re
import struct
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from attnseg.runtime.case.nifti import encode_labels, read_volume
from attnseg.runtime.errors import VolumeError

SHAPE = (4, 5, 6)
AFFINE = np.array([[-1, 0, 0, 90.0], [0, -1, 0, 60.0], [0, 0, 1, -20.0], [0, 0, 0, 1]])
PIXDIM, OFFSET, SLOPE, UNITS, CODES, QUATERNION, SROW = 80, 108, 112, 123, 252, 256, 280
"""Positions of fields in a NIfTI-1 header (nifti1.h)."""
GEOMETRY = ("pixdim", "qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_x", "srow_z")


def stored(qform: Any = AFFINE, sform: Any = AFFINE, qcode: int = 1, scode: int = 1) -> bytearray:
    image = nib.Nifti1Image(np.arange(1, 121, dtype=np.int16).reshape(SHAPE), AFFINE)
    image.set_qform(qform, qcode)
    image.set_sform(sform, scode)
    image.header.set_xyzt_units("mm")
    content = bytearray(image.to_bytes())
    struct.pack_into("<2h", content, CODES, qcode, scode)
    return content


def patched(content: bytearray, position: int, layout: str, *values: float) -> bytearray:
    struct.pack_into(layout, content, position, *values)
    return content


def read(tmp_path: Path, content: bytearray) -> Any:
    (tmp_path / "a.nii").write_bytes(content)
    return read_volume([tmp_path / "a.nii"])


FLIPPED = AFFINE @ np.diag([-1.0, 1, 1, 1])
SHIFTED = AFFINE + np.array([[0, 0, 0, 20.0], *[[0] * 4] * 3])
DOUBTFUL = {
    "pixdim 0": (patched(stored(scode=0), PIXDIM, "<3f", 0, 0, 0), "as 0 x 0 x 0 .*read as 1 x 1"),
    "pixdim -1": (
        patched(stored(scode=0), PIXDIM, "<3f", -1, -1, -1),
        "as -1 x -1 x -1 .*it is read as 1 x 1 x 1",
    ),
    "pixdim NaN beside sform": (
        patched(stored(), PIXDIM, "<3f", *[np.nan] * 3),
        "as nan x nan x nan .*sform states 1 x 1 x 1",
    ),
    "pixdim against sform": (
        patched(stored(), PIXDIM, "<3f", 2, 2, 2),
        "as 2 x 2 x 2 .*sform states 1 x 1 x 1, which is used",
    ),
    # The farthest corner has index 3 along X: 90 - 3 against 90 + 3.
    "qform flipped": (stored(qform=FLIPPED), "up to 6 mm apart .*sform is used"),
    "qform shifted": (stored(qform=SHIFTED), "up to 20 mm apart .*sform is used"),
    "qform no rotation": (
        patched(stored(), QUATERNION, "<3f", 0.9, 0.9, 0.9),
        "states a qform that is no rotation; sform is used",
    ),
    "no codes": (stored(qcode=0, scode=0), "states no orientation"),
    "offset 0": (patched(stored(), OFFSET, "<f", 0), "no position of its voxels; 352 is used"),
    "intercept NaN": (patched(stored(), SLOPE, "<2f", 1, np.nan), "nan as its intercept; 0 is"),
    "intercept inf": (patched(stored(), SLOPE, "<2f", 1, np.inf), "inf as its intercept; 0 is"),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_what_is_ambiguous_is_read_with_a_warning(tmp_path: Path, name: str) -> None:
    content, warning = DOUBTFUL[name]
    volume = read(tmp_path, content)
    (found,) = volume.warnings
    assert re.search(f"^a.nii states .*{warning}|^a.nii {warning}", found), found
    np.testing.assert_array_equal(volume.channels[0], np.arange(1, 121).reshape(SHAPE))


@pytest.mark.parametrize("name", [*DOUBTFUL, "clean"])
def test_labels_keep_the_geometry_bytes_of_the_scan(tmp_path: Path, name: str) -> None:
    content = bytearray(DOUBTFUL[name][0] if name in DOUBTFUL else stored())
    volume = read(tmp_path, patched(content, PIXDIM + 12, "<4f", 0, 2, 0, 0))  # of unused axes
    written = gzip.decompress(encode_labels(np.ones(SHAPE, np.uint8), volume))
    given, found = (nib.Nifti1Header(bytes(c[:348]), check=False) for c in (content, written))
    for field in (*GEOMETRY, "xyzt_units"):
        np.testing.assert_array_equal(given[field], found[field])


@pytest.mark.parametrize("name", ["pixdim -1", "pixdim 0", "qform flipped", "qform shifted"])
def test_itk_places_the_labels_where_it_places_the_scan(tmp_path: Path, name: str) -> None:
    volume = read(tmp_path, DOUBTFUL[name][0])
    labels = tmp_path / "labels.nii.gz"
    labels.write_bytes(encode_labels(np.ones(SHAPE, np.uint8), volume))
    scan, found = (SimpleITK.ReadImage(str(f)) for f in (tmp_path / "a.nii", labels))
    assert found.GetOrigin() == scan.GetOrigin()
    assert found.GetSpacing() == scan.GetSpacing()
    assert found.GetDirection() == scan.GetDirection()


def test_a_clean_header_has_no_warning(tmp_path: Path) -> None:
    assert read(tmp_path, stored()).warnings == ()


def test_a_qform_that_is_only_rounded_has_no_warning(tmp_path: Path) -> None:
    near = AFFINE + np.array([[0, 0, 0, 0.05], *[[0] * 4] * 3])
    assert read(tmp_path, stored(qform=near)).warnings == ()


def test_files_that_share_a_doubt_share_its_line(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.nii").write_bytes(stored(qcode=0, scode=0))
    (warning,) = read_volume([tmp_path / f"{name}.nii" for name in ("a", "b", "c")]).warnings
    assert warning.startswith("a.nii (the same in 2 other files) states no orientation (qform")


def test_an_extension_and_its_padding_are_skipped(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.arange(1, 121, dtype=np.int16).reshape(SHAPE), AFFINE)
    plain = image.to_bytes()
    extension = struct.pack("<2i", 24, 6) + b"a comment, 16 b."
    content = bytearray(plain[:348] + b"\1\0\0\0" + extension + bytes(40) + plain[352:])
    volume = read(tmp_path, patched(content, OFFSET, "<f", 352 + 24 + 40))
    np.testing.assert_array_equal(volume.channels[0], np.arange(1, 121).reshape(SHAPE))
    assert volume.warnings == ()


def test_repairs_of_a_header_print_nothing_in_any_thread(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in "abcdefgh":
        (tmp_path / f"{name}.nii").write_bytes(DOUBTFUL["pixdim -1"][0])
    for _ in range(5):
        read_volume([tmp_path / f"{name}.nii" for name in "abcdefgh"], threads=8)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("code", [9, 300, -1])
@pytest.mark.parametrize("form", ["qform", "sform"])
def test_an_undefined_code_is_warned_of(tmp_path: Path, form: str, code: int) -> None:
    content = stored(qcode=0, scode=0)
    struct.pack_into("<h", content, CODES + 2 * (form == "sform"), code)
    warnings = read(tmp_path, content).warnings
    assert f"a.nii states an undefined {form} code, {code}; {form} is not used" in warnings[0]
    assert "states no orientation" in warnings[1]


def test_an_undefined_qfac_is_warned_of_where_it_counts(tmp_path: Path) -> None:
    (warning,) = read(tmp_path, patched(stored(scode=0), PIXDIM - 4, "<f", -3)).warnings
    assert "states -3 as its qfac (pixdim[0]); 1 is used" in warning
    assert read(tmp_path, patched(stored(), PIXDIM - 4, "<f", -3)).warnings == ()


def nifti_2(sform: float) -> bytearray:
    image = nib.Nifti2Image(np.ones(SHAPE, np.int16), AFFINE)
    image.header["srow_x"] = sform
    return bytearray(bytes(image.header.binaryblock) + bytes(4 + 240))


@pytest.mark.parametrize(
    "content",
    [
        patched(stored(), SROW, "<12f", *[3e38] * 12),  # the largest float32 is 3.4e38
        patched(patched(stored(), SROW, "<f", np.inf), UNITS, "B", 3),
        nifti_2(1e200),  # its square exceeds the largest float64, 1.8e308
    ],
    ids=["sform", "infinite", "NIfTI-2"],
)
def test_an_absurd_position_is_one_error_without_warnings_of_numpy(
    tmp_path: Path, content: bytearray
) -> None:
    with pytest.raises(VolumeError, match=r"its affine is not finite or absurdly large"):
        read(tmp_path, content)
