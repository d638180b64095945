"""Reader of nnU-Net's `dataset.json`, version 2: a task and its cases.

Source: documentation/dataset_format.md of nnU-Net. `channel_names` (or `modality`) maps numbers to
names, `labels` names to numbers or regions. Channel 1 of case `a` is `imagesTr/a_0001.nii.gz`, its
labels are `labelsTr/a.nii.gz`; where `dataset` is given, it lists the files of each case instead.
The reader that `overwrite_image_reader_writer` names is not used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from attnseg.data.dataset_json import EXTENSIONS, described_task, load_dataset_json, numbered
from attnseg.data.nnunet_labels import nnunet_labels
from attnseg.data.task import LabelledTask
from attnseg.runtime.case.scans import Case
from attnseg.runtime.errors import ConfigError, TrainingError
from attnseg.runtime.task import Channel, distinct_names

IMAGES, LABELS = "imagesTr", "labelsTr"


def is_nnunet(stored: Any) -> bool:
    """Whether the content of a `dataset.json` is that of nnU-Net's version 2."""
    return isinstance(stored, Mapping) and (
        "file_ending" in stored or "channel_names" in stored or "training" not in stored
    )


def _channels(file: Path, stored: Mapping[str, Any]) -> list[Channel]:
    """Channels, each with its number as file-name suffix, such as `_0001`."""
    key = "modality" if "channel_names" not in stored and "modality" in stored else "channel_names"
    entries = numbered(file, stored, key)
    if [number for number, _ in entries] != list(range(len(entries))):
        raise TrainingError(
            f"{file}: numbers its {key} {[number for number, _ in entries]}",
            "number them from 0 on, as in the names of the files",
        )
    names = distinct_names([name for _, name in entries])  # names of normalisations may repeat
    return [Channel(name, (f"_{number:04}",)) for number, name in enumerate(names)]


def _task(file: Path, stored: Mapping[str, Any]) -> LabelledTask:
    channels = _channels(file, stored)
    try:
        found = nnunet_labels(stored)
        if found.ignore is not None:
            raise ConfigError(
                f"has an ignore label ({found.ignore}), and its voxels have no expert label to "
                "train or score on",
                "leave it out, and give its voxels another label",
            )
        described = described_task(
            file,
            channels,
            [(label.value, label.name) for label in found.labels],
            stored.get("name"),
        )
        task = replace(
            described.task,
            regions=found.regions,
            activation="sigmoid" if found.outputs else "softmax",
            outputs=found.outputs,
        )
    except ConfigError as error:
        raise TrainingError(f"{file}: {error.cause}", error.mend) from error
    return replace(described, task=task)


def _ending(file: Path, stored: Mapping[str, Any]) -> str:
    ending = stored.get("file_ending", EXTENSIONS[0])
    if ending not in EXTENSIONS:
        raise TrainingError(
            f"{file}: has the file_ending {ending!r}, which is not supported",
            f"convert images and labels to {' or '.join(EXTENSIONS)}",
        )
    return str(ending)


def _names(file: Path, ending: str, channels: int) -> list[str]:
    """Names of the cases that have an image or a label file."""
    names = set()
    try:
        images, labels = (
            [f.name for f in (file.parent / folder).iterdir() if not f.name.startswith(".")]
            for folder in (IMAGES, LABELS)
        )
    except OSError as error:
        raise TrainingError(
            f"{error.filename}: cannot be read ({error.strerror})",
            f"keep {IMAGES} and {LABELS} beside {file.name}",
        ) from error
    for name in images:
        if match := re.fullmatch(rf"(.+)_(\d{{4}}){re.escape(ending)}", name):
            if int(match[2]) >= channels:
                raise TrainingError(
                    f"{file.parent / IMAGES / name}: is of channel {int(match[2])}, and "
                    f"{file.name} names {channels} channel(s), from 0 on",
                    "name it in channel_names, or remove the file",
                )
            names.add(match[1])
    names.update(name.removesuffix(ending) for name in labels if name.endswith(ending))
    return sorted(names)


def _found_cases(file: Path, channels: Sequence[Channel], ending: str) -> list[tuple[Case, Path]]:
    images, labels = file.parent / IMAGES, file.parent / LABELS
    return [
        (
            Case(name, images, tuple(images / f"{name}{c.suffixes[0]}{ending}" for c in channels)),
            labels / f"{name}{ending}",
        )
        for name in _names(file, ending, len(channels))
    ]


def _listed_cases(file: Path, listed: Any, channels: int) -> list[tuple[Case, Path]]:
    """Cases of the entry `dataset`, whose paths are relative to the file."""
    if not isinstance(listed, Mapping):
        raise TrainingError(
            f"{file}: its dataset is not a mapping of case names to images and label"
        )
    cases = []
    for name, entry in listed.items():
        if Path(name).name != name or "\\" in name:
            raise TrainingError(f"{file}: case name {name!r} is not a plain file name")
        try:
            images = [file.parent / image for image in entry["images"]]
            label = file.parent / entry["label"]
        except (KeyError, TypeError) as error:
            raise TrainingError(
                f"{file}: case {name} of its dataset is not a pair of images and label"
            ) from error
        if len(images) != channels:
            raise TrainingError(
                f"{file}: case {name} of its dataset has {len(images)} images, and the data set "
                f"{channels} channel(s)",
                "list one image per channel",
            )
        cases.append((Case(name, images[0].parent, tuple(images)), label))
    return cases


def read_nnunet(file: Path) -> tuple[LabelledTask, list[tuple[Case, Path]]]:
    """Read the task that a `dataset.json` describes, and its cases with their label files.

    A case is returned with the files that it should have, whether they exist or not.

    Raises:
        TrainingError: The file is not a valid `dataset.json`, describes an ignored label or
            other files than NIfTI, or has not as many cases as its numTraining.
    """
    stored = load_dataset_json(file)
    task, ending = _task(file, stored), _ending(file, stored)
    channels = task.task.channels
    if "dataset" in stored:
        cases = _listed_cases(file, stored["dataset"], len(channels))
    else:
        cases = _found_cases(file, channels, ending)
    if not cases:
        raise TrainingError(f"{file}: has no training case", f"put images into {IMAGES}")
    wanted = stored.get("numTraining", len(cases))
    if type(wanted) is not int:
        raise TrainingError(f"{file}: numTraining must be a number, got {wanted!r}")
    if wanted != len(cases):
        raise TrainingError(
            f"{file}: promises {wanted} cases (numTraining), and has {len(cases)}",
            "copy the data set again, or correct the number",
        )
    return task, cases
