from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from attnseg.runtime.case.nifti import read_volume
from attnseg.runtime.case.scans import find_cases, find_scans, find_siblings
from attnseg.runtime.errors import ConfigError, ScanError
from attnseg.runtime.task import BRATS_CHANNELS, Channel
from tests.conftest import SaveImage

ANY_FILE = ("",)
MRI = (Channel("flair", ANY_FILE), Channel("t1", ANY_FILE), Channel("t2", ANY_FILE))

LAYOUTS = {
    "2018": ("Brats18_A_1", ("_t1", "_t1ce", "_t2", "_flair"), ".nii.gz"),
    "2020": ("BraTS20_Training_001", ("_t1", "_t1ce", "_t2", "_flair"), ".nii"),
    "2021": ("BraTS2021_00000", ("_t1", "_t1ce", "_t2", "_flair"), ".nii.gz"),
    "2023": ("BraTS-GLI-00000-000", ("-t1n", "-t1c", "-t2w", "-t2f"), ".nii.gz"),
}


def touch(folder: Path, name: str, suffixes: tuple[str, ...], extension: str = ".nii.gz") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in suffixes:
        (folder / f"{name}{suffix}{extension}").touch()
    return folder


@pytest.mark.parametrize("year", LAYOUTS)
def test_each_brats_layout_is_read_in_channel_order(tmp_path: Path, year: str) -> None:
    name, suffixes, extension = LAYOUTS[year]
    touch(tmp_path / name, name, (*suffixes, "_seg"), extension)
    (case,) = find_cases(tmp_path).cases
    assert case.name == name
    assert [f.name for f in case.files] == [f"{name}{s}{extension}" for s in suffixes]


def test_nested_grade_folders_and_flat_folders_are_walked(tmp_path: Path) -> None:
    suffixes = LAYOUTS["2018"][1]
    touch(tmp_path / "HGG" / "a", "a", suffixes)
    touch(tmp_path / "LGG" / "b", "b", suffixes)
    touch(tmp_path, "c", suffixes)
    touch(tmp_path, "d", suffixes)
    assert sorted(c.name for c in find_cases(tmp_path).cases) == ["a", "b", "c", "d"]


def test_a_single_case_folder_is_a_folder_of_one_case(tmp_path: Path) -> None:
    folder = touch(tmp_path / "a", "a", LAYOUTS["2018"][1])
    assert [c.name for c in find_cases(folder).cases] == ["a"]


def test_files_named_by_modality_alone_take_the_folders_name(tmp_path: Path) -> None:
    touch(tmp_path / "patient7", "", ("t1", "t1ce", "t2", "flair"))
    assert [c.name for c in find_cases(tmp_path).cases] == ["patient7"]


def test_hidden_files_and_results_are_not_taken_for_channels(tmp_path: Path) -> None:
    folder = touch(tmp_path / "a", "a", (*LAYOUTS["2018"][1], "_seg"))
    touch(folder, "._a", LAYOUTS["2018"][1])
    touch(folder / ".cache", "z", LAYOUTS["2018"][1])
    assert [c.name for c in find_cases(tmp_path).cases] == ["a"]


def test_missing_modalities_are_named_and_do_not_hide_other_cases(tmp_path: Path) -> None:
    touch(tmp_path / "a", "a", ("_t1", "_t2"))
    touch(tmp_path / "b", "b", LAYOUTS["2018"][1])
    scans = find_cases(tmp_path)
    assert [c.name for c in scans.cases] == ["b"]
    assert "no file for t1ce" in str(scans.problems["a"])
    assert "flair" in str(scans.problems["a"])


def test_two_files_for_one_modality_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a", LAYOUTS["2018"][1])
    touch(tmp_path, "a", ("_t1",), ".nii")
    scans = find_cases(tmp_path)
    assert not scans.cases
    assert "several files for t1" in str(scans.problems["a"])


def test_the_second_case_of_a_name_is_a_problem(tmp_path: Path) -> None:
    touch(tmp_path / "HGG" / "a", "a", LAYOUTS["2018"][1])
    touch(tmp_path / "LGG" / "a", "a", LAYOUTS["2018"][1])
    scans = find_cases(tmp_path)
    assert len(scans.cases) == 1
    (problem,) = scans.problems.values()
    assert "same name" in str(problem)


