"""Checkpoints: written whole or not at all, and read as data, never as code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from attnseg.runtime.errors import TrainingError
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.data import Preparation

FORMAT = "attnseg-checkpoint-1"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to a temporary name, then rename, so that an old checkpoint is never lost.

    Raises:
        TrainingError: the file could not be written; the old one stays as it was.
    """
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("wb") as stream:
            torch.save({"format": FORMAT, **state}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise TrainingError(
            f"{path}: could not be written ({reason}); free some space and use --resume"
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; tensors and plain values only, so no code in it can run.

    Raises:
        TrainingError: the file is missing, damaged or not one of attnseg's.
    """
    if path.is_dir():
        raise TrainingError(f"{path}: is a folder; give the best.pt in it")
    if not path.is_file():
        raise TrainingError(f"{path}: does not exist; give a checkpoint such as runs/a/best.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # junk fails in as many ways as the unpickler has branches
        raise TrainingError(f"{path}: is damaged or not a checkpoint of attnseg") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise TrainingError(f"{path}: is not a checkpoint of attnseg (format {FORMAT})")
    return state


def load_run(run: Path) -> dict[str, Any]:
    """The last checkpoint of the run in a folder, to resume it from.

    Raises:
        TrainingError: the folder holds no run that could be resumed.
    """
    last = run / "last.pt"
    if not last.exists():
        raise TrainingError(
            f"{last}: does not exist, so there is no run to resume; start one in a new folder"
        )
    return load_checkpoint(last)


def run_config(run: Path) -> TrainConfig:
    """The configuration that the run in a folder was started with; errors as for `load_run`."""
    return checkpoint_config(load_run(run))


def run_split(run: Path) -> dict[str, list[str]]:
    """The split that the run in a folder was started with; errors as for `load_run`."""
    split: dict[str, list[str]] = load_run(run)["split"]
    return split


def checkpoint_config(state: dict[str, Any]) -> TrainConfig:
    """The configuration a checkpoint was trained with."""
    return TrainConfig.from_dict(state["config"])


def checkpoint_preparation(state: dict[str, Any]) -> Preparation:
    """How its training cases were prepared."""
    return Preparation.from_dict(state)


def checkpoint_weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """The weights to deploy: the moving average where one was kept."""
    weights: dict[str, Tensor] = state["average"] or state["model"]
    return weights


def initial_weights(path: Path, network: nn.Module) -> dict[str, Tensor]:
    """Weights to start a run from: of a checkpoint, or of a bundle's `weights.safetensors`.

    Raises:
        TrainingError: the file is missing, damaged, or its network is another.
    """
    if path.suffix == ".safetensors" and path.is_file():
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"{path}: cannot be read as safetensors ({error})") from error
    else:
        weights = checkpoint_weights(load_checkpoint(path))
    wanted = {name: value.shape for name, value in network.state_dict().items()}
    if {name: value.shape for name, value in weights.items()} != wanted:
        raise TrainingError(
            f"{path}: is of another architecture than this run's; give the same --model, "
            "--preset and settings that it was trained with"
        )
    return weights
