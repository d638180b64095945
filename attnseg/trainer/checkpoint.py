"""Checkpoints: written whole or not at all, and read as data, never as code."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    ValidationError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from attnseg.runtime.errors import ConfigError, Setting, TrainingError
from attnseg.runtime.files import write_file
from attnseg.runtime.task import Task
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.decode import STORED, explain
from attnseg.trainer.model import NetworkConfig
from attnseg.trainer.preparation import Preparation

FORMAT = "attnseg-checkpoint-1"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FREE_SPACE_AND_RESUME: tuple[Any, ...] = ("free some space, then give {}", Setting("resume", True))
"""Mend and settings of the error for a run that could not write to its folder."""


class _Split(BaseModel):
    """Names of the cases of a run."""

    model_config = STORED

    train: list[str]
    validation: list[str]


class _State(BaseModel):
    """Entries of a checkpoint; those with a default are missing in some, and not in `best.pt`."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)

    config: dict[str, Any]
    data: str
    split: _Split
    device: str
    model: dict[str, Tensor]
    average: dict[str, Tensor] | None
    epoch: NonNegativeInt
    validation: dict[str, float] | None
    seconds: Annotated[FiniteFloat, Field(ge=0)]
    epoch_seconds: float = 0.0
    best: float = -1.0
    losses: list[float] = []
    optimiser: dict[str, Any] = {}
    scheduler: dict[str, Any] = {}
    scaler: dict[str, Any] = {}
    random: list[Any] = []


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state`; an existing checkpoint is replaced only when the new one is complete.

    Raises:
        TrainingError: The file could not be written; the existing one is unchanged.
    """
    try:
        write_file(path, lambda stream: torch.save({"format": FORMAT, **state}, stream))
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TrainingError(
            f"{path}: could not be written ({reason})", *FREE_SPACE_AND_RESUME
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint: tensors and plain values only, so no code in it can run.

    Returns:
        The state of a run (`attnseg.trainer.run.Run.state`), whose entries have the types of
        `_State`, and whose configuration, preparation and split can be decoded.

    Raises:
        TrainingError: The file is missing, damaged, or not a checkpoint of attnseg, or an entry is
            missing, of another type or contradicts another.
    """
    if path.is_dir():
        raise TrainingError(f"{path}: is a folder", "give the best.pt in it")
    if not path.is_file():
        raise TrainingError(f"{path}: does not exist", "give a checkpoint such as runs/a/best.pt")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not check its CRCs
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} does not match its CRC")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise any type of exception
        raise TrainingError(f"{path}: is damaged or not a checkpoint of attnseg") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise TrainingError(f"{path}: is not a checkpoint of attnseg (format {FORMAT})")
    try:
        decoded = _State.model_validate(state)
        entries = {name: getattr(decoded, name) for name in decoded.model_fields_set}
        state |= {**entries, "split": decoded.split.model_dump()}
        config, task = checkpoint_config(state), checkpoint_preparation(state).task.task
    except ValidationError as error:
        raise TrainingError(f"{path}: {explain(error, 'checkpoint')}") from error
    except ConfigError as error:
        raise TrainingError(f"{path}: {error.cause}", error.mend, *error.settings) from error
    check_task(path, config.network, task)
    return state


def check_task(path: Path, network: NetworkConfig, task: Task) -> None:
    """Raise `TrainingError` unless a network has the channels and classes of a task."""
    found, wanted = (network.in_channels, network.classes), (len(task.channels), len(task.labels))
    if found != wanted:
        raise TrainingError(
            f"{path}: its network has {found[0]} channels and {found[1]} classes, its task "
            f"{wanted[0]} and {wanted[1]}"
        )


def load_run(run: Path) -> dict[str, Any]:
    """Read the last checkpoint of the run in a folder, to resume from.

    Raises:
        TrainingError: The folder holds no run that can be resumed.
    """
    last = run / "last.pt"
    if not last.exists():
        raise TrainingError(
            f"{last}: does not exist, so there is no run to resume", "start one in a new folder"
        )
    return load_checkpoint(last)


def checkpoint_config(state: dict[str, Any]) -> TrainConfig:
    """Configuration that a checkpoint was trained with."""
    return TrainConfig.from_dict(state["config"])


def checkpoint_preparation(state: dict[str, Any]) -> Preparation:
    """Preparation of the cases that a checkpoint was trained on."""
    return Preparation.from_dict(state)


def checkpoint_weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """Weights to deploy: the moving average if the run had one, else the model's."""
    weights: dict[str, Tensor] = state["average"] or state["model"]
    return weights


def same_layout(weights: Mapping[str, Tensor], network: nn.Module) -> bool:
    """Whether weights have the names and shapes of a network's, and types that convert to its."""
    wanted = network.state_dict()
    return weights.keys() == wanted.keys() and all(
        value.layout == torch.strided
        and value.shape == wanted[name].shape
        and (value.dtype in _FLOATS) == wanted[name].is_floating_point()
        and (value.dtype in _FLOATS or value.dtype == wanted[name].dtype)
        for name, value in weights.items()
    )


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, types, shapes and values of weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def initial_weights(path: Path, network: nn.Module) -> dict[str, Tensor]:
    """Read weights to start a run from: a checkpoint, or a bundle's `weights.safetensors`.

    Raises:
        TrainingError: The file is missing or damaged, or does not fit `network`.
    """
    if path.suffix == ".safetensors" and path.is_file():
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"{path}: cannot be read as safetensors ({error})") from error
    else:
        weights = checkpoint_weights(load_checkpoint(path))
    if not same_layout(weights, network):
        raise TrainingError(
            f"{path}: is of another architecture than this run's",
            "give the same {}, {} and settings that it was trained with",
            Setting("model"),
            Setting("preset"),
        )
    return weights
