"""Evaluation: a model's results on labelled cases, as a table, a summary and pictures.

Every case goes through the runtime as a user would run it, so what is scored is the exported
model with its clean-up, on the scan's own grid. The paired tests are those of the paper's
section 4 (t-test) and Wilcoxon's signed-rank test, which does not ask for normal differences.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

from attnseg.runtime.bundle import Manifest
from attnseg.runtime.errors import ConfigError, ScanError, TrainingError
from attnseg.runtime.outputs import write_files
from attnseg.runtime.picture import render_picture
from attnseg.runtime.segmenter import Segmenter
from attnseg.runtime.volume import Volume, read_volume
from attnseg.trainer.cases import LabelledCase, LabelledScans, read_classes
from attnseg.trainer.metrics import EMPTY_HD95_MM, Scores, score_structures
from attnseg.trainer.model import NetworkConfig
from attnseg.trainer.paper import RESULTS, table_row
from attnseg.trainer.task import Task

CASES, SUMMARY, BOXES = "cases.csv", "summary.md", "boxes.png"
_SCORES = tuple(f.name for f in fields(Scores))
_WORST = 3  # cases drawn

CaseScores = Mapping[str, Mapping[str, Scores]]
"""Scores by case and structure."""


@dataclass(frozen=True)
class Evaluation:
    """What came of it.

    Attributes:
        scores: by case and structure: the regions first, then each class.
        failed: what is wrong with each case that could not be segmented.
        warnings: what a reader should know of a case, such as an unusual spacing.
        summary: the text of `summary.md`.
    """

    scores: CaseScores
    failed: Mapping[str, str]
    warnings: Mapping[str, Sequence[str]]
    summary: str


def structures_of(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Label values of every structure that is scored: the regions, and each class beside them."""
    classes = {label.name: (label.value,) for label in manifest.labels[1:]}
    regions = manifest.regions
    return {**regions, **{n: v for n, v in classes.items() if v not in regions.values()}}


def cases_to_evaluate(scans: LabelledScans, manifest: Manifest, which: str) -> list[LabelledCase]:
    """The cases of a data set that a model is evaluated on.

    Args:
        scans: the data set.
        manifest: of the model, which names the cases it was trained on.
        which: `held-out` for those it was not trained on, `trained-on`, or `all`.

    Raises:
        TrainingError: the data has other labels or channels than the model, a case is not
            usable, or none is left.
    """
    task = scans.task
    theirs = ([value for _, value in task.labels], len(task.channels))
    own = ([label.value for label in manifest.labels], len(manifest.channels))
    if theirs != own:
        raise TrainingError(
            f"the data has labels {theirs[0]} and {theirs[1]} channels, the model labels "
            f"{own[0]} and {own[1]} channels; give the data of the model's task"
        )
    trained = set(manifest.training.train_cases if manifest.training else ())
    names = set(scans.cases) | set(scans.faults)
    if which != "all":
        names = names & trained if which == "trained-on" else names - trained
    scans.refuse_faults(names)
    cases = [case for name, case in sorted(scans.cases.items()) if name in names]
    if not cases:
        raise TrainingError(
            f"no case is left: the model was trained on all {len(scans.cases)}; give other data, "
            "or --cases all"
            if which == "held-out"
            else "the model was trained on none of these cases; choose --cases held-out"
        )
    return cases


@dataclass(frozen=True)
class _Result:
    """A case that was segmented; `found` and `truth` are `(X, Y, Z)` label values."""

    name: str
    volume: Volume
    found: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    warnings: tuple[str, ...]


def _segment(case: LabelledCase, segmenter: Segmenter, task: Task) -> _Result:
    values = np.array([value for _, value in task.labels], np.uint8)
    truth = values[read_classes(case, task).channels[0]]
    volume = read_volume(case.case.files)
    segmented = segmenter.segment(volume)
    return _Result(case.name, volume, segmented.labels, truth, segmented.warnings)


