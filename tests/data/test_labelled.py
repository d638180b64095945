from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from attnseg.data.labelled import LabelledCase, check_labels, find_labelled_cases, read_classes
from attnseg.data.split import read_split
from attnseg.data.task import BRATS
from attnseg.runtime.errors import ScanError, TrainingError
from attnseg.runtime.task import BRATS_CHANNELS
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.data_set import DataSet, open_data_set

ISOTROPIC = (1.0, 1.0, 1.0)


def write_tiny(
    folder: Path,
    name: str,
    spacing_mm: tuple[float, float, float] = ISOTROPIC,
    orientation: str = "LPS",
) -> Path:
    """A case of 4 x 5 x 6 voxels whose size along L, P and S is `spacing_mm`."""
    target = folder / name
    target.mkdir(parents=True)
    affine = np.diag([-spacing_mm[0], -spacing_mm[1], spacing_mm[2], 1.0])
    image = np.arange(1, 121, dtype=np.int16).reshape(4, 5, 6)
    for suffix, array in (
        *((c.suffixes[0], image + i) for i, c in enumerate(BRATS_CHANNELS)),
        ("_seg", (image % 3).astype(np.uint8)),
    ):
        whole = nib.Nifti1Image(array, affine)
        codes = nib.orientations.axcodes2ornt(tuple(orientation))
        turn = nib.orientations.ornt_transform(nib.io_orientation(affine), codes)
        nib.save(whole.as_reoriented(turn), target / f"{name}{suffix}.nii.gz")
    return target


def rewrite_labels(case: LabelledCase, labels: np.ndarray) -> None:
    nib.save(nib.Nifti1Image(labels, nib.load(case.label).affine), case.label)


def labels_with(*values: int) -> np.ndarray:
    labels = np.zeros((4, 5, 6), np.uint8)
    labels[0, 0, : len(values)] = values
    return labels


def only(cases: Path) -> LabelledCase:
    (case,) = find_labelled_cases(cases).cases.values()
    return case


def test_a_case_without_labels_is_named(tmp_path: Path) -> None:
    (write_tiny(tmp_path, "small") / "small_seg.nii.gz").unlink()
    with pytest.raises(TrainingError, match="case small has no label file"):
        open_data_set(tmp_path, None, TrainConfig())


def test_a_case_with_two_label_files_is_refused_with_both(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "small")
    shutil.copy(folder / "small_seg.nii.gz", folder / "small-seg.nii.gz")
    message = r"case small has several label files \(small-seg.nii.gz, small_seg.nii.gz\); keep"
    with pytest.raises(TrainingError, match=message):
        open_data_set(tmp_path, None, TrainConfig())


def test_of_many_unusable_cases_the_first_is_named_and_the_rest_counted(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        write_tiny(tmp_path, name)
    for name in ("b", "d"):
        (tmp_path / name / f"{name}_seg.nii.gz").unlink()
    (tmp_path / "c" / "c_t2.nii.gz").unlink()
    scans = find_labelled_cases(tmp_path)
    assert (set(scans.cases), set(scans.faults)) == ({"a"}, {"b", "c", "d"})
    with pytest.raises(TrainingError, match=r"case \w has no .* \(and 2 more cases\)"):
        scans.refuse_faults()
    with pytest.raises(TrainingError, match="case c has no file for t2") as caught:
        scans.refuse_faults(["a", "c"])
    assert "more cases" not in str(caught.value)
    scans.refuse_faults(["a"])


def test_a_folder_without_cases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScanError, match="holds no case"):
        open_data_set(tmp_path, None, TrainConfig())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1, 2, 7), r"small_seg\.nii\.gz: holds labels \[0, 1, 2, 7\]; expected \[0, 1, 2, 3, 4\]"),
        ((1, 3, 4), r"holds labels \[0, 1, 3, 4\]; expected .* \(3 in place of 4, not both\)"),
    ],
)
def test_labels_that_are_none_are_refused(
    tmp_path: Path, values: tuple[int, ...], message: str
) -> None:
    write_tiny(tmp_path, "small")
    case = only(tmp_path)
    rewrite_labels(case, labels_with(*values))
    with pytest.raises(TrainingError, match=message):
        read_classes(case, BRATS)


