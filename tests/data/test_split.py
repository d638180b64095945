from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnseg.data.split import Split, fold_cases, read_split, split_cases, subject_of
from attnseg.runtime.errors import TrainingError
from attnseg.trainer.config import TrainConfig

# Up to three scans each of two to twelve subjects, named as BraTS 2023 and BIDS name them.
scans = st.lists(st.integers(1, 3), min_size=2, max_size=12).map(
    lambda counts: [
        f"BraTS-GLI-{subject:05}-{scan:03}" if subject % 2 else f"sub-{subject:02}_ses-{scan}"
        for subject, count in enumerate(counts)
        for scan in range(count)
    ]
)


def subjects(split: Split, part: str) -> set[str]:
    return {subject_of(name) for name in split[part]}


@pytest.mark.parametrize(
    ("case", "subject"),
    [
        ("BraTS-GLI-00005-001", "BraTS-GLI-00005"),
        ("BraTS-MEN-RT-0001-1", "BraTS-MEN-RT-0001"),
        ("sub-05_ses-2", "sub-05"),
        ("sub-05_ses-2_run-1", "sub-05"),
        ("sub-05", "sub-05"),
        ("BraTS2021_00005", "BraTS2021_00005"),
        ("BraTS20_Training_001", "BraTS20_Training_001"),
        ("Brats18_2013_2_1", "Brats18_2013_2_1"),
        ("liver_12", "liver_12"),
    ],
)
def test_the_subject_is_read_from_the_names_of_brats_and_bids(case: str, subject: str) -> None:
    assert subject_of(case) == subject


@given(names=scans, share=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_no_subject_is_on_both_sides_of_a_split(names: list[str], share: float, seed: int) -> None:
    split = split_cases(names, share, seed)
    assert sorted(split["train"] + split["validation"]) == sorted(names)
    assert not subjects(split, "train") & subjects(split, "validation")
    assert split["train"] and split["validation"]


@given(names=scans, folds=st.integers(2, 12), seed=st.integers(0, 99))
def test_folds_hold_every_subject_out_exactly_once(names: list[str], folds: int, seed: int) -> None:
    count = len({subject_of(name) for name in names})
    if count < folds:
        with pytest.raises(TrainingError, match=f"{folds} folds need as many subjects, found"):
            fold_cases(names, folds, 0, seed)
        return
    splits = [fold_cases(names, folds, fold, seed) for fold in range(folds)]
    held_out = Counter(name for split in splits for name in split["validation"])
    assert held_out == dict.fromkeys(names, 1)
    for split in splits:
        assert sorted(split["train"] + split["validation"]) == sorted(names)
        assert not subjects(split, "train") & subjects(split, "validation")
    sizes = [len(subjects(split, "validation")) for split in splits]
    assert max(sizes) - min(sizes) <= 1


def test_folds_depend_on_the_seed_and_not_on_the_order_of_names() -> None:
    names = [f"case{i}" for i in range(10)]
    assert fold_cases(names, 5, 2, 0) == fold_cases(reversed(names), 5, 2, 0)
    assert fold_cases(names, 5, 2, 0) != fold_cases(names, 5, 2, 1)


def test_the_shipped_split_is_that_of_seed_0() -> None:
    stored = read_split(Path(__file__).parents[2] / "docs" / "brats18-split.json")
    names = stored["train"] + stored["validation"]
    assert split_cases(names, TrainConfig().validation_share, 0) == stored


def test_splits_are_disjoint_complete_and_repeatable() -> None:
    names = [f"case{i}" for i in range(30)]
    split = split_cases(names, 0.2, 0)
    assert split == split_cases(reversed(names), 0.2, 0)
    assert len(split["validation"]) == 6
    assert sorted(split["train"] + split["validation"]) == sorted(names)
    assert split != split_cases(names, 0.2, 1)
    assert len(split_cases(["a", "b"], 0.01, 0)["validation"]) == 1


@pytest.mark.parametrize("names", [[], ["a"], ["sub-1_ses-1", "sub-1_ses-2"]])
def test_one_subject_cannot_be_split(names: list[str]) -> None:
    with pytest.raises(TrainingError, match="at least 2 cases of different subjects to split"):
        split_cases(names, 0.2, 0)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("{", "is not JSON: "),
        ("[]", "is not a split file"),
        ('{"train": ["a"]}', "is not a split file"),
        ('{"train": 3, "validation": ["a"]}', "is not a split file"),
        ('{"train": [], "validation": ["a"]}', "its train list is empty"),
        ('{"train": ["a"], "validation": ["a"]}', "names a in train and in validation; keep one"),
        (
            '{"train": ["BraTS-GLI-00005-000"], "validation": ["BraTS-GLI-00005-001"]}',
            "has scans of subject BraTS-GLI-00005 in train and in validation; keep one",
        ),
    ],
)
def test_split_files_that_are_none_are_refused(tmp_path: Path, stored: str, message: str) -> None:
    file = tmp_path / "split.json"
    file.write_text(stored)
    with pytest.raises(TrainingError, match=message):
        read_split(file)


def test_an_absent_split_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"gone\.json: cannot be read .*; give JSON"):
        read_split(tmp_path / "gone.json")
    with pytest.raises(TrainingError, match=r"cannot be read \(embedded null byte\)"):
        read_split(tmp_path / "a\0b")


def test_any_split_that_is_made_can_be_read_back(tmp_path: Path) -> None:
    file = tmp_path / "split.json"
    for seed, share in itertools.product(range(3), (0.1, 0.5)):
        split = split_cases([f"sub-{i}_ses-{j}" for i in range(4) for j in range(2)], share, seed)
        file.write_text(json.dumps(split))
        assert read_split(file) == split
