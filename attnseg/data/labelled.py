"""Labelled cases: search in a folder, and checks before a long run.

Two layouts are supported: cases as the runtime reads them, each with a label file beside its
channels (BraTS 2018 to 2023), and a `dataset.json` of the Medical Segmentation Decathlon
(Antonelli 2022) or of nnU-Net, whose channels and labels define the task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from attnseg.data.dataset_json import DATASET_JSON, load_dataset_json
from attnseg.data.decathlon import read_decathlon
from attnseg.data.nnunet import is_nnunet, read_nnunet
from attnseg.data.task import BRATS, LabelledTask
from attnseg.data.threads import in_threads
from attnseg.data.values import distinct, some_values, whole_labels
from attnseg.runtime.case.nifti import read_labels
from attnseg.runtime.case.scans import LABEL_SUFFIXES, Case, find_cases, find_siblings
from attnseg.runtime.case.volume import Volume
from attnseg.runtime.errors import AttnsegError, ConfigError, ScanError, Setting, TrainingError
from attnseg.runtime.files import is_file

_LEAVE_OUT = ("add it, or leave the case out (in training, with {})", Setting("split"))


@dataclass(frozen=True)
class LabelledCase:
    """A case and its file of expert labels."""

    case: Case
    label: Path

    @property
    def name(self) -> str:
        """Name of the case."""
        return self.case.name


@dataclass(frozen=True)
class LabelledScans:
    """Contents of a folder of labelled cases.

    Attributes:
        task: Task of the data set.
        cases: Usable cases by name.
        faults: Error of each unusable case by name.
    """

    task: LabelledTask
    cases: Mapping[str, LabelledCase]
    faults: Mapping[str, AttnsegError]

    @property
    def decision(self) -> str:
        """What was decided about label values; empty before `decide_labels`, or if nothing was."""
        return self.task.decision

    def refuse_faults(self, names: Iterable[str] | None = None) -> None:
        """Raise `TrainingError` if a case is unusable, among all cases or only `names`."""
        wanted = self.faults if names is None else set(names)
        found = [fault for name, fault in self.faults.items() if name in wanted]
        if found:
            first, more = found[0], f" (and {len(found) - 1} more cases)" if found[1:] else ""
            raise TrainingError(f"{first.cause}{more}", first.mend, *first.settings)


def find_labelled_cases(root: Path) -> LabelledScans:
    """Find all cases below `root`, each with its label file. No image is read.

    Args:
        root: Folder of BraTS cases, or folder with a `dataset.json`.

    Raises:
        ScanError: No case was found.
        TrainingError: The `dataset.json` is not valid.
    """
    if (root / DATASET_JSON).is_file():
        return _find_listed(root / DATASET_JSON)
    scans = find_cases(root, BRATS.task.channels)
    faults: dict[str, AttnsegError] = dict(scans.problems)
    labelled = {}
    found = find_siblings(scans.cases, LABEL_SUFFIXES)
    for case in scans.cases:
        labels = found[case.name]
        if len(labels) == 1:
            labelled[case.name] = LabelledCase(case, labels[0])
        else:
            faults[case.name] = _not_one_label(case, labels)
    return LabelledScans(BRATS, labelled, faults)


def _not_one_label(case: Case, labels: Sequence[Path]) -> TrainingError:
    if not labels:
        cause = f"{case.folder}: case {case.name} has no label file (*_seg.nii.gz)"
        return TrainingError(cause, *_LEAVE_OUT)
    names = ", ".join(file.name for file in labels)
    return TrainingError(
        f"{case.folder}: case {case.name} has several label files ({names})", "keep one"
    )


def _find_listed(file: Path) -> LabelledScans:
    """Find the cases of a `dataset.json`."""
    read = read_nnunet if is_nnunet(load_dataset_json(file)) else read_decathlon
    task, pairs = read(file)
    labelled: dict[str, LabelledCase] = {}
    faults: dict[str, AttnsegError] = {}
    for case, label in pairs:
        missing = [f for f in (*dict.fromkeys(case.files), label) if not is_file(f)]
        if missing:
            cause = f"{missing[0]}: does not exist, but {DATASET_JSON} names it"
            faults[case.name] = TrainingError(cause, *_LEAVE_OUT)
        else:
            labelled[case.name] = LabelledCase(case, label)
    return LabelledScans(task, labelled, faults)


def check_labels(
    cases: Iterable[LabelledCase],
    task: LabelledTask,
    progress: Callable[[str], None] | None = None,
) -> dict[str, frozenset[int]]:
    """Read every label file, to find errors before a long run.

    Args:
        cases: Cases to check.
        task: Task of the cases.
        progress: Function called with the name of each case that was read.

    Returns:
        Class indices in each case's labels, by name of the case.

    Raises:
        TrainingError: Label files are not usable; the message describes the first in full.
    """

    def check(labelled: LabelledCase) -> frozenset[int] | AttnsegError:
        try:
            return frozenset(distinct(read_classes(labelled, task).channels[0]))
        except (ScanError, TrainingError) as error:
            return error.detached()

    found = in_threads(check, {case.name: case for case in cases}, progress)
    faults = {name: own for name, own in found.items() if isinstance(own, AttnsegError)}
    if faults:
        (_, first), *others = faults.items()
        more = f" (also unusable: {', '.join(name for name, _ in others)})" if others else ""
        raise TrainingError(first.cause + more, first.mend, *first.settings)
    return {name: own for name, own in found.items() if not isinstance(own, AttnsegError)}


def read_classes(labelled: LabelledCase, task: LabelledTask) -> Volume:
    """Read expert labels as a volume of class indices, uint8.

    Raises:
        VolumeError: The file cannot be read, or its grid differs from the scan's.
        TrainingError: A value is not a label of the task.
    """
    path, files = labelled.label, labelled.case.files
    volume = read_labels(path, files[0], files.count(files[0]))
    labels = whole_labels(path, volume.channels[0])
    values = set(distinct(labels))
    classes = task.class_of_label
    doubled = [a for a, value in task.aliases.items() if {a, value} <= values]
    if not values <= set(classes) or doubled:
        either = "".join(f" ({a} in place of {v}, not both)" for a, v in task.aliases.items())
        raise TrainingError(
            f"{path}: holds labels {some_values(values)}", f"expected {sorted(classes)}{either}"
        )
    table = np.zeros(max(classes) + 1, np.uint8)
    table[list(classes)] = list(classes.values())
    return replace(volume, channels=[table[labels]])


def refuse_data_folder(data: Path, output: Path) -> None:
    """Raise `ConfigError` if `output` is the folder of the data."""
    if output.exists() and output.resolve() == data.resolve():
        raise ConfigError(f"{output}: is the folder of the data", "choose another output folder")


@contextmanager
def naming_case(labelled: LabelledCase) -> Iterator[None]:
    """Re-raise a `ScanError` as a `TrainingError` that names the case."""
    try:
        yield
    except ScanError as error:
        cause = f"case {labelled.name}: {error.cause}"
        raise TrainingError(cause, error.mend, *error.settings) from error
