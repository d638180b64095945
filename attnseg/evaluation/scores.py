"""Table of an evaluation's scores: its file, its means, and the comparison of two tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import astuple, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from attnseg.evaluation.metrics import Scores
from attnseg.evaluation.tables import markdown_table
from attnseg.runtime.errors import TrainingError
from attnseg.runtime.text import csv_cell, from_csv_cell

CASES = "cases.csv"
"""File name of the table in an evaluation's folder."""

SCORES = tuple(f.name for f in fields(Scores))
"""Names of the scores, in the order of the table's columns."""

CaseScores = Mapping[str, Mapping[str, Scores]]
"""Scores by case and structure."""

MEANS_HEADER = ("", "Dice", "HD95, mm", "sensitivity", "specificity", "lesion-wise Dice")


def mean_scores(scores: CaseScores) -> dict[str, dict[str, float]]:
    """Mean of each score over all cases, by structure and name of the score."""
    return {
        structure: {name: float(column(scores, structure, name).mean()) for name in SCORES}
        for structure in next(iter(scores.values()))
    }


def mean_rows(scores: CaseScores) -> list[tuple[str, ...]]:
    """Means over all cases under `MEANS_HEADER`, one row per structure."""
    return [
        (structure, *(f"{mean:.{1 if name == 'hd95_mm' else 3}f}" for name, mean in means.items()))
        for structure, means in mean_scores(scores).items()
    ]


def encode_scores(scores: CaseScores) -> bytes:
    """Return the content of the table, CSV in UTF-8."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("case", "structure", *SCORES))
    for case, by_structure in scores.items():
        for structure, values in by_structure.items():
            names = (csv_cell(case), csv_cell(structure))
            writer.writerow((*names, *(repr(float(v)) for v in astuple(values))))
    return stream.getvalue().encode()


def read_scores(folder: Path) -> CaseScores:
    """Read the `cases.csv` of an evaluation.

    Raises:
        TrainingError: The file is missing, or is not the table of an evaluation.
    """
    file = folder / CASES
    scores: dict[str, dict[str, Scores]] = {}
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                values = Scores(*(float(row[name]) for name in SCORES))
                case, structure = (from_csv_cell(row[key]) for key in ("case", "structure"))
                scores.setdefault(case, {})[structure] = values
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{file}: is not the table of an evaluation", "give the folder of attnseg evaluate"
        ) from error
    return scores


def column(scores: CaseScores, structure: str, name: str) -> NDArray[np.float64]:
    """One score of a structure in all cases, `(cases,)` float64."""
    return np.array([getattr(case[structure], name) for case in scores.values()])


def _p_values(differences: NDArray[np.float64]) -> tuple[str, str]:
    """Two-sided p-values of the paired t-test and of Wilcoxon's signed-rank test, as text."""
    if len(differences) < 2 or np.ptp(differences) == 0:
        return "-", "-"
    t_test = stats.ttest_1samp(differences, 0.0).pvalue
    return f"{t_test:.3g}", f"{stats.wilcoxon(differences, method='auto').pvalue:.3g}"


def compare(scores: CaseScores, other: CaseScores, folder: Path) -> str:
    """Format a section of the summary: paired differences to another evaluation.

    Args:
        scores: Scores of this evaluation.
        other: Scores of the other evaluation.
        folder: Folder of the other evaluation, for the heading.

    Raises:
        TrainingError: The evaluations have no case or no structure in common.
    """
    common = [name for name in scores if name in other]
    if not common:
        raise TrainingError(f"{folder}: evaluates none of these cases", "evaluate both on the same")
    first = other[common[0]]
    structures = [s for s in scores[common[0]] if s in first]
    if not structures:
        raise TrainingError(
            f"{folder}: evaluates other structures", "give a model of the same task"
        )
    rows = []
    for structure in structures:
        for name, digits in (("dice", 4), ("hd95_mm", 2)):
            mine, theirs = (
                column({case: part[case] for case in common}, structure, name)
                for part in (scores, other)
            )
            t_test, wilcoxon = _p_values(mine - theirs)
            difference = f"{(mine - theirs).mean():+.{digits}f}"
            rows.append((structure, name, difference, t_test, wilcoxon))
    header = ("", "score", "mean difference", "p, paired t-test", "p, Wilcoxon")
    return (
        f"\n## Against {folder}\n\n{len(common)} cases that both evaluate; positive: higher in "
        "this one. p-values are two-sided and not corrected for the number of tests; `-` where "
        "all differences are equal.\n\n" + markdown_table(header, rows)
    )
