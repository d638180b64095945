"""Trained models read from a checkpoint of the trainer, or from the weights of a bundle."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from safetensors.torch import load, save

from attnseg.data.task import LabelledTask
from attnseg.evaluation.paper import RESULTS, table_row
from attnseg.runtime.errors import ConfigError, TrainingError, TrainingSetting
from attnseg.runtime.model.bundle import BundleFile
from attnseg.runtime.model.manifest import Training, Validation
from attnseg.runtime.steps.windows import WindowOptions
from attnseg.trainer.checkpoint import (
    check_task,
    checkpoint_config,
    checkpoint_preparation,
    checkpoint_weights,
    load_checkpoint,
    same_layout,
    weights_digest,
)
from attnseg.trainer.decode import explain
from attnseg.trainer.model import RELATED, NetworkConfig
from attnseg.trainer.networks import Network, check_size, empty_network
from attnseg.trainer.preparation import Preparation

_METADATA_KEY = "attnseg"
_SAFETENSORS_FORMAT = "attnseg-weights-1"
_NAMES = {"attnresunet": "attention-resnet-unet", "resunet": "resnet-unet"}


@dataclass(frozen=True)
class Description:
    """Name, description and intended use of a model, for the manifest."""

    name: str = "attention-resnet-unet"
    description: str = ""
    intended_use: str = "research use only, not for clinical use"


@dataclass(frozen=True)
class TrainedModel:
    """A network with its weights and the metadata that the runtime needs.

    Attributes:
        network: Network on the CPU, in evaluation mode.
        preparation: Task, and preprocessing of the inputs.
        patch: Edge length of the training patches, in voxels.
        overlap: Overlap of the windows in validation, as a share of the window.
        training: Origin of the weights.
        validation: Scores of the weights on the validation cases.
        description: Name, description and intended use.
    """

    network: Network
    preparation: Preparation
    patch: int
    overlap: float
    training: Training
    validation: Validation
    description: Description = Description()

    @property
    def windows(self) -> WindowOptions:
        """Options of its sliding window."""
        return WindowOptions((self.patch,) * 3, self.overlap, self.network.config.stride)


def _network(path: Path, config: NetworkConfig, weights: dict[str, torch.Tensor]) -> Network:
    network = empty_network(config)
    if not same_layout(weights, network):
        raise TrainingError(f"{path}: its configuration and weights do not agree")
    network.load_state_dict(
        {
            name: value.float() if value.is_floating_point() else value
            for name, value in weights.items()
        },
        assign=True,
    )
    return network.eval()


def _from_checkpoint(path: Path) -> TrainedModel:
    state = load_checkpoint(path)
    config = checkpoint_config(state)
    preparation = checkpoint_preparation(state)
    scores = state["validation"]
    if scores is None:
        raise TrainingError(
            f"{path}: was saved in the middle of an epoch, so its accuracy is not known",
            "give best.pt, or resume the run",
        )
    for region in preparation.task.task.regions:
        if not 0 <= scores.get(region, math.nan) <= 1:
            raise TrainingError(f"{path}: holds no Dice coefficient of {region}")
    training = Training(
        data=state["data"],
        train_cases=tuple(state["split"]["train"]),
        validation_cases=tuple(state["split"]["validation"]),
        synthetic_cases=config.synthetic_cases,
        epochs=state["epoch"],
        seconds=float(round(state["seconds"])),
        device=state["device"],
        config=config.to_dict(),
    )
    where = (
        "whole cases"
        if preparation.preprocessing.grid is None
        else "whole cases on the model's grid"
    )
    validation = Validation(
        dice={region: round(scores[region], 4) for region in preparation.task.task.regions},
        method=(
            f"mean over {len(training.validation_cases)} {where}, windows of "
            f"{config.patch} with overlap {config.overlap:g}, torch {config.precision}, no "
            "test-time augmentation, no clean-up; the epoch was chosen on the same cases"
        ),
    )
    return TrainedModel(
        network=_network(path, config.network, checkpoint_weights(state)),
        preparation=preparation,
        patch=config.patch,
        overlap=config.overlap,
        training=training,
        validation=validation,
        description=_describe(config.network, preparation.task),
    )


def _describe(config: NetworkConfig, task: LabelledTask) -> Description:
    """Default name and description of a model: its data set and its architecture."""
    name, title = _architecture(config)
    if not task.description:
        return Description(name, title)
    data = re.sub(r"\W+", "-", task.description.lower()).strip("-")
    return Description(f"{data}-{name}", f"{title} for {task.description}")


def _architecture(config: NetworkConfig) -> tuple[str, str]:
    """Name and title of a network; those of the paper for the paper's networks alone."""
    if config.architecture in RELATED:
        return config.architecture, RELATED[config.architecture]
    row = table_row(config.to_dict())
    if row is not None:
        return _NAMES.get(row, row), RESULTS[row].title
    scales = "" if config.multi_scale else "-single-scale"
    without = "with" if config.multi_scale else "without"
    return (
        f"attention-resnet-unet-{config.attention}{scales}",
        f"Attention-ResNetUNet with attention {config.attention} and {without} the multi-scale "
        "module",
    )


