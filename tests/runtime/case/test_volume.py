from __future__ import annotations

import gzip
import io
import itertools
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnseg.runtime.case.nifti import encode_labels, read_labels, read_volume
from attnseg.runtime.case.volume import Volume, check_finite, check_volume
from attnseg.runtime.errors import VolumeError
from attnseg.runtime.geometry import reorient
from tests.conftest import SaveImage

ORIENTATIONS = [
    "".join(letters)
    for axes in itertools.permutations(("LR", "PA", "SI"))
    for letters in itertools.product(*axes)
]


def ramp(shape: tuple[int, ...] = (4, 5, 6)) -> np.ndarray:
    return np.arange(1, np.prod(shape) + 1, dtype=np.int16).reshape(shape)


def decode(stored: bytes) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(stored))


@pytest.mark.parametrize("dtype", ["i1", "u1", "<i2", ">i2", "u2", "i4", "f4", "f8"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_voxels_are_those_that_nibabel_reads(save_image: SaveImage, dtype: str, name: str) -> None:
    array = (ramp() % 120).astype(dtype)
    path = save_image(array, name)
    volume = read_volume([path])
    np.testing.assert_array_equal(volume.channels[0], array)
    np.testing.assert_array_equal(volume.affine, np.eye(4))


def test_header_scaling_is_applied(save_image: SaveImage) -> None:
    path = save_image(ramp(), scl_slope=0.5, scl_inter=10)
    stored = nib.load(path)
    np.testing.assert_allclose(read_volume([path]).channels[0], stored.get_fdata())


def test_nifti_2_is_read_and_written(tmp_path: Path) -> None:
    source = nib.Nifti2Image(ramp(), np.diag([2.0, 3, 4, 1]))
    source.header["unused_str"] = b"Jane Doe"
    nib.save(source, tmp_path / "a.nii.gz")
    volume = read_volume([tmp_path / "a.nii.gz"])
    assert volume.spacing_mm == (2, 3, 4)
    stored = gzip.decompress(encode_labels(np.ones((4, 5, 6), np.uint8), volume))
    assert b"Jane Doe" not in stored
    image = nib.Nifti2Image.from_bytes(stored)
    np.testing.assert_array_equal(image.affine, volume.affine)


def test_labels_carry_the_files_affines_codes_and_units(save_image: SaveImage) -> None:
    affine = nib.affines.from_matvec(
        nib.eulerangles.euler2mat(0.1, 0.2, 0.3) @ np.diag([1.0, 1.2, 3.0]), [7.25, -3.5, 11]
    )
    image = nib.Nifti1Image(ramp(), affine)
    image.set_qform(affine, code=1)
    image.set_sform(np.diag([2.0, 2, 2, 1]) @ affine, code=4)
    image.header.set_xyzt_units("mm", "sec")
    for text in ("descrip", "data_type", "db_name", "intent_name", "aux_file"):
        image.header[text] = b"Jane Doe"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    path = save_image(ramp())
    nib.save(image, path)
    volume = read_volume([path])
    stored = encode_labels(np.ones((4, 5, 6), np.uint8), volume)
    result = decode(stored).header
    for field in ("qform_code", "sform_code", "pixdim", "xyzt_units", "qoffset_x", "quatern_b"):
        np.testing.assert_array_equal(result[field], volume.header[field])
    np.testing.assert_array_equal(result.get_best_affine(), volume.affine)
    assert b"Jane Doe" not in gzip.decompress(stored)


def test_arrays_without_a_file_get_their_affine_back() -> None:
    affine = np.diag([-1.0, 2, 3, 1])
    stored = encode_labels(np.ones((4, 5, 6), np.uint8), Volume([ramp()], affine))
    np.testing.assert_array_equal(decode(stored).affine, affine)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_any_orientation_turns_and_turns_back_voxel_exact(orientation: str) -> None:
    codes = nib.orientations.axcodes2ornt(tuple(orientation))
    image = nib.Nifti1Image(ramp(), np.diag([1.0, 2, 3, 1])).as_reoriented(codes)
    volume = Volume([np.asarray(image.dataobj)], image.affine)
    turned = volume.oriented("LPS")
    assert turned.orientation == "LPS"
    back = reorient(turned.channels[0], "LPS", volume.orientation)
    np.testing.assert_array_equal(back, volume.channels[0])
    # The same voxel keeps its world coordinates.
    index = np.argwhere(turned.channels[0] == 17)[0]
    original = np.argwhere(volume.channels[0] == 17)[0]
    world = nib.affines.apply_affine(turned.affine, index)
    np.testing.assert_allclose(world, nib.affines.apply_affine(volume.affine, original))


def damaged(stored: bytes, kind: str) -> bytes:
    if kind == "half":
        return stored[: len(stored) // 2]
    if kind == "no trailer":
        return stored[:-8]
    if kind == "crc":
        return stored[:-8] + bytes([stored[-8] ^ 1]) + stored[-7:]
    if kind == "body":
        return stored[:60] + bytes([stored[60] ^ 0xFF]) + stored[61:]
    if kind == "empty":
        return b""
    if kind == "junk after":
        return stored + b"junk"
    return b"not gzip at all"


@pytest.mark.parametrize(
    "kind", ["half", "no trailer", "crc", "body", "empty", "junk after", "text"]
)
def test_a_damaged_gzip_stream_is_refused(save_image: SaveImage, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 2000, (20, 20, 20)).astype(np.int16)
    path = save_image(noise)
    path.write_bytes(damaged(path.read_bytes(), kind))
    with pytest.raises(VolumeError, match=rf"^{path}: .*(copy|download)"):
        read_volume([path])


def test_a_stream_of_several_gzip_members_is_read_whole(save_image: SaveImage) -> None:
    path = save_image(ramp((20, 20, 20)))
    plain = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(plain[:5000]) + gzip.compress(plain[5000:]))
    np.testing.assert_array_equal(read_volume([path]).channels[0], ramp((20, 20, 20)))


def test_a_truncated_plain_file_is_refused(save_image: SaveImage) -> None:
    path = save_image(ramp(), "a.nii")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VolumeError, match="its header promises 592"):
        read_volume([path])


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6, 2), (4, 5, 1, 6)])
def test_only_3d_images_are_taken(save_image: SaveImage, shape: tuple[int, ...]) -> None:
    with pytest.raises(VolumeError, match="is not a 3-D image"):
        read_volume([save_image(ramp(shape))])


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 2), (4, 5, 6, 4)])
def test_a_file_with_another_number_of_volumes_is_refused(
    save_image: SaveImage, shape: tuple[int, ...]
) -> None:
    path = save_image(ramp(shape))
    with pytest.raises(VolumeError, match="is not one 4-D image of 3 volumes") as caught:
        read_volume([path] * 3)
    assert str(caught.value).startswith(f"{path}: shape {shape} ")
    assert "\n" not in str(caught.value)