def test_a_name_that_is_not_utf_8_is_a_problem_and_hides_no_other_case(tmp_path: Path) -> None:
    suffixes = LAYOUTS["2018"][1]
    touch(tmp_path, "M\udcfcller", suffixes)  # Latin-1 for Mueller with an umlaut
    touch(tmp_path, "a", suffixes)
    scans = find_cases(tmp_path)
    assert [case.name for case in scans.cases] == ["a"]
    cause = f"{tmp_path}: the name of case M\\udcfcller is not UTF-8; rename its files"
    assert {name: str(error) for name, error in scans.problems.items()} == {"M\\udcfcller": cause}
    files = {c.name: tmp_path / f"M\udcfcller_{c.name}.nii.gz" for c in BRATS_CHANNELS}
    with pytest.raises(ScanError, match=r"the name of case M\\udcfcller is not UTF-8"):
        find_scans(None, files, BRATS_CHANNELS)


def test_a_link_in_a_circle_ends(tmp_path: Path) -> None:
    touch(tmp_path / "a", "a", LAYOUTS["2018"][1])
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert len(find_cases(tmp_path).cases) == 1


def test_empty_and_absent_folders_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ScanError, match=r"holds no case; expected files such as \*_t1\.nii\.gz"):
        find_cases(tmp_path)
    with pytest.raises(ScanError, match="does not exist"):
        find_cases(tmp_path / "nowhere")
    file = tmp_path / "a_t1.nii.gz"
    file.touch()
    with pytest.raises(ScanError, match="is not a folder"):
        find_cases(file)


def test_files_given_by_channel_make_a_case(tmp_path: Path) -> None:
    files = {c.name: tmp_path / f"x_{c.name}.nii.gz" for c in BRATS_CHANNELS}
    (case,) = find_scans(None, files, BRATS_CHANNELS).cases
    assert case.name == "x"
    assert case.files == tuple(files.values())


def test_files_given_by_channel_must_be_all_and_only_the_models(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="no file given for t1ce, t2, flair; give one for each channel"
    ):
        find_scans(None, {"t1": tmp_path}, BRATS_CHANNELS)
    with pytest.raises(ConfigError, match="no channel ct"):
        find_scans(None, {"ct": tmp_path}, BRATS_CHANNELS)
    with pytest.raises(
        ConfigError, match="no scan was given; give a scan folder or one file per channel"
    ):
        find_scans(None, {}, BRATS_CHANNELS)


def test_another_model_brings_its_own_suffixes(tmp_path: Path) -> None:
    touch(tmp_path, "liver_1", ("_0000",))
    (case,) = find_cases(tmp_path, [Channel("ct", ("_0000",))]).cases
    assert case.name == "liver_1"


def test_siblings_are_found_by_their_suffix(tmp_path: Path) -> None:
    folder = touch(tmp_path / "a", "a", (*LAYOUTS["2018"][1], "_seg"))
    touch(tmp_path / "b", "", ("t1", "t1ce", "t2", "flair", "seg"))  # named by its folder
    cases = find_cases(tmp_path).cases
    assert find_siblings(cases, ("_seg",)) == {
        "a": [folder / "a_seg.nii.gz"],
        "b": [tmp_path / "b" / "seg.nii.gz"],
    }
    assert find_siblings(cases, ("_mask",)) == {"a": [], "b": []}


def test_a_folder_of_many_cases_is_listed_once_for_their_siblings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(20):
        touch(tmp_path, f"case{index}", (*LAYOUTS["2018"][1], "_seg"))
    cases, listed = find_cases(tmp_path).cases, []
    real = Path.iterdir

    def iterdir(folder: Path) -> Iterator[Path]:
        listed.append(folder)
        return real(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    found = find_siblings(cases, ("_seg",))
    assert {name: [f.name for f in files] for name, files in found.items()} == {
        f"case{index}": [f"case{index}_seg.nii.gz"] for index in range(20)
    }
    assert listed == [tmp_path]


def test_a_case_named_by_its_folder_keeps_the_name_from_inside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = touch(tmp_path / "patient7", "", ("t1", "t1ce", "t2", "flair"))
    monkeypatch.chdir(folder)
    assert [c.name for c in find_cases(Path()).cases] == ["patient7"]
    files = {c.name: Path(f"{c.name}.nii.gz") for c in BRATS_CHANNELS}
    assert [c.name for c in find_scans(None, files, BRATS_CHANNELS).cases] == ["patient7"]


def test_folders_with_the_name_of_an_image_are_no_files(tmp_path: Path) -> None:
    folder = touch(tmp_path / "a", "a", LAYOUTS["2018"][1])
    (folder / "b_t1.nii").mkdir()
    assert [c.name for c in find_cases(tmp_path).cases] == ["a"]


def test_a_subfolder_that_cannot_be_read_hides_no_other_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "a", "a", LAYOUTS["2018"][1])
    (tmp_path / "lost+found").mkdir()
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    scans = find_cases(tmp_path)
    assert [c.name for c in scans.cases] == ["a"]
    (problem,) = scans.problems.values()
    assert "lost+found: cannot be read (Permission denied)" in str(problem)


