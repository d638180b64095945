"""Labelled cases: found in a folder, checked before hours are spent on them, and split.

Two layouts are read: cases as the runtime reads them, each with a label file beside its
channels (BraTS 2018 to 2023), and the `dataset.json` of the Medical Segmentation Decathlon
(Antonelli 2022), whose channels and labels make the task.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from attnseg.runtime.errors import ScanError, TrainingError
from attnseg.runtime.scans import LABEL_SUFFIXES, Case, find_cases
from attnseg.runtime.volume import Volume, read_affine, read_labels
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.decathlon import DATASET_JSON, read_decathlon
from attnseg.trainer.split import Split, fold_cases, split_cases
from attnseg.trainer.task import BRATS, Task

_SPACING_TOLERANCE = 0.01  # relative


@dataclass(frozen=True)
class LabelledCase:
    """A case and the file of its expert labels."""

    case: Case
    label: Path

    @property
    def name(self) -> str:
        """Name of the case."""
        return self.case.name


@dataclass(frozen=True)
class DataSet:
    """Labelled cases and which of them are for what.

    Attributes:
        name: as manifests give it.
        task: what is segmented; its spacing is that of the cases.
        cases: by name.
        split: case names of `train` and `validation`.
    """

    name: str
    task: Task
    cases: Mapping[str, LabelledCase]
    split: Split

    def part(self, name: str) -> list[LabelledCase]:
        """The cases of `train` or `validation`.

        Raises:
            TrainingError: the split names a case that is not there.
        """
        missing = [n for n in self.split[name] if n not in self.cases]
        if missing:
            raise TrainingError(f"{self.name}: has no case {missing[0]}, which the split names")
        return [self.cases[n] for n in self.split[name]]

    def with_split(self, split: Split) -> DataSet:
        """The same cases, split otherwise."""
        return replace(self, split=split)


@dataclass(frozen=True)
class LabelledScans:
    """What a folder of labelled cases holds.

    Attributes:
        task: what is segmented.
        cases: usable ones by name.
        faults: what is wrong with each of the others.
    """

    task: Task
    cases: Mapping[str, LabelledCase]
    faults: Mapping[str, str]

    def refuse_faults(self, names: Iterable[str] | None = None) -> None:
        """Raise `TrainingError` for unusable cases, of all or of `names`."""
        wanted = self.faults if names is None else set(names)
        found = [fault for name, fault in self.faults.items() if name in wanted]
        if found:
            more = f" (and {len(found) - 1} more cases)" if len(found) > 1 else ""
            raise TrainingError(f"{found[0]}{more}")


def find_labelled_cases(root: Path) -> LabelledScans:
    """All cases below `root`, each with its label file.

    Args:
        root: a folder of BraTS cases, or one with a `dataset.json`.

    Raises:
        ScanError: no case was found.
        TrainingError: the `dataset.json` is none.
    """
    if (root / DATASET_JSON).is_file():
        return _find_decathlon(root / DATASET_JSON)
    scans = find_cases(root, BRATS.channels)
    faults = {name: str(problem) for name, problem in scans.problems.items()}
    labelled = {}
    for case in scans.cases:
        label = case.sibling(LABEL_SUFFIXES)
        if label is None:
            faults[case.name] = (
                f"{case.folder}: case {case.name} has no label file (*_seg.nii.gz); add it or "
                "leave the case out with --split"
            )
        else:
            labelled[case.name] = LabelledCase(case, label)
    return LabelledScans(BRATS, labelled, faults)


def _find_decathlon(file: Path) -> LabelledScans:
    task, pairs = read_decathlon(file)
    labelled, faults = {}, {}
    for case, label in pairs:
        missing = [f for f in (case.files[0], label) if not f.is_file()]
        if missing:
            faults[case.name] = (
                f"{missing[0]}: does not exist, but {DATASET_JSON} names it; add it or leave the "
                "case out with --split"
            )
        else:
            labelled[case.name] = LabelledCase(case, label)
    return LabelledScans(task, labelled, faults)


def open_data_set(root: Path, split: Split | None, config: TrainConfig) -> DataSet:
    """All labelled cases below `root`, with the `split` given or else one by the config.

    Raises:
        ScanError: no case was found.
        TrainingError: a case is not usable, the split is not, or spacings differ.
    """
    scans = find_labelled_cases(root)
    if split:
        scans.refuse_faults(name for names in split.values() for name in names)
    else:
        scans.refuse_faults()
        if config.folds:
            split = fold_cases(scans.cases, config.folds, config.fold, config.seed)
        else:
            split = split_cases(scans.cases, config.validation_share, config.seed)
    data = DataSet(root.resolve().name, scans.task, scans.cases, split)
    used = [case for part in split for case in data.part(part)]
    return replace(data, task=replace(data.task, spacing_mm=_spacing_mm(used, data.task, config)))


def _spacing_mm(
    cases: Sequence[LabelledCase], task: Task, config: TrainConfig
) -> tuple[float, float, float]:
    """The spacing that the network will see: the config's, or the one that all cases share."""
    if config.spacing_mm:
        x, y, z = config.spacing_mm
        return x, y, z
    first = _case_spacing_mm(cases[0], task)
    for case in () if config.resize else cases[1:]:
        own = _case_spacing_mm(case, task)
        if not np.allclose(own, first, rtol=_SPACING_TOLERANCE):
            raise TrainingError(
                f"mixed spacings: {cases[0].name} has {_in_mm(first)}, {case.name} has "
                f"{_in_mm(own)}; name one to resample to, such as --set spacing_mm="
                + ",".join(f"{v:g}" for v in first)
            )
    return first