def test_a_volume_of_zeros_in_a_4d_file_is_refused(save_image: SaveImage) -> None:
    array = np.stack([ramp(), np.zeros((4, 5, 6), np.int16)], axis=-1)
    with pytest.raises(VolumeError, match="holds only zeros"):
        read_volume([save_image(array)] * 2)


def test_labels_share_the_grid_of_a_4d_scan(save_image: SaveImage) -> None:
    scan = save_image(ramp((4, 5, 6, 2)), "scan.nii")
    assert read_labels(save_image(ramp(), "good.nii"), scan, 2).shape == (4, 5, 6)
    other = save_image(ramp((4, 5, 7)), "other.nii")
    with pytest.raises(
        VolumeError, match=r"other\.nii: shape \(4, 5, 7\) differs from \(4, 5, 6\)"
    ):
        read_labels(other, scan, 2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_counted_and_placed(
    save_image: SaveImage, value: float
) -> None:
    array = ramp().astype(np.float32)
    array[1, 2, 3] = array[3, 4, 5] = value
    with pytest.raises(VolumeError, match=r"2 voxels are NaN or infinite, the first at \(1, 2, 3"):
        read_volume([save_image(array)])


def test_an_image_of_nan_takes_no_memory_to_report() -> None:
    voxels = np.full((100, 100, 100), np.nan, np.float32)
    tracemalloc.start()
    with pytest.raises(VolumeError, match=r"1000000 voxels are NaN .* the first at \(0, 0, 0\)"):
        check_finite("channel 1", voxels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6  # one byte per voxel, in place of 24 for its index


def test_voxels_beyond_the_range_of_float32_are_refused() -> None:
    with pytest.raises(
        VolumeError, match=r"channel 1: holds values up to 1e\+200, beyond the range"
    ):
        check_finite("channel 1", np.array([1, -1e200]))
    check_finite("channel 1", np.array([1, -3e38]))  # the largest float32 is 3.4e38


def test_complex_and_rgb_voxels_are_refused(save_image: SaveImage) -> None:
    with pytest.raises(VolumeError, match="not real numbers"):
        read_volume([save_image(ramp().astype(np.complex64))])


def test_a_channel_of_zeros_is_refused_by_name(save_image: SaveImage) -> None:
    paths = [save_image(ramp(), "a.nii"), save_image(np.zeros((4, 5, 6), np.int16), "b.nii")]
    with pytest.raises(VolumeError, match=r"b\.nii: holds only zeros"):
        read_volume(paths)


def test_an_empty_label_file_is_read(save_image: SaveImage) -> None:
    path = save_image(np.zeros((4, 5, 6), np.uint8))
    assert not read_labels(path).channels[0].any()
    scan = save_image(ramp(), "scan.nii", np.diag([-1.0, 1, 1, 1]))
    with pytest.raises(VolumeError, match=r"image\.nii\.gz: its grid is up to 3 mm away from"):
        read_labels(path, scan)


@pytest.mark.parametrize(("code", "name", "length"), [(1, "meter", 1e-3), (3, "micron", 1e3)])
def test_other_units_are_converted_and_warned_of(
    save_image: SaveImage, code: int, name: str, length: float
) -> None:
    affine = np.diag([2 * length, 2 * length, 3 * length, 1])
    affine[:3, 3] = 7 * length
    volume = read_volume([save_image(ramp(), affine=affine, xyzt_units=code)])
    np.testing.assert_allclose(volume.spacing_mm, (2, 2, 3), rtol=1e-6)
    np.testing.assert_allclose(volume.affine[:3, 3], 7, rtol=1e-6)
    assert f"states its unit as {name}; converted to mm" in volume.warnings[0]
    labels = decode(encode_labels(np.ones((4, 5, 6), np.uint8), volume))
    np.testing.assert_allclose(labels.affine, affine, rtol=1e-6)  # in the unit of the scan
    assert labels.header["xyzt_units"] == code


@pytest.mark.parametrize("code", [4, 5, 6, 7, 4 | 8])
def test_an_undefined_unit_is_warned_of(save_image: SaveImage, code: int) -> None:
    (warning,) = read_volume([save_image(ramp(), xyzt_units=code)]).warnings
    assert f"states its unit as undefined code {code & 7}; mm is assumed" in warning


@pytest.mark.parametrize("code", [2 | 56, 56, 2 | 64])
def test_an_undefined_unit_of_time_does_not_matter(save_image: SaveImage, code: int) -> None:
    assert read_volume([save_image(ramp(), xyzt_units=code)]).warnings == ()


def test_a_header_is_refused_with_its_reason_and_without_noise(
    save_image: SaveImage, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_image(ramp(), "a.nii")
    stored = bytearray(path.read_bytes())
    stored[70:72] = (999).to_bytes(2, "little")  # datatype
    path.write_bytes(stored)
    with pytest.raises(VolumeError, match=r"its NIfTI header is damaged .*data code 999"):
        read_volume([path])
    assert capsys.readouterr() == ("", "")


def test_arrays_are_checked_as_strictly_as_files() -> None:
    good = np.ones((4, 5, 6), np.float32)
    bad = good.copy()
    bad[1, 2, 3] = np.nan
    for channels, message in (
        ([good, bad], r"channel 2: 1 voxels are NaN or infinite, the first at \(1, 2, 3\)"),
        ([good, good[1:]], "channel 2: shape .* differs from .* of channel 1"),
        ([good[0]], r"channel 1: expected a 3-D array \(X, Y, Z\) of real numbers"),
        ([good.astype(complex)], r"channel 1: expected a 3-D array \(X, Y, Z\) of real numbers"),
    ):
        with pytest.raises(VolumeError, match=message):
            check_volume(Volume(channels, np.eye(4)))
    with pytest.raises(VolumeError, match="expected a numpy array, got Nifti1Image"):
        check_volume(Volume([nib.Nifti1Image(good, np.eye(4))], np.eye(4)))
    with pytest.raises(VolumeError, match=r"its affine must be \(4, 4\), got \(3, 3\)"):
        check_volume(Volume([good], np.eye(3)))
    with pytest.raises(VolumeError, match="volume: its affine is singular"):
        check_volume(Volume([good], np.zeros((4, 4))))


def test_channels_on_different_grids_are_refused(save_image: SaveImage) -> None:
    first = save_image(ramp(), "a.nii")
    with pytest.raises(VolumeError, match=r"b\.nii: shape \(4, 5, 7\) differs from \(4, 5, 6\)"):
        read_volume([first, save_image(ramp((4, 5, 7)), "b.nii")])
    shifted = nib.affines.from_matvec(np.eye(3), [0, 0, 1])
    with pytest.raises(
        VolumeError, match=r"c\.nii: its grid is up to 1 mm away from that of a\.nii"
    ):
        read_volume([first, save_image(ramp(), "c.nii", shifted)])


def test_a_header_rounded_in_float32_is_the_same_grid(save_image: SaveImage) -> None:
    near = nib.affines.from_matvec(np.eye(3), [0, 0, 1e-5])
    read_volume([save_image(ramp(), "a.nii"), save_image(ramp(), "b.nii", near)])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"gone\.nii: cannot be read \(No such file"):
        read_volume([tmp_path / "gone.nii"])


def test_a_header_without_orientation_is_warned_of(save_image: SaveImage) -> None:
    path = save_image(ramp(), "a.nii")
    stored = bytearray(path.read_bytes())
    stored[252:256] = bytes(4)  # qform_code and sform_code
    path.write_bytes(stored)
    assert "states no orientation" in read_volume([path]).warnings[0]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    position=st.integers(0, 351),
    value=st.integers(0, 255),
    length=st.integers(0, 600),
)
def test_any_header_gives_an_image_or_one_clear_error(
    tmp_path: Path, position: int, value: int, length: int
) -> None:
    stream = io.BytesIO(nib.Nifti1Image(ramp(), np.eye(4)).to_bytes())
    stored = bytearray(stream.getvalue())
    stored[position] = value
    path = tmp_path / "fuzzed.nii"
    path.write_bytes(bytes(stored[:length]) if length < 350 else bytes(stored))
    message = ""
    try:
        volume = read_volume([path])
    except VolumeError as error:
        message = str(error)
    if message:
        assert "fuzzed.nii" in message
        assert "\n" not in message
    else:
        assert len(volume.shape) == 3
        assert np.isfinite(volume.channels[0]).all()


@pytest.mark.parametrize("shape", [(4, 5, 6, 1), (4, 5, 6, 1, 1)])
def test_trailing_axes_of_one_are_dropped_from_files_and_arrays(
    save_image: SaveImage, shape: tuple[int, ...]
) -> None:
    array = ramp((4, 5, 6)).reshape(shape)
    assert read_volume([save_image(array)]).shape == (4, 5, 6)
    assert Volume([array, array], np.eye(4)).shape == (4, 5, 6)
    assert Volume(np.stack([array, array]), np.eye(4)).shape == (4, 5, 6)


def test_trailing_axes_of_one_are_dropped_from_a_4d_file(save_image: SaveImage) -> None:
    path = save_image(ramp((4, 5, 6, 2)).reshape(4, 5, 6, 2, 1))
    assert len(read_volume([path] * 2).channels) == 2


@pytest.mark.parametrize("channels", [None, [], (), 7, np.array(3.0)])
def test_a_volume_without_channels_is_refused(channels: Any) -> None:
    with pytest.raises(VolumeError, match=r"channels: expected arrays \(X, Y, Z\)"):
        Volume(channels, np.eye(4))


@pytest.mark.parametrize("edges", [(1.0, 1.0, 3.0), (3.2, 3.2, 0.8), (1.5, 0.9765625, 1.5)])
def test_voxel_sizes_of_oblique_scans_are_those_of_the_header(
    tmp_path: Path, edges: tuple[float, float, float]
) -> None:
    """The affine holds float32, so that the norm of an axis is 3.00000004, for example."""
    rng, norms = np.random.default_rng(0), []
    for index in range(8):
        turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
        affine = np.eye(4)
        affine[:3, :3] = turn * np.array(edges)
        file = tmp_path / f"{index}.nii"
        image = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), affine)
        nib.save(image, file)
        volume = read_volume([file])
        norms.append(np.linalg.norm(volume.affine[:3, :3], axis=0))
        assert volume.spacing_mm == tuple(np.float32(edge) for edge in edges)
        turned = volume.oriented("RAS")
        assert sorted(turned.spacing_mm) == sorted(np.float32(edge) for edge in edges)
    assert any(tuple(own) != edges for own in norms)
    scaled = replace(volume, affine=volume.affine @ np.diag([2.0, 2.0, 2.0, 1.0]))
    np.testing.assert_allclose(scaled.spacing_mm, 2 * np.array(edges), rtol=1e-6)


