"""Checkpoint to bundle: export, compare with torch, and only then write."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from attnseg._version import __version__
from attnseg.export.checkpoint import TrainedModel, encode_weights, load_trained
from attnseg.export.onnx import export_onnx
from attnseg.export.verify import Parity, compare_with_torch
from attnseg.runtime.bundle import (
    FORMAT_VERSION,
    Bundle,
    Inference,
    Label,
    Manifest,
    check_free,
    file_entry,
    write_bundle,
)

ONNX_FILE, WEIGHTS_FILE = "model.onnx", "weights.safetensors"


def _manifest(model: TrainedModel, files: dict[str, bytes]) -> Manifest:
    edge, description, preparation = model.patch, model.description, model.preparation
    task = preparation.task
    return Manifest(
        format="attnseg-bundle",
        format_version=FORMAT_VERSION,
        name=description.name,
        created_with=f"attnseg {__version__}",
        description=description.description,
        intended_use=description.intended_use,
        channels=task.channels,
        labels=tuple(Label(name=name, value=value) for name, value in task.labels),
        regions=dict(task.regions),
        display=task.display,
        orientation=task.orientation,
        spacing_mm=task.spacing_mm,
        grid=preparation.grid,
        normalisation=preparation.normalisation,
        inference=Inference(
            window=(edge, edge, edge),
            overlap=model.overlap,
            window_multiple=model.network.config.stride,
            min_voxels=task.min_voxels,
        ),
        network=model.network.config.to_dict(),
        training=model.training,
        validation=model.validation,
        files={
            ONNX_FILE: file_entry("onnx", files[ONNX_FILE]),
            WEIGHTS_FILE: file_entry("weights", files[WEIGHTS_FILE]),
        },
    )


def export_bundle(
    checkpoint: Path, folder: Path, words: Mapping[str, str] | None = None
) -> tuple[Bundle, list[Parity]]:
    """Export a checkpoint to a bundle.

    Args:
        checkpoint: `.pt` of the trainer, or `weights.safetensors` of a bundle.
        folder: the bundle to write; must not exist or be empty.
        words: fields of `Description` that differ from those stored with the weights.

    Returns:
        The bundle, and each engine's parity with torch.

    Raises:
        TrainingError: the checkpoint cannot be read.
        EngineError: the exported graph does not give torch's logits; nothing is written.
        BundleError: the folder is taken or cannot be written.
    """
    check_free(folder)
    model = load_trained(checkpoint)
    model = replace(model, description=replace(model.description, **(words or {})))
    files = {ONNX_FILE: export_onnx(model.network), WEIGHTS_FILE: encode_weights(model)}
    with tempfile.TemporaryDirectory() as scratch:
        onnx_file = Path(scratch) / ONNX_FILE
        onnx_file.write_bytes(files[ONNX_FILE])
        parity = compare_with_torch(model, onnx_file)
    manifest = _manifest(model, files)
    return write_bundle(folder, manifest, files), parity
