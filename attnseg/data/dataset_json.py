"""What the `dataset.json` of the Medical Segmentation Decathlon and of nnU-Net have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnseg.data.task import LabelledTask
from attnseg.runtime.errors import ConfigError, TrainingError
from attnseg.runtime.task import Channel, Label, Task
from attnseg.runtime.user_json import parse_json

DATASET_JSON = "dataset.json"
EXTENSIONS = (".nii.gz", ".nii")


def load_dataset_json(file: Path) -> Any:
    """Read the JSON of a `dataset.json`, with or without a byte order mark.

    Raises:
        TrainingError: The file cannot be read, or is not JSON.
    """
    try:
        return parse_json(file.read_bytes())
    except OSError as error:
        raise TrainingError(f"{file}: cannot be read ({error.strerror})") from error
    except ConfigError as error:
        raise TrainingError(f"{file}: {error.cause}") from error


_WHAT = "is not a dataset.json of the Medical Segmentation Decathlon or of nnU-Net"
_WANTED = "expected modality, labels and training, or channel_names, labels and file_ending"


def not_a_dataset_json(file: Path) -> TrainingError:
    """Error for JSON without the fields of either format."""
    return TrainingError(f"{file}: {_WHAT}", _WANTED)


def numbered(file: Path, stored: Mapping[str, Any], key: str) -> list[tuple[int, str]]:
    """Number and name of each entry of a mapping such as `{"0": "background"}`, sorted.

    Raises:
        TrainingError: The entry is missing, or is not such a mapping.
    """
    try:
        return sorted((int(number), str(name)) for number, name in stored[key].items())
    except (KeyError, AttributeError, ValueError) as error:
        raise TrainingError(
            f'{file}: its {key} is not a mapping of numbers to names, such as {{"0": "name"}}'
        ) from error


def described_task(
    file: Path,
    channels: Sequence[Channel],
    labels: Sequence[tuple[int, str]],
    name: object,
) -> LabelledTask:
    """Task of a data set, with each label as a region of its own.

    The normalisation computes its statistics over all voxels, because a background of 0 is not
    guaranteed; there is no clean-up, because the sizes of lesions are unknown.

    Args:
        file: The `dataset.json`.
        channels: Channels in the order of the network's input.
        labels: Value and name of each label, sorted.
        name: Name of the data set; that of its folder if it is empty.

    Raises:
        TrainingError: Channels or labels are missing, listed twice, or out of range.
    """
    if not channels or len(labels) < 2 or labels[0][0] != 0 or labels[-1][0] > 255:
        raise TrainingError(
            f"{file}: needs one modality at least, and labels from 0 (background) to 255 at most"
        )
    for own in ([c.name for c in channels], *zip(*labels, strict=True)):
        if twice := [v for v, count in Counter(own).items() if count > 1]:
            raise TrainingError(f"{file}: lists {twice[0]} twice", "make each entry unique")
    return LabelledTask(
        task=Task(
            channels=tuple(channels),
            labels=tuple(Label(label, value) for value, label in labels),
            regions={label: (value,) for value, label in labels[1:]},
            display=tuple(channel.name for channel in channels[:2]),
        ),
        aliases={},
        orientation="LPS",
        spacing_mm=(1.0, 1.0, 1.0),  # placeholder; `open_data_set` replaces it
        min_voxels=0,
        foreground="all",
        description=str(name or file.parent.resolve().name),
    )
