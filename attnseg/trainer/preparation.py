"""Preparation of cases for training, and its storage with the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from attnseg.data.labelled import LabelledCase, naming_case
from attnseg.data.task import BRATS, LabelledTask
from attnseg.runtime.case.nifti import read_volume
from attnseg.runtime.case.volume import Volume
from attnseg.runtime.errors import ConfigError, TrainingError, TrainingSetting
from attnseg.runtime.model.schemes_format import NormalisationJson, encode_normalisation
from attnseg.runtime.steps.check import InputRules, clean_channels
from attnseg.runtime.steps.foreground import Crop
from attnseg.runtime.steps.normalise import DECILES, z_score_percentiles
from attnseg.runtime.steps.preprocess import Preprocessing
from attnseg.runtime.steps.resample import Grid, resample_volume
from attnseg.runtime.steps.schemes import LandmarkMatching, Scheme, ZScore
from attnseg.runtime.task import Channel, Label, Task
from attnseg.trainer.config import TrainConfig

Done = Callable[[str], None]
"""Function called with the name of each case that is done."""


class _TaskJson(BaseModel):
    """Task, as stored in checkpoints and in the metadata of weights."""

    channels: tuple[Channel, ...]
    labels: tuple[tuple[str, int], ...]
    aliases: dict[int, int]
    regions: dict[str, tuple[int, ...]]
    orientation: str
    spacing_mm: tuple[float, float, float]
    display: tuple[str, ...]
    min_voxels: int
    foreground: Crop = "nonzero"
    description: str = ""

    def task(self) -> LabelledTask:
        """Return the stored task."""
        labels = tuple(Label(name, value) for name, value in self.labels)
        return LabelledTask(
            task=Task(self.channels, labels, self.regions, self.display),
            aliases=self.aliases,
            orientation=self.orientation,
            spacing_mm=self.spacing_mm,
            min_voxels=self.min_voxels,
            foreground=self.foreground,
            description=self.description,
        )


class _PreparationJson(BaseModel):
    """Preparation, as stored; without a task, as in old checkpoints, the task is BraTS."""

    task: _TaskJson | None = None
    grid: Grid | None
    normalisation: NormalisationJson
    foreground_ml: float | None = None


def _task_to_dict(labelled: LabelledTask) -> dict[str, Any]:
    task = labelled.task
    return {
        "channels": [asdict(channel) for channel in task.channels],
        "labels": [[label.name, label.value] for label in task.labels],
        "aliases": dict(labelled.aliases),
        "regions": {name: list(values) for name, values in task.regions.items()},
        "orientation": labelled.orientation,
        "spacing_mm": list(labelled.spacing_mm),
        "display": list(task.display),
        "min_voxels": labelled.min_voxels,
        "foreground": labelled.foreground,
        "description": labelled.description,
    }


@dataclass(frozen=True)
class Preparation:
    """Preparation of cases for training.

    Attributes:
        task: Task of the data set.
        preprocessing: Steps applied to a case before the network.
        foreground_ml: Largest foreground among the training cases; None if the foreground is the
            whole volume.

    Raises:
        ConfigError: The task has another number of channels than the preprocessing.
    """

    task: LabelledTask
    preprocessing: Preprocessing
    foreground_ml: float | None = None

    def __post_init__(self) -> None:
        schemes, channels = len(self.preprocessing.normalisation), len(self.task.task.channels)
        if schemes != channels:
            raise ConfigError(
                f"normalisation must have landmarks for {channels} channels, got {schemes}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as stored in checkpoints and in the metadata of weights."""
        grid = self.preprocessing.grid
        return {
            "task": _task_to_dict(self.task),
            "grid": None if grid is None else asdict(grid),
            "normalisation": encode_normalisation(self.preprocessing.normalisation),
            "foreground_ml": self.foreground_ml,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: A value breaks a rule.
            ValidationError: A value is of another type.
        """
        names = ("task", "grid", "normalisation", "foreground_ml")
        own = {key: values.get(key) for key in names}
        stored = _PreparationJson.model_validate(own)
        task = stored.task.task() if stored.task else BRATS
        schemes = stored.normalisation.schemes(len(task.task.channels))
        crop = stored.normalisation.foreground
        preprocessing = Preprocessing(task.orientation, stored.grid, crop, schemes)
        return cls(task, preprocessing, stored.foreground_ml)


def config_grid(config: TrainConfig) -> Grid | None:
    """Grid that volumes are resampled to by a configuration; None for their own."""
    if config.resize:
        x, y, z = config.resize
        return Grid(shape=(x, y, z))
    if config.spacing_mm:
        i, j, k = config.spacing_mm
        return Grid(spacing_mm=(i, j, k))
    return None


def learn_preparation(
    cases: Sequence[LabelledCase],
    task: LabelledTask,
    config: TrainConfig,
    progress: Done | None = None,
) -> Preparation:
    """Return the preparation of `config`, as learned from the training `cases`.

    `progress` is called with the name of each case that was read.

    Raises:
        TrainingError: A case cannot be read or used, or the images have too few grey values.
    """
    foreground = task.foreground if config.foreground == "task" else config.foreground
    schemes: tuple[Scheme, ...] = (ZScore(foreground),) * len(task.task.channels)
    plain = Preprocessing(task.orientation, config_grid(config), foreground, schemes)
    if not config.histogram_matching and foreground == "all":
        return Preparation(task, plain)  # nothing to learn
    rows, sizes_ml = [], []
    for labelled in cases:
        volume = read_scan(labelled, task, plain)
        sizes_ml.append(_foreground_ml(volume))
        if config.histogram_matching:
            with naming_case(labelled):
                placed = resample_volume(
                    volume.oriented(plain.orientation_of_image(volume)), plain.grid
                )
                rows.append(z_score_percentiles(placed.channels, foreground))
        if progress:
            progress(labelled.name)
    learned = replace(plain, normalisation=_landmarks(rows, foreground)) if rows else plain
    return Preparation(task, learned, max(sizes_ml) if foreground == "nonzero" else None)


def read_scan(labelled: LabelledCase, task: LabelledTask, preprocessing: Preprocessing) -> Volume:
    """Read the channels of a case for training, with the checks and repairs of the runtime.

    Every reader of scans in the trainer calls this, so that no model is trained on what `attnseg
    run` refuses.

    Returns:
        The volume as the runtime cleans it; its `warnings` are those of the files and the checks.

    Raises:
        TrainingError: The scan cannot be read or used; the message names the case.
    """
    known = preprocessing.crop == "nonzero"
    rules = InputRules(
        task.task, preprocessing, task.spacing_mm, foreground_ml=math.inf if known else None
    )
    with naming_case(labelled):
        volume = read_volume(labelled.case.files)
        cleaned, warnings = clean_channels(volume, rules)
    return replace(cleaned, warnings=(*volume.warnings, *warnings))


def _foreground_ml(volume: Volume) -> float:
    """Volume of the voxels that are not 0 in any channel, to 0.1 ml."""
    foreground = np.logical_or.reduce([channel != 0 for channel in volume.channels])
    return round(float(np.count_nonzero(foreground)) * volume.voxel_ml, 1)


def _landmarks(
    rows: Sequence[NDArray[np.float64]], foreground: Crop
) -> tuple[LandmarkMatching, ...]:
    """Mean percentiles of the z-scores over cases, per channel.

    Raises:
        TrainingError: The images have too few grey values.
    """
    mean = np.mean(rows, axis=0)
    try:
        return tuple(
            LandmarkMatching(DECILES, tuple(round(float(v), 6) for v in row), foreground)
            for row in mean
        )
    except ConfigError as error:
        raise TrainingError(
            "the images have too few grey values for histogram matching",
            "train with {} or, if the background is 0, with {}",
            TrainingSetting("histogram_matching", False),
            TrainingSetting("foreground", "nonzero"),
        ) from error