def test_an_affine_may_be_a_list_and_must_hold_numbers() -> None:
    assert Volume([ramp()], np.diag([2.0, 3, 4, 1]).tolist()).spacing_mm == (2, 3, 4)
    for affine in (None, "eye", [[1, 2], [3]], np.eye(4) * 1j):
        with pytest.raises(VolumeError, match="volume: its affine must be"):
            check_volume(Volume([ramp()], affine))


@pytest.mark.parametrize("shift_mm", [0.0035, 0.05, 0.099])
@pytest.mark.parametrize("origin_mm", [0, 1000])
def test_grids_closer_than_a_tenth_of_a_voxel_are_one(
    save_image: SaveImage, shift_mm: float, origin_mm: float
) -> None:
    first, second = (
        nib.affines.from_matvec(np.eye(3), [0, 0, origin_mm + shift]) for shift in (0, shift_mm)
    )
    read_volume([save_image(ramp(), "a.nii", first), save_image(ramp(), "b.nii", second)])


@pytest.mark.parametrize("origin_mm", [0, 1000])
def test_the_distance_of_two_grids_is_that_of_the_farthest_corner(
    save_image: SaveImage, origin_mm: float
) -> None:
    # 1.05 mm against 1 mm along Z: voxel 5 of 6 is 0.25 mm apart.
    first, second = (
        nib.affines.from_matvec(np.diag([1, 1, spacing]), [0, 0, origin_mm])
        for spacing in (1, 1.05)
    )
    with pytest.raises(VolumeError, match=r"b\.nii: its grid is up to 0\.25 mm away"):
        read_volume([save_image(ramp(), "a.nii", first), save_image(ramp(), "b.nii", second)])


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_channel_stored_in_another_axis_order_is_turned(
    save_image: SaveImage, orientation: str, tmp_path: Path
) -> None:
    image = nib.Nifti1Image(
        ramp(), np.array([[1.0, 0, 0, 7], [0, 2, 0, 8], [0, 0, 3, 9], [0, 0, 0, 1]])
    )
    codes = nib.orientations.axcodes2ornt(tuple(orientation))
    nib.save(image, tmp_path / "a.nii")
    nib.save(image.as_reoriented(codes), tmp_path / "b.nii")
    volume = read_volume([tmp_path / "a.nii", tmp_path / "b.nii"])
    np.testing.assert_array_equal(volume.channels[1], ramp())
    labels = read_labels(tmp_path / "b.nii", tmp_path / "a.nii")
    np.testing.assert_array_equal(labels.channels[0], ramp())
    np.testing.assert_array_equal(labels.affine, image.affine)


