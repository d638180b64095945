"""Meaning of label values that data sets use differently, decided once from a whole data set.

BraTS wrote enhancing tumour as 4 until 2022, in files named `_t1 ... _seg`, and as 3 since 2023, in
files named `-t1n ... -seg`. Post-treatment cases of 2024 use 1, 2 and 3 as 2023 and 4 for the
resection cavity (de Verdier et al. 2024), and BraTS 2012 to 2015 used 3 for the non-enhancing core
(Menze et al. 2015); the task has neither. One case alone cannot tell these apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from attnseg.data.labelled import LabelledCase, LabelledScans
from attnseg.data.threads import in_threads
from attnseg.data.values import distinct, whole_labels
from attnseg.runtime.case.nifti import read_labels
from attnseg.runtime.errors import ScanError, Setting, TrainingError

_OLD, _NEW = 4, 3
"""Enhancing tumour in BraTS until 2022 and since 2023."""
_BRATS_VALUES = {0, 1, 2, _NEW, _OLD}
_MOST_NAMED = 3  # cases in a message
_LEAVE_OUT = (
    "leave these cases out (in training, with {}), or describe the labels in a dataset.json",
    Setting("split"),
)


def decide_labels(
    scans: LabelledScans,
    names: Iterable[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> LabelledScans:
    """Decide whether enhancing tumour is 3 or 4 in a data set of BraTS.

    The label files of all usable cases are read. One that cannot be read, or that holds other
    values, has no say: it is an error where the case is used. For the task of a `dataset.json`
    nothing is read, and nothing decided.

    Args:
        scans: Cases of the data set.
        names: Names of the cases that will be used; None for all.
        progress: Function called with the name of each case whose labels were read.

    Returns:
        The same cases, with the decision in `task.aliases` and in words in `decision`.

    Raises:
        TrainingError: A case to be used holds a 4 that is not enhancing tumour, or the data set
            mixes both kinds.
    """
    if not scans.task.aliases:
        return scans
    values = in_threads(_values, scans.cases, progress)
    used = set(values) if names is None else set(names)
    new = [name for name, own in values.items() if _NEW in own]
    old = [name for name, own in values.items() if _OLD in own]
    used_old = [name for name in old if name in used]
    _refuse_cavity([name for name in used_old if _named_as_since_2023(scans.cases[name])])
    _refuse_both([name for name in used_old if name in new])
    if used_old and new:
        raise TrainingError(
            f"enhancing tumour is {_NEW} in {_listed(new)} and {_OLD} in {_listed(old)}",
            f"keep data of BraTS until 2022 ({_OLD}) and since 2023 ({_NEW}) in different folders, "
            "or describe the labels in a dataset.json",
        )
    decision, aliases = "", scans.task.aliases
    if used_old:
        decision, aliases = _decision(_OLD, "until 2022", len(old), len(values)), {}
    elif new:
        decision = _decision(_NEW, "since 2023", len(new), len(values))
    if new and old:
        decision += f"; not used: {_listed(old)} with label {_OLD}"
    return replace(scans, task=replace(scans.task, aliases=aliases, decision=decision))


def _values(labelled: LabelledCase) -> set[int]:
    """Values of a label file; none if it is not one of BraTS."""
    try:
        volume = read_labels(labelled.label)
        values = set(distinct(whole_labels(labelled.label, volume.channels[0])))
    except (ScanError, TrainingError):
        return set()
    return values if values <= _BRATS_VALUES else set()


def _named_as_since_2023(labelled: LabelledCase) -> bool:
    name = labelled.case.files[0].name.lower()
    return name.removesuffix(".gz").removesuffix(".nii").endswith("t1n")


def _refuse_cavity(names: Sequence[str]) -> None:
    if names:
        raise TrainingError(
            f"label {_OLD} in {_listed(names)} is the resection cavity of BraTS 2024, which this "
            f"task does not have: the files are named as since 2023 (*-t1n.nii.gz), when "
            f"enhancing tumour became {_NEW}",
            *_LEAVE_OUT,
        )


def _refuse_both(names: Sequence[str]) -> None:
    if names:
        raise TrainingError(
            f"labels {_NEW} and {_OLD} occur together in {_listed(names)}: one is enhancing "
            f"tumour, and the other the resection cavity ({_OLD} in BraTS 2024) or the "
            f"non-enhancing core ({_NEW} in BraTS until 2015), which this task does not have",
            *_LEAVE_OUT,
        )


def _listed(names: Sequence[str]) -> str:
    """Number of cases, and the names of the first."""
    more = ", ..." if len(names) > _MOST_NAMED else ""
    plural = "s" if len(names) > 1 else ""
    return f"{len(names)} case{plural} ({', '.join(names[:_MOST_NAMED])}{more})"


def _decision(value: int, years: str, count: int, cases: int) -> str:
    return (
        f"enhancing tumour is label {value}, as in BraTS {years}: {count} of {cases} cases have it"
    )
