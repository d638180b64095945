"""Evaluation of a model on labelled cases: a table, a summary and pictures.

Every case is segmented by the runtime as in `attnseg run`, so the scores are those of the
exported model with its clean-up, on the scan's own grid. The paired tests are the t-test of the
paper's section 4 and Wilcoxon's signed-rank test, which does not assume normal differences.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray

from attnseg.data.labelled import LabelledCase, refuse_data_folder
from attnseg.data.task import LabelledTask
from attnseg.evaluation.cases import read_truth
from attnseg.evaluation.confusion import (
    MATRICES,
    MATRIX_PICTURE,
    Counts,
    confusion_matrix,
    describe_matrix,
    draw_matrix,
    encode_matrices,
    total,
)
from attnseg.evaluation.metrics import EMPTY_HD95_MM, Scores, score_structures
from attnseg.evaluation.paper import RESULTS, Row, is_papers_task, table_row
from attnseg.evaluation.scores import (
    CASES,
    MEANS_HEADER,
    SCORES,
    CaseScores,
    column,
    compare,
    encode_scores,
    read_scores,
)
from attnseg.evaluation.tables import markdown_table
from attnseg.runtime.case.nifti import read_volume
from attnseg.runtime.case.volume import Volume
from attnseg.runtime.errors import AttnsegError, OutputError, Setting, TrainingError
from attnseg.runtime.files import remove_partial
from attnseg.runtime.folder import case_error
from attnseg.runtime.model.manifest import Manifest
from attnseg.runtime.results.output import write_results
from attnseg.runtime.results.picture import render_picture
from attnseg.runtime.segmenter import Segmenter
from attnseg.runtime.text import markdown

SUMMARY, BOXES = "summary.md", "boxes.png"
_WORST = 3  # cases drawn


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        scores: Scores by case and structure, in the order of `structures_of`.
        matrices: Confusion matrix of each case, by name; see `attnseg.evaluation.confusion`.
        failed: Error of each case that could not be segmented or scored, by name.
        warnings: Warnings of each case that has any, such as an unusual spacing.
        summary: Text of `summary.md`.
    """

    scores: CaseScores
    matrices: Mapping[str, Counts]
    failed: Mapping[str, AttnsegError]
    warnings: Mapping[str, Sequence[str]]
    summary: str


def check_output(data: Path, output: Path, overwrite: bool) -> None:
    """Check that an evaluation would overwrite neither the data nor an earlier evaluation.

    Raises:
        ConfigError: `output` is the folder of the data.
        OutputError: `output` holds an evaluation, and `overwrite` is false.
    """
    refuse_data_folder(data, output)
    if (output / CASES).exists() and not overwrite:
        raise OutputError(
            f"{output}: holds an evaluation already",
            "give {} or choose another folder",
            Setting("overwrite", True),
        )


