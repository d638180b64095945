"""Data set of a training run: labelled cases, split into training and validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from attnseg.data.decide import decide_labels
from attnseg.data.labelled import LabelledCase, find_labelled_cases, naming_case
from attnseg.data.split import Split, fold_cases, split_cases
from attnseg.data.task import LabelledTask
from attnseg.runtime.case.nifti import read_affine
from attnseg.runtime.case.volume import Volume
from attnseg.runtime.errors import TrainingError, TrainingSetting
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.progress import shown_progress

_SPACING_TOLERANCE = 0.01  # relative


@dataclass(frozen=True)
class DataSet:
    """Labelled cases and their split.

    Attributes:
        name: Name of the data set, as recorded in manifests.
        task: Task of the data set, with the voxel size that the network receives.
        cases: Usable cases by name.
        split: Case names of `train` and `validation`.
    """

    name: str
    task: LabelledTask
    cases: Mapping[str, LabelledCase]
    split: Split

    def part(self, name: str) -> list[LabelledCase]:
        """Cases of `train` or `validation`.

        Raises:
            TrainingError: The split names a case that does not exist.
        """
        missing = [n for n in self.split[name] if n not in self.cases]
        if missing:
            raise TrainingError(f"{self.name}: has no case {missing[0]}, which the split names")
        return [self.cases[n] for n in self.split[name]]

    def with_split(self, split: Split) -> DataSet:
        """Return the same cases with another split."""
        return replace(self, split=split)


def open_data_set(root: Path, split: Split | None, config: TrainConfig) -> DataSet:
    """Find all labelled cases below `root`; if `split` is None, the configuration defines it.

    What label values stand for is decided from all of them, see `decide_labels`.

    Raises:
        ScanError: No case was found.
        TrainingError: A case or the split is not usable, label values contradict each other, or
            spacings differ.
    """
    scans = find_labelled_cases(root)
    if scans.task.task.outputs:
        raise TrainingError(
            f"{root}: describes regions ({', '.join(scans.task.task.regions)}), which cannot be "
            "trained on, only evaluated",
            "give each label one value, without regions",
        )
    names = [name for part in split.values() for name in part] if split else None
    scans.refuse_faults(names)
    with shown_progress("reading the labels", len(scans.cases)) as advance:
        scans = decide_labels(scans, names, advance)
    if not split:
        if config.folds:
            split = fold_cases(scans.cases, config.folds, config.fold, config.seed)
        else:
            split = split_cases(scans.cases, config.validation_share, config.seed)
    data = DataSet(root.resolve().name, scans.task, scans.cases, split)
    used = [case for part in split for case in data.part(part)]
    return replace(data, task=replace(data.task, spacing_mm=_spacing_mm(used, data.task, config)))


def _spacing_mm(
    cases: Sequence[LabelledCase], task: LabelledTask, config: TrainConfig
) -> tuple[float, float, float]:
    """Voxel size that the network receives: the configured one, or that of the cases."""
    if config.spacing_mm:
        x, y, z = config.spacing_mm
        return x, y, z
    first = _case_spacing_mm(cases[0], task)
    for case in () if config.resize else cases[1:]:
        own = _case_spacing_mm(case, task)
        if not np.allclose(own, first, rtol=_SPACING_TOLERANCE):
            raise TrainingError(
                f"mixed spacings: {cases[0].name} has {_in_mm(first)}, {case.name} has "
                f"{_in_mm(own)}",
                "name one to resample to, such as {}",
                TrainingSetting("spacing_mm", first),
            )
    return first


def _in_mm(spacing: Sequence[float]) -> str:
    return " x ".join(f"{v:.3g}" for v in spacing) + " mm"


def _case_spacing_mm(labelled: LabelledCase, task: LabelledTask) -> tuple[float, float, float]:
    """Voxel size along X, Y and Z in the task's orientation, read from the header alone."""
    with naming_case(labelled):
        affine = read_affine(labelled.case.files[0])
    x, y, z = Volume([np.empty((1, 1, 1))], affine).oriented(task.orientation).spacing_mm
    return round(x, 4), round(y, 4), round(z, 4)