def _in_mm(spacing: Sequence[float]) -> str:
    return " x ".join(f"{v:.3g}" for v in spacing) + " mm"


def _case_spacing_mm(labelled: LabelledCase, task: Task) -> tuple[float, float, float]:
    """Voxel size along X, Y and Z of the task's orientation, from the header alone."""
    try:
        affine = read_affine(labelled.case.files[0])
    except ScanError as error:
        raise TrainingError(f"case {labelled.name}: {error}") from error
    x, y, z = Volume([np.empty((1, 1, 1))], affine).oriented(task.orientation).spacing_mm
    return round(x, 4), round(y, 4), round(z, 4)


def check_labels(cases: Iterable[LabelledCase], task: Task) -> None:
    """Read every label file, before hours are spent.

    Raises:
        TrainingError: label files that cannot be used, the first of them in full.
    """
    faults = []
    for labelled in cases:
        try:
            read_classes(labelled, task)
        except (ScanError, TrainingError) as error:
            faults.append((labelled.name, str(error)))
    if faults:
        others = f"; also unusable: {', '.join(name for name, _ in faults[1:])}"
        raise TrainingError(faults[0][1] + (others if len(faults) > 1 else ""))


def read_classes(labelled: LabelledCase, task: Task) -> Volume:
    """Read expert labels as a volume of class indices, uint8.

    Raises:
        VolumeError: the file cannot be read, or lies on another grid than the scan.
        TrainingError: a value is not a label.
    """
    path, files = labelled.label, labelled.case.files
    volume = read_labels(path, files[0], files.count(files[0]))
    labels = volume.channels[0]
    values = set(np.unique(labels).tolist())
    classes = task.class_of_label
    doubled = [a for a, value in task.aliases.items() if {a, value} <= values]
    if not values <= set(classes) or doubled:
        either = "".join(f" ({a} in place of {v}, not both)" for a, v in task.aliases.items())
        raise TrainingError(
            f"{path}: holds labels {_some(values)}; expected {sorted(classes)}{either}"
        )
    table = np.zeros(max(classes) + 1, np.uint8)
    table[list(classes)] = list(classes.values())
    return replace(volume, channels=[table[labels.astype(np.intp)]])


def _some(values: set[int]) -> str:
    """A few of the values: an image given for labels has thousands."""
    first = sorted(values)[:8]
    return f"{first}" if len(values) == len(first) else f"{str(first)[:-1]}, ...]"