@pytest.mark.parametrize("enhancing", [3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_enhancing_tumour_may_be_4_or_3(tmp_path: Path, enhancing: int, dtype: type) -> None:
    write_tiny(tmp_path, "small")
    case = only(tmp_path)
    rewrite_labels(case, labels_with(1, 2, enhancing).astype(dtype))
    classes = read_classes(case, BRATS).channels[0]
    assert classes.dtype == np.uint8
    assert classes[0, 0].tolist() == [1, 2, 3, 0, 0, 0]


def test_labels_on_another_grid_are_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path, "small")
    case = only(tmp_path)
    flipped = nib.load(case.label).affine @ np.diag([-1, 1, 1, 1])
    nib.save(nib.Nifti1Image(labels_with(1), flipped), case.label)
    with pytest.raises(TrainingError, match=r"small_seg\.nii\.gz: its grid is up to 3 mm away"):
        check_labels([case], BRATS)


def test_the_check_of_labels_names_every_bad_case(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        write_tiny(tmp_path, name)
    cases, done = find_labelled_cases(tmp_path).cases, []
    found = check_labels(cases.values(), BRATS, done.append)
    assert done == ["a", "b", "c", "d"]
    assert found == {name: {0, 1, 2} for name in done}
    rewrite_labels(cases["b"], labels_with(9))
    cases["c"].label.write_bytes(b"junk")
    rewrite_labels(cases["d"], np.zeros((4, 5, 7), np.uint8))
    with pytest.raises(TrainingError) as caught:
        check_labels(cases.values(), BRATS)
    message = str(caught.value)
    assert message.startswith(f"{cases['b'].label}: holds labels [0, 9]")
    assert "(also unusable: c, d); expected" in message
    assert "\n" not in message


def test_mixed_spacings_are_refused_with_both_cases_and_both_spacings(tmp_path: Path) -> None:
    write_tiny(tmp_path, "a")
    write_tiny(tmp_path, "b", (1.0, 0.9, 2.5))
    message = (
        r"mixed spacings: a has 1 x 1 x 1 mm, b has 1 x 0\.9 x 2\.5 mm; name one to resample to, "
        r"such as spacing_mm=\(1.0, 1.0, 1.0\)"
    )
    split = {"train": ["a"], "validation": ["b"]}
    with pytest.raises(TrainingError, match=message):
        open_data_set(tmp_path, split, TrainConfig())


def test_mixed_spacings_are_accepted_with_one_to_resample_to(tmp_path: Path) -> None:
    write_tiny(tmp_path, "a")
    write_tiny(tmp_path, "b", (1.0, 0.9, 2.5))
    config = TrainConfig(spacing_mm=(1.0, 1.0, 2.0))
    assert open_data_set(tmp_path, None, config).task.spacing_mm == (1, 1, 2)


def test_a_spacing_that_all_cases_share_becomes_the_tasks(tmp_path: Path) -> None:
    write_tiny(tmp_path, "a", (1.0, 0.9, 2.5))
    write_tiny(tmp_path, "b", (1.0, 0.9, 2.5), "SAR")  # on disk 2.5 x 0.9 x 1
    write_tiny(tmp_path, "c", (1.0, 0.9, 2.501))  # equal within 1 %
    assert open_data_set(tmp_path, None, TrainConfig()).task.spacing_mm == (1, 0.9, 2.5)


def test_the_spacing_of_cases_outside_the_split_does_not_matter(tmp_path: Path) -> None:
    for name, spacing in (("a", ISOTROPIC), ("b", ISOTROPIC), ("c", (3.0, 3.0, 3.0))):
        write_tiny(tmp_path, name, spacing)
    split = {"train": ["a"], "validation": ["b"]}
    assert open_data_set(tmp_path, split, TrainConfig()).task.spacing_mm == ISOTROPIC


def test_a_scan_that_cannot_be_read_is_named_with_its_case(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tiny(tmp_path, name)
    (tmp_path / "b" / "b_t1.nii.gz").write_bytes(b"junk")
    with pytest.raises(
        TrainingError, match=r"case b: .*b_t1\.nii\.gz: is not a NIfTI image"
    ) as caught:
        open_data_set(tmp_path, None, TrainConfig())
    assert "\n" not in str(caught.value)


def test_folds_of_the_config_make_the_split(tmp_path: Path) -> None:
    names = {f"sub-{i}_ses-{j}" for i in range(3) for j in range(2)}
    for name in names:
        write_tiny(tmp_path, name)
    config = TrainConfig(folds=3)
    held_out = [
        set(open_data_set(tmp_path, None, replace(config, fold=fold)).split["validation"])
        for fold in range(3)
    ]
    assert [len(part) for part in held_out] == [2, 2, 2]
    assert set.union(*held_out) == names


def test_only_cases_of_the_split_need_labels(tmp_path: Path) -> None:
    for name in ("small", "other", "unlabelled"):
        write_tiny(tmp_path / "data", name)
    (tmp_path / "data" / "unlabelled" / "unlabelled_seg.nii.gz").unlink()
    file = tmp_path / "split.json"
    file.write_text(json.dumps({"train": ["small"], "validation": ["other"]}))
    data = open_data_set(tmp_path / "data", read_split(file), TrainConfig())
    assert [c.name for c in data.part("validation")] == ["other"]
    file.write_text(json.dumps({"train": ["small"], "validation": ["unlabelled"]}))
    with pytest.raises(TrainingError, match="case unlabelled has no label file"):
        open_data_set(tmp_path / "data", read_split(file), TrainConfig())


def test_a_split_that_names_an_absent_case_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path, "small")
    with pytest.raises(TrainingError, match="has no case other, which the split names"):
        open_data_set(tmp_path, {"train": ["small"], "validation": ["other"]}, TrainConfig())


def test_a_data_set_gives_its_parts_and_takes_another_split(tmp_path: Path) -> None:
    write_tiny(tmp_path, "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for file in (tmp_path / "b").iterdir():
        file.rename(file.with_name(file.name.replace("a_", "b_")))
    cases = find_labelled_cases(tmp_path).cases
    data = DataSet("set", BRATS, cases, {"train": ["a"], "validation": ["b"]})
    assert [c.name for c in data.part("train")] == ["a"]
    other = data.with_split({"train": ["b", "a"], "validation": []})
    assert [c.name for c in other.part("train")] == ["b", "a"]
    assert other.part("validation") == []