def test_a_folder_whose_files_cannot_be_looked_at_hides_no_other_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "a", "a", LAYOUTS["2018"][1])
    touch(tmp_path / "b", "b", LAYOUTS["2018"][1])
    real = Path.is_file

    def is_file(path: Path) -> bool:
        if path.parent.name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    scans = find_cases(tmp_path)
    assert [c.name for c in scans.cases] == ["b"]
    (problem,) = scans.problems.values()
    assert "cannot be read (Permission denied)" in str(problem)


def test_every_image_but_a_label_file_is_a_case_of_the_empty_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "liver_1", ("", "_seg", "-seg", "_SEG"))
    touch(tmp_path, "liver_2", ("",), ".nii")
    touch(tmp_path / "more", "spleen", ("",))
    cases = find_cases(tmp_path, (Channel("ct", ANY_FILE),)).cases
    assert [c.name for c in cases] == ["liver_1", "liver_2", "spleen"]
    assert [f.name for f in cases[0].files] == ["liver_1.nii.gz"]


def test_the_volumes_of_a_4d_file_are_the_channels_in_order(
    tmp_path: Path, save_image: SaveImage
) -> None:
    array = np.arange(1, 4 * 5 * 6 * 3 + 1, dtype=np.int16).reshape(4, 5, 6, 3)
    path = save_image(array, "brain_7.nii.gz", np.diag([2.0, 3, 4, 1]))
    save_image(array[..., 0], "brain_7_seg.nii.gz")
    (case,) = find_cases(tmp_path, MRI).cases
    assert (case.name, case.files) == ("brain_7", (path, path, path))
    volume = read_volume(case.files)
    for index, channel in enumerate(volume.channels):
        np.testing.assert_array_equal(channel, array[..., index])
    assert volume.spacing_mm == (2, 3, 4)


def test_two_cases_of_the_empty_suffix_with_one_name_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "liver_1", ("",))
    touch(tmp_path, "liver_1", ("",), ".nii")
    scans = find_cases(tmp_path, MRI)
    assert not scans.cases
    expected = "case liver_1 has several files for flair (liver_1.nii, liver_1.nii.gz); keep one"
    assert expected in str(scans.problems["liver_1"])


def test_a_folder_of_label_files_holds_no_case(tmp_path: Path) -> None:
    touch(tmp_path, "liver_1", ("_seg",))
    with pytest.raises(ScanError, match=r"holds no case; expected files such as \*\.nii\.gz"):
        find_cases(tmp_path, MRI)


def test_one_4d_file_may_be_given_by_channel(tmp_path: Path) -> None:
    file = tmp_path / "x.nii.gz"
    (case,) = find_scans(None, dict.fromkeys(("flair", "t1", "t2"), file), MRI).cases
    assert (case.name, case.files) == ("x", (file,) * 3)


BRATS = LAYOUTS["2018"][1]


@pytest.mark.parametrize(
    "endings",
    [
        ("_0000", "_0001", "_0002", "_0003"),
        ("_T1_to_SRI_brain", "_T2_to_SRI_brain"),
        ("_AX_T1_PRE",),
    ],
)
def test_a_folder_of_images_that_match_no_channel_is_a_problem(
    tmp_path: Path, endings: tuple[str, ...]
) -> None:
    touch(tmp_path / "good", "good", BRATS)
    touch(tmp_path / "other", "other", (*endings, "_seg"))
    scans = find_cases(tmp_path)
    assert [c.name for c in scans.cases] == ["good"]
    (problem,) = scans.problems.values()
    assert str(problem).startswith(f"{tmp_path / 'other'}: ")
    assert f"other{endings[0]}.nii.gz" in str(problem)
    assert "no channel of the model" in str(problem)
    assert "name them *_t1.nii.gz, *_t1ce.nii.gz" in str(problem)
    assert "t1='FILE'" in str(problem)


@pytest.mark.parametrize(
    "names",
    [
        ["other_0000", "other_0001", "other_0002", "other_0003"],
        ["p2_T1_to_SRI_brain", "p2_T1CE_to_SRI_brain", "p2_T2_to_SRI_brain"],
        ["good2_0000"],  # not a file of the case good
        ["p2_T1w", "p3_T1w"],
    ],
)
def test_a_patient_without_a_matching_file_is_a_problem_in_a_flat_folder(
    tmp_path: Path, names: list[str]
) -> None:
    touch(tmp_path, "good", (*BRATS, "_seg", "_t1_original"))
    for name in names:
        touch(tmp_path, name, ("",))
    scans = find_cases(tmp_path)
    assert [c.name for c in scans.cases] == ["good"]
    (problem,) = scans.problems.values()
    assert f"{min(names)}.nii.gz" in str(problem)
    assert "no channel of the model" in str(problem)


