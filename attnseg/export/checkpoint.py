"""What an export starts from: a trainer's checkpoint, or the weights kept in a bundle."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from attnseg.runtime.bundle import Training, Validation
from attnseg.runtime.errors import ConfigError, TrainingError
from attnseg.trainer.checkpoint import (
    checkpoint_config,
    checkpoint_preparation,
    checkpoint_weights,
    load_checkpoint,
)
from attnseg.trainer.data import Preparation
from attnseg.trainer.model import NetworkConfig
from attnseg.trainer.networks import Network, build_network
from attnseg.trainer.paper import RESULTS, table_row
from attnseg.trainer.task import Task

_METADATA_KEY = "attnseg"
_SAFETENSORS_FORMAT = "attnseg-weights-1"
_NAMES = {"attnresunet": "attention-resnet-unet", "resunet": "resnet-unet"}
# What files of the right format with the wrong content run into.
_NONSENSE = (KeyError, TypeError, AttributeError, ValidationError, ConfigError, RuntimeError)


@dataclass(frozen=True)
class Description:
    """What people should know of a model."""

    name: str = "attention-resnet-unet"
    description: str = ""
    intended_use: str = "research use only, not for clinical use"


@dataclass(frozen=True)
class TrainedModel:
    """A network with its weights and what the runtime has to know to use it.

    Attributes:
        network: on the CPU, in evaluation mode.
        preparation: of its inputs, and the task.
        patch: edge of the window it was trained on, in voxels.
        overlap: of the windows it was validated with.
        training: where the weights come from.
        validation: what they achieved.
        description: name and words for the manifest.
    """

    network: Network
    preparation: Preparation
    patch: int
    overlap: float
    training: Training
    validation: Validation
    description: Description = Description()


def _network(config: NetworkConfig, weights: dict[str, torch.Tensor]) -> Network:
    network = build_network(config)
    network.load_state_dict(
        {
            name: value.float() if value.is_floating_point() else value
            for name, value in weights.items()
        }
    )
    return network.eval()


def _from_checkpoint(path: Path) -> TrainedModel:
    state = load_checkpoint(path)
    config = checkpoint_config(state)
    scores = state["validation"]
    if scores is None:
        raise TrainingError(
            f"{path}: was saved in the middle of an epoch, so its accuracy is not known; give "
            "best.pt, or resume the run"
        )
    training = Training(
        data=state["data"],
        train_cases=tuple(state["split"]["train"]),
        validation_cases=tuple(state["split"]["validation"]),
        synthetic_cases=config.synthetic_cases,
        epochs=state["epoch"],
        seconds=round(state["seconds"]),
        device=state["device"],
        config=config.to_dict(),
    )
    preparation = checkpoint_preparation(state)
    where = "whole cases" if preparation.grid is None else "whole cases on the model's grid"
    validation = Validation(
        dice={region: round(scores[region], 4) for region in preparation.task.regions},
        method=(
            f"mean over {len(training.validation_cases)} {where}, windows of "
            f"{config.patch} with overlap {config.overlap:g}, torch {config.precision}, no "
            "test-time augmentation, no clean-up; the epoch was chosen on the same cases"
        ),
    )
    return TrainedModel(
        _network(config.network, checkpoint_weights(state)),
        preparation,
        config.patch,
        config.overlap,
        training,
        validation,
        _describe(config.network, preparation.task),
    )


def _describe(config: NetworkConfig, task: Task) -> Description:
    """The words for a model that was given none."""
    row = table_row(config)
    title = RESULTS[row].title
    return Description(_NAMES.get(row, row), f"{title} for {task.description}")


def _from_safetensors(path: Path) -> TrainedModel:
    try:
        with safe_open(path, "pt") as stored:
            metadata = json.loads((stored.metadata() or {}).get(_METADATA_KEY, "{}"))
            weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise TrainingError(f"{path}: is damaged or not a safetensors file ({error})") from error
    if not isinstance(metadata, dict) or metadata.get("format") != _SAFETENSORS_FORMAT:
        raise TrainingError(f"{path}: holds no weights of attnseg (format {_SAFETENSORS_FORMAT})")
    try:
        return TrainedModel(
            _network(NetworkConfig.from_dict(metadata["network"]), weights),
            Preparation.from_dict(metadata),
            metadata["patch"],
            metadata["overlap"],
            Training.model_validate(metadata["training"]),
            Validation.model_validate(metadata["validation"]),
            Description(**metadata["description"]),
        )
    except _NONSENSE as error:
        raise TrainingError(f"{path}: its metadata and weights do not agree ({error})") from error


def load_trained(path: Path) -> TrainedModel:
    """Load a checkpoint (`.pt`) or the weights of a bundle (`.safetensors`).

    Raises:
        TrainingError: the file is missing, damaged, or not one of attnseg's.
    """
    if path.is_dir():
        raise TrainingError(f"{path}: is a folder; give the best.pt or weights.safetensors in it")
    if not path.is_file():
        raise TrainingError(f"{path}: does not exist; give a checkpoint such as runs/a/best.pt")
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    try:
        return _from_checkpoint(path)
    except _NONSENSE as error:
        raise TrainingError(
            f"{path}: its configuration and weights do not agree ({error})"
        ) from error


def encode_weights(model: TrainedModel) -> bytes:
    """A safetensors file that `load_trained` reads back; the same bytes for the same model."""
    metadata: dict[str, Any] = {
        "format": _SAFETENSORS_FORMAT,
        "network": model.network.config.to_dict(),
        **model.preparation.to_dict(),
        "patch": model.patch,
        "overlap": model.overlap,
        "training": model.training.model_dump(mode="json"),
        "validation": model.validation.model_dump(mode="json"),
        "description": asdict(model.description),
    }
    weights = {name: value.contiguous() for name, value in model.network.state_dict().items()}
    return save(weights, {_METADATA_KEY: json.dumps(metadata)})
