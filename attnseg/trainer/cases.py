"""Cases of a run before its first step: labels checked, landmarks learned, scans prepared."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from attnseg.data.labelled import check_labels
from attnseg.data.task import BRATS
from attnseg.runtime.errors import Setting, TrainingError
from attnseg.runtime.files import remove_partial
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.data import TrainingCase, cached_case, synthetic_cases
from attnseg.trainer.data_set import DataSet
from attnseg.trainer.devices import Devices
from attnseg.trainer.preparation import Preparation, learn_preparation
from attnseg.trainer.progress import shown_progress

SYNTHETIC_SEED = 1000  # first seed of the phantoms mixed into training
log = logging.getLogger(__name__)


def check_phantoms(config: TrainConfig, data: DataSet) -> None:
    """Raise `TrainingError` if phantoms of brains are to be mixed into another task."""
    if config.synthetic_cases and data.task.task.channels != BRATS.task.channels:
        raise TrainingError(
            f"{data.name}: synthetic_cases are brain scans, which this task does not take",
            "leave them out",
        )


def new_preparation(data: DataSet, config: TrainConfig, devices: Devices) -> Preparation:
    """Check the labels of all cases, and return the preparation of a new run.

    Raises:
        TrainingError: A case is not usable, or no training case holds a label.
    """
    training, validation = data.part("train"), data.part("validation")
    if devices.first and data.task.decision:
        log.info("Labels: %s", data.task.decision)
    share = [*training, *validation][devices.rank :: devices.count]
    with devices.together(), shown_progress("checking the labels", len(share)) as advance:
        found = check_labels(share, data.task, advance)
    classes = {name: own for part in devices.gather(found) for name, own in part.items()}
    with devices.together():
        _check_classes(classes, data, config, devices)
        with shown_progress("learning the landmarks", len(training)) as advance:
            return learn_preparation(training, data.task, config, advance)


def _check_classes(
    classes: Mapping[str, frozenset[int]], data: DataSet, config: TrainConfig, devices: Devices
) -> None:
    """Refuse training cases that are all empty, and warn of classes that none of them holds."""
    trained, validated = (
        frozenset[int]().union(*(classes[name] for name in data.split[part])) - {0}
        for part in ("train", "validation")
    )
    if not trained and not config.synthetic_cases:
        raise TrainingError(
            f"{data.name}: no training case holds a label: all label files of the "
            f"{len(data.split['train'])} are empty",
            "check that they are the right files, or choose other cases with {}",
            Setting("split"),
        )
    if not devices.first:
        return
    names = [label.name for label in data.task.task.labels]
    missing = [name for k, name in enumerate(names) if k and k not in trained]
    if missing and not config.synthetic_cases:
        log.warning(
            "warning: no training case holds %s, so the network cannot learn to find it",
            " or ".join(missing),
        )
    if not validated:
        log.warning(
            "warning: no validation case holds a label, so the validation's Dice says nothing "
            "and the choice of the best epoch is arbitrary"
        )


def prepare_cases(
    data: DataSet, preparation: Preparation, config: TrainConfig, cache: Path, devices: Devices
) -> tuple[list[TrainingCase], list[TrainingCase]]:
    """Return prepared cases for training, with the phantoms, and for validation.

    Each process prepares its share, then all read all cases.

    Raises:
        TrainingError: A case is not usable, or the cache cannot be written.
    """
    with devices.together():
        if devices.first:
            remove_partial(cache)
            synthetic_cases(config.synthetic_cases, SYNTHETIC_SEED, cache / "synthetic")
    phantoms = synthetic_cases(config.synthetic_cases, SYNTHETIC_SEED, cache / "synthetic")
    training, validation = [*data.part("train"), *phantoms], data.part("validation")
    share = [*training, *validation][devices.rank :: devices.count]
    with devices.together(), shown_progress("preparing the cases", len(share)) as advance:
        for case in share:
            cached_case(case, preparation, cache)
            advance(case.name)
    prepared = [cached_case(case, preparation, cache) for case in (*training, *validation)]
    return prepared[: len(training)], prepared[len(training) :]
