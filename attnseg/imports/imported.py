"""Import of a model: from its network and record to a bundle that passed the parity gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from attnseg.export.export import Exported, ExportOptions, ExportProgress, export_source
from attnseg.export.gate.samples import SampleSource
from attnseg.export.graphs.graph import Graph
from attnseg.export.source.foreign import read_spec
from attnseg.export.source.model import Source, graph_reference, make_source
from attnseg.imports.monai.bundle import read_monai
from attnseg.imports.networks import ImportedModel, network_graph
from attnseg.imports.nnunet import read_nnunet
from attnseg.imports.torchscript import (
    check_same_function,
    logits_network,
    read_torchscript,
    scripted_graph,
)
from attnseg.runtime.engines.base import Engine
from attnseg.runtime.model.manifest import ModelRecord
from attnseg.trainer.engine import TorchEngine


def _network_source(found: ImportedModel, options: ExportOptions) -> Source:
    """Source of a network, whose reference is the network itself in PyTorch."""
    channels, window = len(found.record.task.channels), found.record.inference.window
    graph = network_graph(found.network, channels, window)
    source = _source(found.record, graph, TorchEngine(found.network), found.origin, options)
    return replace(source, notes=found.notes)


def _source(
    record: ModelRecord,
    graph: Graph,
    reference: Engine,
    origin: dict[str, Any],
    options: ExportOptions,
) -> Source:
    words: dict[str, Any] = dict(options.words)
    return make_source(
        replace(record, **words),
        graph,
        None,
        reference,
        network=origin,
        training=None,
        validation=None,
        budget=options.budget,
    )


def import_nnunet(
    model: Path,
    folder: Path,
    folds: Sequence[str] = ("all",),
    checkpoint: str = "final",
    options: ExportOptions | None = None,
    samples: SampleSource | None = None,
    progress: ExportProgress | None = None,
) -> Exported:
    """Write a bundle of a model folder of nnU-Net.

    Args:
        model: Model folder; see `read_nnunet`, as for `folds` and `checkpoint`.
        folder: Folder to write the bundle to; see `export_bundle`, as for the other arguments.
        folds: Folds whose logits are averaged.
        checkpoint: `final` or `best`.
        options: Content of the bundle.
        samples: Source of the cases that every precision is compared on.
        progress: Callbacks that receive the progress.

    Raises:
        ExportError: The folder is no model that the runtime can run unchanged; nothing is written.
    """

    def read(given: ExportOptions) -> Source:
        return _network_source(read_nnunet(model, folds, checkpoint), given)

    return export_source(model, read, folder, options, samples, progress)


def import_torchscript(
    model: Path,
    spec_file: Path,
    folder: Path,
    options: ExportOptions | None = None,
    samples: SampleSource | None = None,
    progress: ExportProgress | None = None,
) -> Exported:
    """Write a bundle of a TorchScript file.

    The reference of the parity gate is the network in PyTorch, without an activation at its end. If
    operators that change nothing follow the activation, it is the graph in ONNX Runtime, and its
    probabilities are compared with those of the network.

    Args:
        model: File of `torch.jit.save`.
        spec_file: JSON file that describes the model.
        folder: Folder to write the bundle to; see `export_bundle`, as for the other arguments.
        options: Content of the bundle.
        samples: Source of the cases that every precision is compared on.
        progress: Callbacks that receive the progress.

    Raises:
        ConfigError: The spec is invalid.
        ExportError: The file is no TorchScript, or cannot be exported; nothing is written.
    """

    def read(given: ExportOptions) -> Source:
        spec = read_spec(spec_file)
        network = read_torchscript(model)
        graph, notes = scripted_graph(model, network, spec)
        reference: Engine = TorchEngine(network)
        if notes:  # the network gives probabilities, and the bundle's graph logits
            logits = logits_network(network)
            reference = TorchEngine(logits) if logits else graph_reference(model, graph)
            check_same_function(model, network, reference, spec)
        origin = {"torchscript": model.name}
        source = _source(spec, graph, reference, origin, given)
        return replace(source, notes=notes)

    return export_source(model, read, folder, options, samples, progress)


def import_monai(
    model: Path,
    folder: Path,
    options: ExportOptions | None = None,
    samples: SampleSource | None = None,
    progress: ExportProgress | None = None,
) -> Exported:
    """Write a bundle of a MONAI bundle.

    Args:
        model: Folder of the MONAI bundle; see `read_monai`.
        folder: Folder to write the bundle to; see `export_bundle`, as for the other arguments.
        options: Content of the bundle.
        samples: Source of the cases that every precision is compared on.
        progress: Callbacks that receive the progress.

    Raises:
        ExportError: The MONAI bundle has a step that the runtime does not have; nothing is written.
    """

    def read(given: ExportOptions) -> Source:
        return _network_source(read_monai(model), given)

    return export_source(model, read, folder, options, samples, progress)
