"""Trained models read from a checkpoint of the trainer, or from the weights of a bundle."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from attnseg.data.task import LabelledTask
from attnseg.evaluation.paper import RESULTS, table_row
from attnseg.runtime.errors import ConfigError, TrainingError, TrainingSetting
from attnseg.runtime.model.bundle import BundleFile
from attnseg.runtime.model.manifest import Training, Validation
from attnseg.runtime.steps.windows import WindowOptions
from attnseg.trainer.checkpoint import (
    checkpoint_config,
    checkpoint_preparation,
    checkpoint_weights,
    load_checkpoint,
    weights_digest,
)
from attnseg.trainer.model import NetworkConfig
from attnseg.trainer.networks import Network, build_network
from attnseg.trainer.preparation import Preparation

_METADATA_KEY = "attnseg"
_DIGEST = "weights_sha256"  # missing in files of earlier versions
_SAFETENSORS_FORMAT = "attnseg-weights-1"
_NAMES = {"attnresunet": "attention-resnet-unet", "resunet": "resnet-unet"}
# Errors raised by files of the right format with invalid content.
_NONSENSE = (KeyError, TypeError, AttributeError, ValidationError, ConfigError, RuntimeError)


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
            f"{path}: was saved in the middle of an epoch, so its accuracy is not known",
            "give best.pt, or resume the run",
        )
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
    preparation = checkpoint_preparation(state)
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
        network=_network(config.network, checkpoint_weights(state)),
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


def _metadata_of(content: bytes) -> dict[str, Any]:
    """Metadata in the header of a safetensors file; empty if it is not of attnseg.

    Raises:
        ValueError, RecursionError: The metadata is not JSON, or nested too deeply.
    """
    size = int.from_bytes(content[:8], "little")
    words = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
    metadata = json.loads(words.get(_METADATA_KEY, "{}"))
    return metadata if isinstance(metadata, dict) else {}


def _from_safetensors(path: Path, content: bytes) -> TrainedModel:
    try:
        weights = load(content)  # which checks the header
        metadata = _metadata_of(content)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise TrainingError(f"{path}: is damaged or not a safetensors file ({error})") from error
    if metadata.get("format") != _SAFETENSORS_FORMAT:
        raise TrainingError(f"{path}: holds no weights of attnseg (format {_SAFETENSORS_FORMAT})")
    if metadata.get(_DIGEST, "") not in ("", weights_digest(weights)):
        raise TrainingError(f"{path}: its weights do not match their digest", "copy it again")
    try:
        return TrainedModel(
            network=_network(NetworkConfig.from_dict(metadata["network"]), weights),
            preparation=Preparation.from_dict(metadata),
            patch=metadata["patch"],
            overlap=metadata["overlap"],
            training=TypeAdapter(Training).validate_python(metadata["training"]),
            validation=TypeAdapter(Validation).validate_python(metadata["validation"]),
            description=Description(**metadata["description"]),
        )
    except _NONSENSE as error:
        raise TrainingError(f"{path}: its metadata and weights do not agree ({error})") from error


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
    metadata[_DIGEST] = weights_digest(weights)
    return save(weights, {_METADATA_KEY: json.dumps(metadata)})