def test_a_folder_of_another_format_beside_cases_is_a_problem(tmp_path: Path) -> None:
    touch(tmp_path / "p1", "p1", BRATS)
    (tmp_path / "p1" / "source").mkdir()
    (tmp_path / "p1" / "source" / "a.dcm").touch()  # more files of p1
    (tmp_path / "p2").mkdir()
    (tmp_path / "p2" / "a.dcm").touch()
    scans = find_cases(tmp_path)
    assert [c.name for c in scans.cases] == ["p1"]
    assert list(scans.problems) == ["p2"]


def test_other_images_beside_the_files_of_a_case_are_no_problem(tmp_path: Path) -> None:
    touch(tmp_path / "a", "a", (*BRATS, "_seg", "_mask", "_t1_original"))
    touch(tmp_path / "a", "atlas", ("",))
    touch(tmp_path / "a" / "t1w_raw", "scanner", ("",))
    touch(tmp_path / "templates", "MNI152_brain", ("",))
    touch(tmp_path / "patient7", "", ("t1", "t1ce", "t2", "flair", "mask", "atlas"))
    scans = find_cases(tmp_path)
    assert [c.name for c in scans.cases] == ["a", "patient7"]
    assert scans.problems == {}


def test_label_folders_beside_image_folders_are_not_searched(tmp_path: Path) -> None:
    for part in ("Tr", "Ts"):
        touch(tmp_path / f"images{part}", f"liver_{part}", ("",))
        touch(tmp_path / f"labels{part}", f"liver_{part}", ("",))
    touch(tmp_path / "labelsOfOthers", "spleen", ("",))
    cases = find_cases(tmp_path, (Channel("ct", ANY_FILE),)).cases
    assert [c.name for c in cases] == ["liver_Tr", "liver_Ts", "spleen"]


def test_a_file_may_be_given_if_it_holds_every_channel(tmp_path: Path) -> None:
    file = tmp_path / "x.nii.gz"
    file.touch()
    for channels in ((Channel("ct", ANY_FILE),), MRI, (Channel("ct", ("_0000",)),)):
        (case,) = find_scans(file, {}, channels).cases
        assert (case.name, case.files) == ("x", (file,) * len(channels))
    with pytest.raises(ScanError, match="is one file, the model takes t1, t1ce, t2, flair; give"):
        find_scans(file, {}, BRATS_CHANNELS)
    (tmp_path / "x.dcm").touch()
    with pytest.raises(ScanError, match=r"x\.dcm: is neither a folder nor a \.nii"):
        find_scans(tmp_path / "x.dcm", {}, MRI)


def test_one_file_for_two_channels_is_refused(tmp_path: Path) -> None:
    files = {c.name: tmp_path / f"x_{c.name}.nii.gz" for c in BRATS_CHANNELS}
    files["t2"] = files["t1"]
    with pytest.raises(ConfigError, match=r"x_t1\.nii\.gz: was given for t1 and for t2"):
        find_scans(None, files, BRATS_CHANNELS)


def test_a_folder_in_place_of_an_image_is_named(tmp_path: Path) -> None:
    touch(tmp_path / "a", "a", BRATS[:3])
    touch(tmp_path / "a" / "a_flair.nii", "a", ("_flair",))
    scans = find_cases(tmp_path)
    (problem,) = scans.problems.values()
    assert "has no file for flair" in str(problem)
    assert "move the image out of the folder a_flair.nii" in str(problem)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.dcm", b"", "DICOM files; convert each series with dcm2niix"),
        ("IM000001", b"\0" * 128 + b"DICM", "DICOM files; convert each series with dcm2niix"),
        ("a.img", b"", r"pairs of \.hdr and \.img; convert them"),
        ("a.nrrd", b"", "NRRD images; convert them"),
        ("a.mgz", b"", "FreeSurfer images; convert them"),
    ],
)
def test_a_folder_of_images_in_another_format_says_which(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / name).write_bytes(content)
    scans = find_cases(tmp_path)
    assert scans.cases == ()
    (problem,) = scans.problems.values()
    assert re.search(f"series: holds no case, but {message}", str(problem))


def test_a_misnamed_file_of_a_case_is_named_in_the_mend(tmp_path: Path) -> None:
    touch(tmp_path / "b", "b", ("_t1ce", "_t2", "_flair", "_T1w_pre"))
    (problem,) = find_cases(tmp_path).problems.values()
    assert (
        "case b has no file for t1 (*_t1 or *-t1n); rename the file, perhaps b_T1w_pre.nii.gz"
        in (str(problem))
    )
    assert "t1='FILE'" in str(problem)
