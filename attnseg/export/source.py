"""What an export starts from: a checkpoint of the trainer, or an ONNX file of any trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
from pydantic import ValidationError

from attnseg._version import __version__
from attnseg.export.checkpoint import TrainedModel, encode_weights, load_trained
from attnseg.export.foreign import Spec, read_foreign, read_spec
from attnseg.export.measure import TorchEngine
from attnseg.export.onnx import export_onnx
from attnseg.runtime.bundle import (
    FORMAT_VERSION,
    Budget,
    Inference,
    Label,
    Manifest,
    file_entry,
)
from attnseg.runtime.engines.base import Engine
from attnseg.runtime.engines.onnxruntime import OnnxRuntimeEngine
from attnseg.runtime.errors import ConfigError, EngineError, ExportError
from attnseg.runtime.segmenter import available_threads

ONNX_FILE = "model.onnx"


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        graph: ONNX, fp32.
        weights: to be kept in the bundle, for `attnseg export` to read again; None if there are
            none but the graph's.
        reference: what every file of the bundle is compared with.
        manifest: of a bundle with this graph; its `files` are still to be filled in.
    """

    graph: bytes
    weights: bytes | None
    reference: Engine
    manifest: Manifest


def open_source(path: Path, spec: Path | None, words: Mapping[str, str], budget: Budget) -> Source:
    """Read a model.

    Args:
        path: `.pt` of the trainer, `weights.safetensors` of a bundle, or `.onnx` with a spec.
        spec: what the runtime has to know of an ONNX file.
        words: name, description or intended use that take the place of those stored.
        budget: for the manifest.

    Raises:
        ConfigError: an ONNX file comes without a spec, another file with one, or the spec
            breaks a rule.
        TrainingError: the checkpoint cannot be read.
        ExportError: the ONNX file cannot be read, or is no 3-D model that the spec describes.
    """
    foreign = path.suffix.lower() == ".onnx"
    if foreign and spec is None:
        raise ConfigError(
            f"{path}: an ONNX file does not say what its channels and labels are; give --spec "
            "model.json (docs/export.md)"
        )
    if not foreign and spec is not None:
        raise ConfigError(f"{path}: --spec is for ONNX files; a checkpoint knows its channels")
    if spec is not None:
        return _from_onnx(path, spec, words, budget)
    model = load_trained(path)
    described = replace(model, description=replace(model.description, **words))
    return _from_checkpoint(described, budget)


def _with_metadata(graph: bytes, manifest: Manifest) -> bytes:
    """The graph with what a reader who has no bundle should know, as ONNX metadata."""
    model = onnx.load_from_string(graph)
    labels = ", ".join(f"{label.value} {label.name}" for label in manifest.labels)
    words = {
        "name": manifest.name,
        "description": manifest.description,
        "intended_use": manifest.intended_use,
        "channels": ", ".join(channel.name for channel in manifest.channels),
        "labels": labels,
        "orientation": manifest.orientation,
        "spacing_mm": " x ".join(f"{s:g}" for s in manifest.spacing_mm),
        "window": " x ".join(str(edge) for edge in manifest.inference.window),
    }
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, words)
    return bytes(model.SerializeToString(deterministic=True))


def _from_checkpoint(model: TrainedModel, budget: Budget) -> Source:
    graph = export_onnx(model.network)
    manifest = _trained_manifest(model, budget, graph)
    graph = _with_metadata(graph, manifest)
    return Source(graph, encode_weights(model), TorchEngine(model.network), manifest)


def _trained_manifest(model: TrainedModel, budget: Budget, graph: bytes) -> Manifest:
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
        budget=budget,
        files={ONNX_FILE: file_entry("onnx", graph, "fp32")},
    )


def _from_onnx(path: Path, spec_file: Path, words: Mapping[str, str], budget: Budget) -> Source:
    spec = read_spec(spec_file).model_copy(update=dict(words))
    graph = read_foreign(path, spec)
    try:
        manifest = _foreign_manifest(spec, path.name, budget, graph)
    except ValidationError as error:
        raise ConfigError(f"{spec_file}: {error.errors()[0]['msg']}; see docs/export.md") from error
    return Source(_with_metadata(graph, manifest), None, _reference(path, graph), manifest)


def _reference(path: Path, graph: bytes) -> Engine:
    """The file as ONNX Runtime computes it: there is no other word on what it should give."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / ONNX_FILE
        file.write_bytes(graph)
        try:
            return OnnxRuntimeEngine(file, "fp32", available_threads())
        except EngineError as error:
            reason = str(error).split("refuses it ", 1)[-1]
            raise ExportError(
                f"{path}: ONNX Runtime cannot run it {reason}; attnseg exports models of standard "
                "ONNX operators"
            ) from error


def _foreign_manifest(spec: Spec, name: str, budget: Budget, graph: bytes) -> Manifest:
    fields = {field: getattr(spec, field) for field in Spec.model_fields if field != "inference"}
    return Manifest(
        format="attnseg-bundle",
        format_version=FORMAT_VERSION,
        created_with=f"attnseg {__version__}",
        inference=spec.inference.complete(),
        network={"onnx": name},
        training=None,
        validation=None,
        budget=budget,
        files={ONNX_FILE: file_entry("onnx", graph, "fp32")},
        **fields,
    )
