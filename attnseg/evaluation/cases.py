"""Labelled cases that a model is evaluated on, and their expert labels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from attnseg.data.labelled import LabelledCase, LabelledScans, read_classes
from attnseg.data.task import LabelledTask
from attnseg.runtime.errors import Setting, TrainingError
from attnseg.runtime.model.manifest import Manifest


def cases_to_evaluate(scans: LabelledScans, manifest: Manifest, cases: str) -> list[LabelledCase]:
    """Select the cases of a data set that a model is evaluated on.

    Args:
        scans: Cases of the data set.
        manifest: Manifest of the model, with the names of its training cases.
        cases: `held-out` for cases that the model was not trained on, `trained-on` for those
            that it was, or `all`.

    Returns:
        Cases sorted by name.

    Raises:
        TrainingError: Labels or number of channels differ from the model's, a selected case
            is not usable, or no case is left.
    """
    theirs, own = scans.task.task, manifest.task
    if theirs.label_values != own.label_values or len(theirs.channels) != len(own.channels):
        raise TrainingError(
            f"the data has labels {list(theirs.label_values)} and {len(theirs.channels)} channels, "
            f"the model labels {list(own.label_values)} and {len(own.channels)} channels",
            "give the data of the model's task",
        )
    trained = set(manifest.training.train_cases if manifest.training else ())
    names = set(scans.cases) | set(scans.faults)
    if cases != "all":
        names = names & trained if cases == "trained-on" else names - trained
    scans.refuse_faults(names)
    chosen = [case for name, case in sorted(scans.cases.items()) if name in names]
    if not chosen:
        raise _no_case(len(scans.cases), cases)
    return chosen


def _no_case(count: int, cases: str) -> TrainingError:
    if cases == "held-out":
        return TrainingError(
            f"no case is left: the model was trained on all {count}",
            "give other data, or {}",
            Setting("cases", "all"),
        )
    return TrainingError(
        "the model was trained on none of these cases", "choose {}", Setting("cases", "held-out")
    )


def read_truth(case: LabelledCase, task: LabelledTask) -> NDArray[np.uint8]:
    """Read expert labels of a case as label values of the task, `(X, Y, Z)` uint8.

    Raises:
        VolumeError: The file cannot be read, or its grid differs from the scan's.
        TrainingError: A value is not a label of the task.
    """
    values = np.array(task.task.label_values, np.uint8)
    return np.asarray(values[read_classes(case, task).channels[0]])