class _Scoring:
    """Scores of the cases so far, and the results of the worst of them."""

    def __init__(self, manifest: Manifest) -> None:
        self._structures = structures_of(manifest)
        self._regions = list(manifest.regions)
        self.scores: dict[str, dict[str, Scores]] = {}
        self.failed: dict[str, str] = {}
        self.warnings: dict[str, tuple[str, ...]] = {}
        self.worst: list[_Result] = []

    def add(self, result: _Result) -> None:
        self.scores[result.name] = score_structures(
            result.found, result.truth, self._structures, result.volume.spacing_mm
        )
        if result.warnings:
            self.warnings[result.name] = result.warnings
        self.worst.append(result)
        self.worst.sort(key=lambda r: _mean_dice(self.scores[r.name], self._regions))
        del self.worst[_WORST:]


def evaluate(
    cases: Sequence[LabelledCase],
    segmenter: Segmenter,
    task: Task,
    output: Path,
    against: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Segment and score cases, and write `cases.csv`, `summary.md`, `boxes.png` and `worst/`.

    Args:
        cases: labelled; see `cases_to_evaluate`.
        segmenter: the model and how it is run.
        task: of the cases.
        output: folder, made if it is not there; older results in it are replaced.
        against: folder of another evaluation of the same cases, to compare with.
        progress: told the name of each case that is done.

    Raises:
        TrainingError: every case failed, or `against` has none of the cases.
        OutputError: a file could not be written.
    """
    other = read_scores(against) if against else None
    if other is not None and not other.keys() & {case.name for case in cases}:
        raise TrainingError(f"{against}: evaluates none of these cases; evaluate both on the same")
    manifest = segmenter.bundle.manifest
    scoring = _Scoring(manifest)
    for case in cases:
        try:
            scoring.add(_segment(case, segmenter, task))
        except (ScanError, TrainingError) as error:
            scoring.failed[case.name] = str(error)
        if progress:
            progress(case.name)
    scores, failed = scoring.scores, scoring.failed
    if not scores:
        raise TrainingError(f"no case could be evaluated: {next(iter(failed.values()))}")
    title = f"{manifest.name}, {len(scores)} cases"
    summary = _summary(scoring, segmenter)
    if other is not None and against is not None:
        summary += compare(scores, other, against)
    (output / "worst").mkdir(parents=True, exist_ok=True)
    for old in (output / "worst").glob("*.png"):
        old.unlink()
    overlays = {f"{r.name}.png": _overlay(r, manifest, scores[r.name]) for r in scoring.worst}
    write_files(output / "worst", overlays)
    write_files(
        output,
        {
            BOXES: _box_plots(scores, list(manifest.regions), title),
            CASES: _encode_scores(scores),
            SUMMARY: summary.encode(),
        },
    )
    return Evaluation(scores, failed, scoring.warnings, summary)


def _encode_scores(scores: CaseScores) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("case", "structure", *_SCORES))
    for case, by_structure in scores.items():
        for structure, values in by_structure.items():
            writer.writerow((case, structure, *(repr(float(v)) for v in astuple(values))))
    return stream.getvalue().encode()


def read_scores(folder: Path) -> CaseScores:
    """The `cases.csv` of an evaluation.

    Raises:
        TrainingError: there is none, or it is not one of attnseg's.
    """
    file = folder / CASES
    scores: dict[str, dict[str, Scores]] = {}
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                values = Scores(*(float(row[name]) for name in _SCORES))
                scores.setdefault(row["case"], {})[row["structure"]] = values
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{file}: is not the table of an evaluation; give the folder of attnseg evaluate"
        ) from error
    return scores


def column(scores: CaseScores, structure: str, name: str) -> NDArray[np.float64]:
    """One score of a structure over all cases."""
    return np.array([getattr(case[structure], name) for case in scores.values()])


def _spread(values: NDArray[np.float64], digits: int) -> str:
    deviation = values.std(ddof=1) if len(values) > 1 else 0.0
    return f"{values.mean():.{digits}f} ± {deviation:.{digits}f} ({np.median(values):.{digits}f})"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _paper_row(manifest: Manifest, structure: str) -> str:
    if set(manifest.regions) != {"WT", "TC", "ET"} or structure not in manifest.regions:
        return ""
    try:
        row = RESULTS[table_row(NetworkConfig.from_dict(manifest.network))]
    except ConfigError:  # a network of someone else
        return ""
    return f"{row.dice[structure]:.3f}, {row.hd95_mm[structure]:.1f} mm"


def _summary(scoring: _Scoring, segmenter: Segmenter) -> str:
    manifest, engine = segmenter.bundle.manifest, segmenter.engine_info
    scores = scoring.scores
    options = ", ".join(f"{name} {value}" for name, value in segmenter.settings.items())
    header = ("", "Dice", "HD95, mm", "sensitivity", "specificity", "lesion-wise Dice", "paper")
    rows = []
    for structure in structures_of(manifest):
        spreads = [
            _spread(column(scores, structure, name), 1 if name == "hd95_mm" else 3)
            for name in _SCORES
        ]
        rows.append((structure, *spreads, _paper_row(manifest, structure)))
    text = (
        f"# {manifest.name}: {len(scores)} cases\n\n"
        f"{manifest.intended_use}. Manifest {segmenter.bundle.sha256[:12]}, {engine.name} "
        f"{engine.version} {engine.precision}; {options}.\n\n"
        "Mean ± standard deviation (median) over the cases. The paper's values are of its own "
        "cases and training.\n\n" + markdown_table(header, rows) + "\n"
        "HD95 pools the surface distances of both directions. As in the BraTS evaluation, a "
        "structure that neither has scores Dice 1 and HD95 0, one that only one of the two has "
        f"0 and {EMPTY_HD95_MM} mm; one such case moves a mean HD95 far, so see the median.\n"
    )
    worst = [result.name for result in scoring.worst]
    values = [f"{name} ({_mean_dice(scores[name], manifest.regions):.3f})" for name in worst]
    text += f"\nLowest mean Dice: {', '.join(values)}; see worst/.\n"
    for name, reason in scoring.failed.items():
        text += f"\nFailed: {name}: {reason}\n"
    return text


def _mean_dice(scores: Mapping[str, Scores], regions: Iterable[str]) -> float:
    return float(np.mean([scores[region].dice for region in regions]))


def _p_values(differences: NDArray[np.float64]) -> tuple[str, str]:
    """Of the paired t-test and of Wilcoxon's signed-rank test, two-sided."""
    if len(differences) < 2 or np.ptp(differences) == 0:
        return "-", "-"
    t_test = stats.ttest_1samp(differences, 0.0).pvalue
    return f"{t_test:.3g}", f"{stats.wilcoxon(differences, method='auto').pvalue:.3g}"


def compare(scores: CaseScores, other: CaseScores, folder: Path) -> str:
    """A section for the summary: paired differences to another evaluation of the same cases.

    Raises:
        TrainingError: they have no case or no structure in common.
    """
    common = [name for name in scores if name in other]
    if not common:
        raise TrainingError(f"{folder}: evaluates none of these cases; evaluate both on the same")
    first = other[common[0]]
    structures = [s for s in scores[common[0]] if s in first]
    if not structures:
        raise TrainingError(f"{folder}: evaluates other structures; give a model of the same task")
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
        f"\n## Against {folder}\n\n{len(common)} cases that both evaluate; positive: this one is "
        "higher. p-values are two-sided and not corrected for the number of tests; `-` where "
        "all differences are equal.\n\n" + markdown_table(header, rows)
    )


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
    """Result above, truth below, on the same slices."""
    dice = ", ".join(f"{region} {scores[region].dice:.3f}" for region in manifest.regions)
    title = f"{result.name}: found, Dice {dice}"
    return render_picture(result.volume, result.found, manifest, title, result.truth)
