"""Reader of the Medical Segmentation Decathlon's `dataset.json`: a task and its cases.

Source: Antonelli et al., "The Medical Segmentation Decathlon" (Nature Communications 2022),
and the files themselves: `modality` and `labels` map numbers to names, `training` lists pairs of
image and label, with paths relative to the file. An image of several modalities is 4-D.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnseg.data.task import LabelledTask
from attnseg.runtime.case.scans import Case
from attnseg.runtime.errors import TrainingError
from attnseg.runtime.task import Channel, Label, Task

DATASET_JSON = "dataset.json"
ANY_FILE = ("",)


def _numbered(file: Path, stored: Mapping[str, Any], key: str) -> list[tuple[int, str]]:
    """Number and name of each entry of a mapping such as `{"0": "background"}`, sorted."""
    try:
        return sorted((int(number), str(name)) for number, name in stored[key].items())
    except (KeyError, AttributeError, ValueError) as error:
        raise TrainingError(
            f'{file}: its {key} is not a mapping of numbers to names, such as {{"0": "name"}}'
        ) from error


def _task(file: Path, stored: Mapping[str, Any]) -> LabelledTask:
    channels = _numbered(file, stored, "modality")
    labels = _numbered(file, stored, "labels")
    if not channels or len(labels) < 2 or labels[0][0] != 0 or labels[-1][0] > 255:
        raise TrainingError(
            f"{file}: needs one modality at least, and labels from 0 (background) to 255 at most"
        )
    for what in (channels, labels):
        for own in zip(*what, strict=True):  # their numbers, then their names
            if twice := [v for v, count in Counter(own).items() if count > 1]:
                raise TrainingError(f"{file}: lists {twice[0]} twice", "make each entry unique")
    return LabelledTask(
        task=Task(
            channels=tuple(Channel(name, ANY_FILE) for _, name in channels),
            labels=tuple(Label(name, value) for value, name in labels),
            regions={name: (value,) for value, name in labels[1:]},
            display=tuple(name for _, name in channels[:2]),
        ),
        aliases={},
        orientation="LPS",
        spacing_mm=(1.0, 1.0, 1.0),  # placeholder; `open_data_set` replaces it
        min_voxels=0,
        foreground="all",
        description=str(stored.get("name") or file.parent.resolve().name),
    )


def _case(file: Path, pair: Any, channels: int) -> tuple[Case, Path]:
    try:
        image, label = (file.parent / str(pair[key]) for key in ("image", "label"))
    except (KeyError, TypeError) as error:
        raise TrainingError(
            f"{file}: an entry of training is not a pair of image and label"
        ) from error
    name = image.name.removesuffix(".gz").removesuffix(".nii")
    return Case(name, image.parent, (image,) * channels), label


def read_decathlon(file: Path) -> tuple[LabelledTask, list[tuple[Case, Path]]]:
    """Read the task that a `dataset.json` describes, and its cases with their label files.

    The normalisation computes its statistics over all voxels, because a background of 0 is not
    guaranteed; there is no clean-up, because the sizes of lesions are unknown.

    Raises:
        TrainingError: The file is not a valid `dataset.json`, or lists no case.
    """
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        pairs = list(stored["training"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{file}: is not a dataset.json of the Medical Segmentation Decathlon, with modality, "
            "labels and training"
        ) from error
    task = _task(file, stored)
    cases = [_case(file, pair, len(task.task.channels)) for pair in pairs]
    if not cases:
        raise TrainingError(f"{file}: lists no training case")
    if twice := [n for n, count in Counter(case.name for case, _ in cases).items() if count > 1]:
        raise TrainingError(f"{file}: lists case {twice[0]} twice", "keep one, or rename its files")
    return task, cases
