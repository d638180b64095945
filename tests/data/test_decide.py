from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from attnseg.data.decide import decide_labels
from attnseg.data.labelled import find_labelled_cases, read_classes
from attnseg.runtime.errors import TrainingError
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.data_set import open_data_set

UNTIL_2022 = ("_t1", "_t1ce", "_t2", "_flair", "_seg")
SINCE_2023 = ("-t1n", "-t1c", "-t2w", "-t2f", "-seg")


def write(root: Path, name: str, *values: int, names: tuple[str, ...] = UNTIL_2022) -> None:
    """A case of 4 x 5 x 6 voxels whose labels are `values` and 0."""
    folder = root / name
    folder.mkdir(parents=True)
    image = np.arange(1, 121, dtype=np.int16).reshape(4, 5, 6)
    labels = np.zeros((4, 5, 6), np.uint8)
    labels[0, 0, : len(values)] = values
    for index, suffix in enumerate(names):
        array = labels if suffix.endswith("seg") else image + np.int16(index)
        nib.save(nib.Nifti1Image(array, np.eye(4)), folder / f"{name}{suffix}.nii.gz")


def decided(root: Path, names: list[str] | None = None) -> tuple[str, dict[int, int]]:
    scans = decide_labels(find_labelled_cases(root), names)
    return scans.decision, dict(scans.task.aliases)


def refusal(root: Path, names: list[str] | None = None) -> str:
    with pytest.raises(TrainingError) as caught:
        decide_labels(find_labelled_cases(root), names)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_enhancing_tumour_is_4_where_no_case_holds_3(tmp_path: Path) -> None:
    write(tmp_path, "a", 1, 2, 4)
    write(tmp_path, "b", 1, 2)
    scans = decide_labels(find_labelled_cases(tmp_path))
    assert scans.decision == (
        "enhancing tumour is label 4, as in BraTS until 2022: 1 of 2 cases have it"
    )
    assert scans.task.class_of_label == {0: 0, 1: 1, 2: 2, 4: 3}  # and 3 is no label


@pytest.mark.parametrize("names", [UNTIL_2022, SINCE_2023], ids=["_t1", "-t1n"])
def test_enhancing_tumour_is_3_where_no_case_holds_4(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    for name in ("a", "b"):
        write(tmp_path, name, 1, 2, 3, names=names)
    scans = decide_labels(find_labelled_cases(tmp_path))
    assert scans.decision == (
        "enhancing tumour is label 3, as in BraTS since 2023: 2 of 2 cases have it"
    )
    classes = read_classes(scans.cases["a"], scans.task).channels[0]
    assert classes[0, 0].tolist() == [1, 2, 3, 0, 0, 0]


def test_without_enhancing_tumour_there_is_nothing_to_decide(tmp_path: Path) -> None:
    write(tmp_path, "a", 1, 2, names=SINCE_2023)
    assert decided(tmp_path)[0] == ""


def test_files_decide_the_year_and_not_the_name_of_the_case(tmp_path: Path) -> None:
    write(tmp_path, "BraTS-GLI-00000-000", 1, 2, 4)
    assert decided(tmp_path)[1] == {}


def test_a_mixture_is_refused_with_cases_of_both_kinds(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        write(tmp_path, name, 1, 2, 3)
    write(tmp_path, "e", 4)
    assert refusal(tmp_path).startswith(
        "enhancing tumour is 3 in 4 cases (a, b, c, ...) and 4 in 1 case (e); keep data of BraTS "
        "until 2022 (4) and since 2023 (3) in different folders"
    )


@pytest.mark.parametrize("values", [(1, 2, 4), (1, 2, 3, 4)], ids=str)
def test_a_4_in_files_named_as_since_2023_is_the_resection_cavity(
    tmp_path: Path, values: tuple[int, ...]
) -> None:
    write(tmp_path, "a", 1, 2, 3, names=SINCE_2023)
    write(tmp_path, "b", *values, names=SINCE_2023)
    message = refusal(tmp_path)
    assert message.startswith("label 4 in 1 case (b) is the resection cavity of BraTS 2024")
    assert message.endswith(
        "leave these cases out (in training, with split), or describe the labels in a dataset.json"
    )


def test_3_and_4_in_one_case_are_refused_whatever_its_files_are_called(tmp_path: Path) -> None:
    write(tmp_path, "a", 1, 2, 3, 4)
    assert refusal(tmp_path).startswith("labels 3 and 4 occur together in 1 case (a)")


def test_cases_that_are_not_used_have_a_say_but_stop_nothing(tmp_path: Path) -> None:
    write(tmp_path, "a", 1, 2, 3, names=SINCE_2023)
    write(tmp_path, "b", 1, 2, names=SINCE_2023)
    write(tmp_path, "cavity", 1, 2, 3, 4, names=SINCE_2023)
    decision, aliases = decided(tmp_path, ["a", "b"])
    assert decision == (
        "enhancing tumour is label 3, as in BraTS since 2023: 2 of 3 cases have it; "
        "not used: 1 case (cavity) with label 4"
    )
    assert aliases == {3: 4}
    write(tmp_path, "old", 1, 2, 4)
    # A 4 cannot be told from a cavity beside cases whose enhancing tumour is 3.
    assert refusal(tmp_path, ["b", "old"]).startswith("enhancing tumour is 3 in 2 cases (a, cav")


def test_label_files_that_are_none_of_brats_have_no_say(tmp_path: Path) -> None:
    for name in ("a", "b", "junk"):
        write(tmp_path, name, 1, 2, 4)
    write(tmp_path, "image", 1, 2, 3, 4, 5)
    (tmp_path / "junk" / "junk_seg.nii.gz").write_bytes(b"junk")
    assert decided(tmp_path)[0].endswith("2 of 4 cases have it")


def test_a_data_set_for_training_is_decided_from_all_of_its_cases(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path, name, 1, 2, 3)
    write(tmp_path, "c", 1, 2, 4)
    with pytest.raises(TrainingError, match=r"3 in 2 cases \(a, b\) and 4 in 1 case \(c\)"):
        open_data_set(tmp_path, None, TrainConfig())
    data = open_data_set(tmp_path, {"train": ["a"], "validation": ["b"]}, TrainConfig())
    assert data.task.decision.startswith("enhancing tumour is label 3")


def test_the_decision_is_no_part_of_what_a_cache_or_checkpoint_is_known_by(tmp_path: Path) -> None:
    write(tmp_path, "a", 1, 2, 4)
    one = decide_labels(find_labelled_cases(tmp_path)).task
    write(tmp_path, "b", 1, 2, 4)
    two = decide_labels(find_labelled_cases(tmp_path)).task
    assert one.decision != two.decision
    assert (one, repr(one)) == (two, repr(two))