class _Metadata(BaseModel):
    """Metadata of a weights file, besides the preparation."""

    model_config = ConfigDict(strict=True)

    format: Literal["attnseg-weights-1"]
    weights_sha256: str = ""  # missing in files of earlier versions
    network: dict[str, Any]
    patch: PositiveInt
    overlap: Annotated[float, Field(ge=0, lt=1)]
    training: Training
    validation: Validation
    description: Description


def _metadata_of(content: bytes) -> bytes:
    """JSON of attnseg in the header of a safetensors file, which is valid; empty without one."""
    size = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
    return metadata.get(_METADATA_KEY, "").encode()


def _from_safetensors(path: Path, content: bytes) -> TrainedModel:
    try:
        weights = load(content)
    except Exception as error:  # a type that this version of PyTorch does not have is a KeyError
        raise TrainingError(f"{path}: is damaged or not a safetensors file ({error})") from error
    stored = _metadata_of(content)
    if not stored:
        raise TrainingError(f"{path}: holds no weights of attnseg (format {_SAFETENSORS_FORMAT})")
    try:
        metadata = _Metadata.model_validate_json(stored)
        preparation = Preparation.from_dict(json.loads(stored))
        config = NetworkConfig.from_dict(metadata.network)
        check_size(config)
    except ValidationError as error:
        raise TrainingError(f"{path}: {explain(error, 'metadata')}") from error
    except ConfigError as error:
        raise TrainingError(f"{path}: {error.cause}", error.mend, *error.settings) from error
    if metadata.weights_sha256 not in ("", weights_digest(weights)):
        raise TrainingError(f"{path}: its weights do not match their digest", "copy it again")
    check_task(path, config, preparation.task.task)
    return TrainedModel(
        network=_network(path, config, weights),
        preparation=preparation,
        patch=metadata.patch,
        overlap=metadata.overlap,
        training=metadata.training,
        validation=metadata.validation,
        description=metadata.description,
    )


def check_file(path: Path) -> None:
    """Raise `TrainingError` unless `path` is a file, as a model to export or load is."""
    if path.is_dir():
        raise TrainingError(f"{path}: is a folder", "give the best.pt or weights.safetensors in it")
    if not path.is_file():
        onnx = path.suffix.lower() == ".onnx"
        mend = "give an ONNX file" if onnx else "give a checkpoint such as runs/a/best.pt"
        raise TrainingError(f"{path}: does not exist", mend)


def load_trained(file: Path | BundleFile) -> TrainedModel:
    """Load a checkpoint (`.pt`) or the weights of a bundle (`.safetensors`).

    Raises:
        TrainingError: The file is missing, damaged, or not written by attnseg, or a weight is NaN
            or infinite.
        BundleError: The weights do not match the checksum of their bundle.
    """
    if isinstance(file, BundleFile):
        model, path = _from_safetensors(file.path, file.read_bytes()), file.path
    else:
        model, path = _read_trained(file), file
    for name, value in model.network.state_dict().items():
        wrong = int(torch.count_nonzero(~torch.isfinite(value)))
        if wrong:
            raise TrainingError(
                f"{path}: {wrong} of the {value.numel()} values of {name} are NaN or infinite",
                "give an earlier checkpoint, or train again with a lower {}",
                TrainingSetting("learning_rate"),
            )
    return model


def _read_trained(path: Path) -> TrainedModel:
    check_file(path)
    if path.suffix != ".safetensors":
        return _from_checkpoint(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read ({error.strerror})") from error
    return _from_safetensors(path, content)


def encode_weights(model: TrainedModel) -> bytes:
    """Encode a model as a safetensors file for `load_trained`; deterministic."""
    metadata: dict[str, Any] = {
        "format": _SAFETENSORS_FORMAT,
        "network": model.network.config.to_dict(),
        **model.preparation.to_dict(),
        "patch": model.patch,
        "overlap": model.overlap,
        "training": asdict(model.training),
        "validation": asdict(model.validation),
        "description": asdict(model.description),
    }
    weights = {name: value.contiguous() for name, value in model.network.state_dict().items()}
    metadata["weights_sha256"] = weights_digest(weights)
    return save(weights, {_METADATA_KEY: json.dumps(metadata)})
