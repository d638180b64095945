"""Reader of the Medical Segmentation Decathlon's `dataset.json`: a task and its cases.

Source: Antonelli et al., "The Medical Segmentation Decathlon" (Nature Communications 2022),
and the files themselves: `modality` and `labels` map numbers to names, `training` lists pairs of
image and label, with paths relative to the file. An image of several modalities is 4-D.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from attnseg.data.dataset_json import (
    described_task,
    load_dataset_json,
    not_a_dataset_json,
    numbered,
)
from attnseg.data.task import LabelledTask
from attnseg.runtime.case.scans import Case
from attnseg.runtime.errors import TrainingError
from attnseg.runtime.task import Channel

ANY_FILE = ("",)


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

    Raises:
        TrainingError: The file is not a valid `dataset.json`, or lists no case.
    """
    stored = load_dataset_json(file)
    try:
        pairs = list(stored["training"])
    except (KeyError, TypeError) as error:
        raise not_a_dataset_json(file) from error
    channels = [Channel(name, ANY_FILE) for _, name in numbered(file, stored, "modality")]
    labels = numbered(file, stored, "labels")
    task = described_task(file, channels, labels, stored.get("name"))
    cases = [_case(file, pair, len(channels)) for pair in pairs]
    if not cases:
        raise TrainingError(f"{file}: lists no training case")
    if twice := [n for n, count in Counter(case.name for case, _ in cases).items() if count > 1]:
        raise TrainingError(f"{file}: lists case {twice[0]} twice", "keep one, or rename its files")
    return task, cases