def structures_of(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Label values of every scored structure: the regions, then classes that are no region."""
    classes = {label.name: (label.value,) for label in manifest.task.labels[1:]}
    regions = manifest.task.regions
    return {**regions, **{n: v for n, v in classes.items() if v not in regions.values()}}


@dataclass(frozen=True)
class _Result:
    """A segmented case; `found` and `truth` are `(X, Y, Z)` uint8 label values."""

    name: str
    volume: Volume
    found: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    warnings: tuple[str, ...]


def _segment(case: LabelledCase, segmenter: Segmenter, task: LabelledTask) -> _Result:
    truth = read_truth(case, task)
    volume = read_volume(case.case.files)
    segmented = segmenter.segment(volume)
    return _Result(case.name, volume, segmented.labels, truth, segmented.warnings)


class _Scoring:
    """Scores and matrices of the cases so far, and the results of the worst ones, worst first."""

    def __init__(self, manifest: Manifest) -> None:
        self._structures = structures_of(manifest)
        self._label_values = manifest.task.label_values
        self._regions = list(manifest.task.regions)
        self.scores: dict[str, dict[str, Scores]] = {}
        self.matrices: dict[str, Counts] = {}
        self.failed: dict[str, AttnsegError] = {}
        self.warnings: dict[str, tuple[str, ...]] = {}
        self.worst: list[_Result] = []

    def add(self, result: _Result) -> None:
        matrix = confusion_matrix(result.found, result.truth, self._label_values)
        self.scores[result.name] = score_structures(
            result.found, result.truth, self._structures, result.volume.spacing_mm
        )
        self.matrices[result.name] = matrix
        if result.warnings:
            self.warnings[result.name] = result.warnings
        self.worst.append(result)
        self.worst.sort(key=lambda r: _mean_dice(self.scores[r.name], self._regions))
        del self.worst[_WORST:]


def evaluate(
    cases: Sequence[LabelledCase],
    segmenter: Segmenter,
    task: LabelledTask,
    output: Path,
    *,
    against: Path | None = None,
    progress: Callable[[str, AttnsegError | None], None] | None = None,
) -> Evaluation:
    """Segment and score cases, and write tables, a summary and pictures.

    The files are `cases.csv`, `confusion.csv`, `summary.md`, `boxes.png`, `confusion.png` and
    `worst/`.

    Args:
        cases: Labelled cases; see `cases_to_evaluate`.
        segmenter: Segmenter with the model and its options.
        task: Task of the cases.
        output: Folder, created if it does not exist; earlier results in it are replaced.
        against: Folder of another evaluation of the same cases, to compare with.
        progress: Function called with the name of each finished case and its error, if any.

    Raises:
        TrainingError: Every case failed, or `against` has none of the cases.
        OutputError: A file cannot be written.
    """
    other = read_scores(against) if against else None
    if other is not None and not other.keys() & {case.name for case in cases}:
        raise TrainingError(
            f"{against}: evaluates none of these cases", "evaluate both on the same"
        )
    manifest = segmenter.bundle.manifest
    scoring = _Scoring(manifest)
    for case in cases:
        try:
            scoring.add(_segment(case, segmenter, task))
        except Exception as error:  # no error of one case may stop the others
            scoring.failed[case.name] = case_error(case.case, error).detached()
        if progress:
            progress(case.name, scoring.failed.get(case.name))
    scores, failed = scoring.scores, scoring.failed
    if not scores:
        first = next(iter(failed.values()))
        cause = f"no case could be evaluated: {first.cause}"
        raise TrainingError(cause, first.mend, *first.settings)
    title = f"{manifest.name}, {len(scores)} cases"
    names = [label.name for label in manifest.task.labels]
    matrix = total(scoring.matrices)
    summary = _summary(scoring, segmenter, task) + describe_matrix(names, matrix)
    if other is not None and against is not None:
        summary += compare(scores, other, against)
    overlays = {f"{r.name}.png": _overlay(r, manifest, scores[r.name]) for r in scoring.worst}
    files = {
        BOXES: _box_plots(scores, list(manifest.task.regions), title),
        MATRIX_PICTURE: draw_matrix(names, matrix, title),
        MATRICES: encode_matrices(names, scoring.matrices),
        CASES: encode_scores(scores),
        SUMMARY: summary.encode(),
    }
    (output / "worst").mkdir(parents=True, exist_ok=True)
    remove_partial(output / "worst")
    for old in (output / "worst").glob("*.png"):
        old.unlink()
    write_results(output / "worst", overlays)
    write_results(output, files)
    return Evaluation(scores, scoring.matrices, failed, scoring.warnings, summary)


def _spread(values: NDArray[np.float64], digits: int) -> str:
    deviation = values.std(ddof=1) if len(values) > 1 else 0.0
    return f"{values.mean():.{digits}f} ± {deviation:.{digits}f} ({np.median(values):.{digits}f})"


def _papers_row(manifest: Manifest) -> Row | None:
    """Row of the paper's table for a model; None unless task and network are the paper's."""
    row = table_row(manifest.network)
    return RESULTS[row] if row and is_papers_task(manifest.task.regions) else None


def _papers_cell(row: Row, structure: str) -> str:
    if structure not in row.dice:
        return ""
    return f"{row.dice[structure]:.3f}, {row.hd95_mm[structure]:.1f} mm"


def _table(scores: CaseScores, manifest: Manifest) -> str:
    """Table of the scores, with the paper's values if it states any for this task and network."""
    paper = _papers_row(manifest)
    header = (*MEANS_HEADER, *(["paper"] if paper else []))
    rows = []
    for structure in structures_of(manifest):
        spreads = [
            _spread(column(scores, structure, name), 1 if name == "hd95_mm" else 3)
            for name in SCORES
        ]
        rows.append((structure, *spreads, *([_papers_cell(paper, structure)] if paper else [])))
    own_cases = " The paper's values are for its own cases and training." if paper else ""
    text = f"Mean ± standard deviation (median) over the cases.{own_cases}"
    return f"{text}\n\n{markdown_table(header, rows)}"


def _summary(scoring: _Scoring, segmenter: Segmenter, task: LabelledTask) -> str:
    manifest, engine = segmenter.bundle.manifest, segmenter.engine
    scores = scoring.scores
    options = ", ".join(f"{name} {value}" for name, value in segmenter.plan.settings().items())
    text = (
        f"# {markdown(manifest.name)}: {len(scores)} cases\n\n"
        f"{markdown(manifest.intended_use)}. Manifest {segmenter.bundle.sha256[:12]}, "
        f"{engine.name} {engine.version} {engine.precision}; {options}.\n\n"
        f"{_table(scores, manifest)}\n"
        "HD95 pools the surface distances of both directions. As in the BraTS evaluation, a "
        "structure absent from both result and truth scores Dice 1 and HD95 0 mm, one absent from "
        f"only one of them Dice 0 and HD95 {EMPTY_HD95_MM} mm. One such case shifts the mean HD95 "
        "considerably, so compare the median too.\n"
    )
    if task.decision:
        text += f"\nExpert labels: {task.decision}.\n"
    worst = [result.name for result in scoring.worst]
    values = [f"{name} ({_mean_dice(scores[name], manifest.task.regions):.3f})" for name in worst]
    text += f"\nLowest mean Dice: {markdown(', '.join(values))}; see worst/.\n"
    for name, warnings in scoring.warnings.items():
        text += markdown(f"Warned: {name}: {'; '.join(warnings)}").join(("\n", "\n"))
    for name, reason in scoring.failed.items():
        text += markdown(f"Failed: {name}: {reason}").join(("\n", "\n"))
    return text


def _mean_dice(scores: Mapping[str, Scores], regions: Iterable[str]) -> float:
    return float(np.mean([scores[region].dice for region in regions]))


@rc_context({"text.parse_math": False})  # a name may hold dollar signs
def _box_plots(scores: CaseScores, structures: Sequence[str], title: str) -> bytes:
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, name, label in zip(
        figure.subplots(1, 2), ("dice", "hd95_mm"), ("Dice", "HD95, mm"), strict=True
    ):
        values = [column(scores, structure, name) for structure in structures]
        axes.boxplot(values, showmeans=True)
        axes.set_xticks(range(1, len(structures) + 1), structures)
        for place, points in enumerate(values, start=1):
            axes.plot([place] * len(points), points, "k.", alpha=0.3, markersize=4)
        axes.set(ylabel=label)
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylim(0, 1)
    figure.suptitle(title)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()


def _overlay(result: _Result, manifest: Manifest, scores: Mapping[str, Scores]) -> bytes:
    """Draw a PNG file: result above, truth below, on the same slices."""
    dice = ", ".join(f"{region} {scores[region].dice:.3f}" for region in manifest.task.regions)
    title = f"{result.name}: found, Dice {dice}"
    return render_picture(
        result.volume, result.found, manifest, title, result.truth, result.warnings
    )
