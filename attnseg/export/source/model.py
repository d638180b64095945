"""Source of an export: a checkpoint of the trainer, or an ONNX file of any trainer."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from attnseg._version import __version__
from attnseg.export.graphs.graph import Graph
from attnseg.export.source.checkpoint import TrainedModel, encode_weights, load_trained
from attnseg.export.source.foreign import read_foreign, read_spec
from attnseg.export.source.onnx import export_onnx
from attnseg.runtime.engines.base import Engine
from attnseg.runtime.engines.onnxruntime import OnnxRuntimeEngine
from attnseg.runtime.errors import ConfigError, EngineError, ExportError, Setting
from attnseg.runtime.model.bundle import file_entry
from attnseg.runtime.model.manifest import Budget, Inference, Manifest, ModelRecord
from attnseg.runtime.options import available_threads
from attnseg.trainer.engine import TorchEngine

ONNX_FILE = "model.onnx"


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        graph: The fp32 graph.
        weights: Content of the bundle's `weights.safetensors`, which `attnseg export` can read;
            None for an ONNX file.
        reference: Engine that every file of the bundle is compared with.
        manifest: Manifest of the bundle; its `files` list the graph alone.
        notes: Sentences on what differs between the file and the graph, for the documents.
    """

    graph: Graph
    weights: bytes | None
    reference: Engine
    manifest: Manifest
    notes: tuple[str, ...] = ()


def open_source(path: Path, spec: Path | None, words: Mapping[str, Any], budget: Budget) -> Source:
    """Read a model.

    Args:
        path: `.pt` file of the trainer, `weights.safetensors` of a bundle, or `.onnx` file.
        spec: JSON file that describes an ONNX file; None for other files.
        words: Name, description or intended use that replace those stored with the model.
        budget: Budget for the manifest.

    Raises:
        ConfigError: An ONNX file has no spec, another file has one, or the spec is invalid.
        TrainingError: The checkpoint cannot be read.
        ExportError: The ONNX file cannot be read, or does not match its spec.
    """
    foreign = path.suffix.lower() == ".onnx"
    if foreign and spec is None:
        raise ConfigError(
            f"{path}: an ONNX file does not say what its channels and labels are",
            "give {} (docs/export.md)",
            Setting("spec", "model.json"),
        )
    if not foreign and spec is not None:
        raise ConfigError(
            f"{path}: a spec is for ONNX files; a checkpoint knows its channels",
            "leave {} out",
            Setting("spec"),
        )
    if spec is not None:
        return _from_onnx(path, spec, words, budget)
    model = load_trained(path)
    words_of_model = dataclasses.replace(model.description, **words)
    described = dataclasses.replace(model, description=words_of_model)
    return _from_checkpoint(described, budget)


def _with_metadata(graph: Graph, record: ModelRecord) -> Graph:
    """Add metadata to a graph, for readers without the bundle's manifest."""
    model, task = graph.model, record.task
    words = {
        "name": record.name,
        "description": record.description,
        "intended_use": record.intended_use,
        "channels": ", ".join(task.channel_names),
        "labels": ", ".join(f"{label.value} {label.name}" for label in task.labels),
        "orientation": record.preprocessing.orientation or "as stored",
        "spacing_mm": " x ".join(f"{s:g}" for s in record.spacing_mm or ()) or "any",
        "window": " x ".join(str(edge) for edge in record.inference.window),
    }
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, words)
    return Graph(model)


def make_source(
    record: ModelRecord, graph: Graph, weights: bytes | None, reference: Engine, **known: Any
) -> Source:
    """A source whose manifest lists the graph alone; `known` are further manifest fields."""
    graph = _with_metadata(graph, record)
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    manifest = Manifest(
        **fields,
        created_with=f"attnseg {__version__}",
        files={ONNX_FILE: file_entry("onnx", graph.content, "fp32")},
        **known,
    )
    return Source(graph, weights, reference, manifest)


def _from_checkpoint(model: TrainedModel, budget: Budget) -> Source:
    edge, stored = model.patch, model.preparation.task
    record = ModelRecord(
        name=model.description.name,
        description=model.description.description,
        intended_use=model.description.intended_use,
        task=stored.task,
        spacing_mm=stored.spacing_mm,
        preprocessing=model.preparation.preprocessing,
        inference=Inference(
            window=(edge, edge, edge),
            overlap=model.overlap,
            window_multiple=model.network.config.stride,
            min_voxels=stored.min_voxels,
        ),
        foreground_ml=model.preparation.foreground_ml,
    )
    return make_source(
        record,
        export_onnx(model.network),
        encode_weights(model),
        TorchEngine(model.network),
        network=model.network.config.to_dict(),
        training=model.training,
        validation=model.validation,
        budget=budget,
    )


def _from_onnx(path: Path, spec_file: Path, words: Mapping[str, Any], budget: Budget) -> Source:
    spec = dataclasses.replace(read_spec(spec_file), **words)
    graph, notes = read_foreign(path, spec)
    source = make_source(
        spec,
        graph,
        None,
        graph_reference(path, graph),
        network={"onnx": path.name},
        training=None,
        validation=None,
        budget=budget,
    )
    return dataclasses.replace(source, notes=notes)


def graph_reference(path: Path, graph: Graph) -> Engine:
    """ONNX Runtime in fp32: the only reference available for an ONNX file."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / ONNX_FILE
        file.write_bytes(graph.content)
        try:
            return OnnxRuntimeEngine(file, "fp32", available_threads())
        except EngineError as error:
            reason = error.cause.split("refuses it ", 1)[-1]
            raise ExportError(
                f"{path}: ONNX Runtime cannot run it {reason}",
                "attnseg exports models of standard ONNX operators that ONNX Runtime runs",
            ) from error
