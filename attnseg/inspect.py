"""Human-readable summary of a bundle's files and graphs."""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import dataclass

from attnseg.runtime.extras import install
from attnseg.runtime.model.bundle import Bundle, BundleFile
from attnseg.runtime.model.manifest import FileEntry
from attnseg.runtime.model.verdict import read_verdicts

FILES_HEADER = ("file", "role", "precision", "for", "MB", "sha256")
_SHORT = 12  # digits of a checksum that are shown


@dataclass(frozen=True)
class Contents:
    """Contents of a bundle.

    Attributes:
        files: One row per file, with the columns of `FILES_HEADER`.
        verdicts: One line per engine and precision that the parity gate measured.
        layers: One line per graph: number of nodes by operator and output data type.
    """

    files: list[tuple[str, ...]]
    verdicts: list[str]
    layers: list[str]


def _purpose(entry: FileEntry) -> str:
    build = entry.engine
    if build is None:
        return ""
    window = "x".join(str(edge) for edge in build.window)
    later = " and later" if build.compatibility == "ampere+" else ""
    return f"{build.target}{later}, {build.builder} {build.version}, {build.batch}x{window}"


def _layers(file: BundleFile) -> str:
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(file.read_bytes()))
    graph = model.graph
    values = (*graph.value_info, *graph.output, *graph.input)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    names = {t: onnx.TensorProto.DataType.Name(t).lower() for t in set(types.values())}
    counts = Counter(
        (node.op_type, names.get(types.get(node.output[0], 0), "unknown")) for node in graph.node
    )
    parts = (f"{count} {kind} {dtype}" for (kind, dtype), count in sorted(counts.items()))
    return f"{file.name}: {', '.join(parts)}"


def inspect_bundle(bundle: Bundle) -> Contents:
    """Summarise every file of a bundle; `layers` requires onnx (the extra `export`)."""
    entries = bundle.manifest.files
    files: list[tuple[str, ...]] = [
        (
            name,
            entry.role,
            entry.precision or "",
            _purpose(entry),
            f"{entry.size_bytes / 1e6:.1f}",
            entry.sha256[:_SHORT],
        )
        for name, entry in entries.items()
    ]
    graphs = [file for file in bundle.files if file.entry.role == "onnx"]
    verdicts = [str(verdict) for verdict in read_verdicts(bundle)]
    if importlib.util.find_spec("onnx") is None:
        return Contents(files, verdicts, [f"layers: need onnx; {install('export')}"])
    return Contents(files, verdicts, [_layers(graph) for graph in graphs])
