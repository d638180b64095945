"""Split of cases into training and validation, by subject."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from attnseg.runtime.errors import ConfigError, TrainingError
from attnseg.runtime.files import read_file
from attnseg.runtime.user_json import parse_json

Split = dict[str, list[str]]
"""Case names under `train` and `validation`."""

# BraTS-GLI-00005-001 is the second scan of subject 00005; so is BIDS' sub-05_ses-2.
_SUBJECTS = (re.compile(r"^(BraTS-[\w-]+-\d+)-\d+$"), re.compile(r"^(sub-[^_]+)_.+$"))


def subject_of(case: str) -> str:
    """Subject in a case name of BraTS 2021 and later or BIDS; else the case name itself."""
    for pattern in _SUBJECTS:
        if match := pattern.match(case):
            return match[1]
    return case


def _shuffled_subjects(names: Iterable[str], seed: int) -> list[list[str]]:
    """Case names of each subject, subjects in a random order from `seed`."""
    subjects: dict[str, list[str]] = {}
    for name in sorted(names):
        subjects.setdefault(subject_of(name), []).append(name)
    order = np.random.default_rng(seed).permutation(len(subjects))
    return [list(subjects.values())[i] for i in order]


def _split(held_out: list[list[str]], rest: list[list[str]]) -> Split:
    return {
        "train": sorted(name for subject in rest for name in subject),
        "validation": sorted(name for subject in held_out for name in subject),
    }


def split_cases(names: Iterable[str], validation_share: float, seed: int) -> Split:
    """Split cases by subject, reproducibly for a seed, with at least one subject on each side.

    Args:
        names: Names of the cases.
        validation_share: Share of the subjects to hold out, between 0 and 1.
        seed: Seed of the order of the subjects.

    Raises:
        TrainingError: There are fewer than two subjects.
    """
    subjects = _shuffled_subjects(names, seed)
    if len(subjects) < 2:
        raise TrainingError(
            f"training needs at least 2 cases of different subjects to split, found {len(subjects)}"
        )
    count = min(len(subjects) - 1, max(1, round(len(subjects) * validation_share)))
    return _split(subjects[:count], subjects[count:])


def fold_cases(names: Iterable[str], folds: int, fold: int, seed: int) -> Split:
    """Split cases for one fold of a cross-validation; each subject is held out in one fold.

    Args:
        names: Names of the cases.
        folds: Number of folds.
        fold: Index of the fold to hold out, from 0.
        seed: Seed of the order of the subjects.

    Raises:
        TrainingError: There are fewer subjects than folds.
    """
    subjects = _shuffled_subjects(names, seed)
    if len(subjects) < folds:
        raise TrainingError(f"{folds} folds need as many subjects, found {len(subjects)}")
    held_out = subjects[fold::folds]
    return _split(held_out, [s for s in subjects if s not in held_out])


def read_split(path: Path) -> Split:
    """Read a split file: JSON with the lists `train` and `validation` of case names.

    Raises:
        TrainingError: The file is not a valid split, a list is empty or repeats a name, or
            a subject is in both.
    """
    try:
        stored = parse_json(read_file(path))
        split = {part: [str(n) for n in stored[part]] for part in ("train", "validation")}
    except OSError as error:
        raise TrainingError(
            f"{path}: cannot be read ({error.strerror})",
            "give JSON with lists train and validation",
        ) from error
    except ConfigError as error:
        raise TrainingError(f"{path}: {error.cause}") from error
    except (KeyError, TypeError) as error:
        raise TrainingError(
            f"{path}: is not a split file", "expected JSON with lists train and validation"
        ) from error
    for part, listed in split.items():
        if not listed:
            raise TrainingError(f"{path}: its {part} list is empty", "name at least one case")
        if twice := sorted(n for n in set(listed) if listed.count(n) > 1):
            raise TrainingError(f"{path}: its {part} list names {twice[0]} twice", "keep one")
    if both := sorted(set(split["train"]) & set(split["validation"])):
        raise TrainingError(f"{path}: names {both[0]} in train and in validation", "keep one")
    if both := sorted(set.intersection(*({subject_of(n) for n in p} for p in split.values()))):
        raise TrainingError(
            f"{path}: has scans of subject {both[0]} in train and in validation", "keep one"
        )
    return split