def test_a_grid_that_differs_names_the_doubt_about_its_file(save_image: SaveImage) -> None:
    affine = nib.affines.from_matvec(np.diag([-1, -1, 1]), [90, 60, -20])
    other = save_image(ramp(), "b.nii", affine)
    content = bytearray(other.read_bytes())
    content[252:256] = bytes(4)  # qform_code and sform_code
    other.write_bytes(content)
    with pytest.raises(VolumeError, match=r"b\.nii: its grid is .*; it states no orientation"):
        read_volume([save_image(ramp(), "a.nii", affine), other])


@pytest.mark.parametrize(
    "axes",
    [
        [[1, 1, 0], [0, 1e-4, 0], [0, 0, 1]],  # two axes that are almost one
        [[1, 0, 0], [0, 1, 0], [0, 0, 0]],
        [[1e200, 0, 0], [0, 1, 0], [0, 0, 1]],
    ],
)
def test_an_affine_whose_axes_do_not_span_space_is_refused(axes: list[list[float]]) -> None:
    affine = nib.affines.from_matvec(np.array(axes))
    with pytest.raises(VolumeError, match="volume: its affine is"):
        check_volume(Volume([ramp()], affine))
    small = nib.affines.from_matvec(np.eye(3) * 1e-5)  # small voxels are not singular
    check_volume(Volume([ramp()], small))


def test_masked_arrays_and_other_types_are_refused_with_their_type() -> None:
    masked = np.ma.masked_array(ramp(), ramp() > 5)
    with pytest.raises(VolumeError, match="channel 1: is a masked array; fill the masked voxels"):
        check_volume(Volume([masked], np.eye(4)))
    for dtype in (complex, bool, object):
        with pytest.raises(VolumeError, match=r"got \(4, 5, 6\) of (complex128|bool|object)"):
            check_volume(Volume([ramp().astype(dtype)], np.eye(4)))


def test_an_affine_that_is_no_affine_is_refused() -> None:
    with pytest.raises(VolumeError, match="its affine must end in the row 0, 0, 0, 1"):
        check_volume(Volume([ramp()], np.diag([1, 1, 1, 2])))
