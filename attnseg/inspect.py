"""What a bundle holds, for people to read."""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from attnseg.runtime.bundle import Bundle, FileEntry

_SHORT = 12  # digits of a checksum that tell files apart


@dataclass(frozen=True)
class Contents:
    """What a bundle holds.

    Attributes:
        files: name, role, precision, what it is for, MB and the start of its SHA-256.
        layers: a line for each graph: how many nodes of which type, in which precision.
    """

    files: list[tuple[str, ...]]
    layers: list[str]


def _purpose(entry: FileEntry) -> str:
    build = entry.engine
    if build is None:
        return ""
    window = "x".join(str(edge) for edge in build.window)
    later = " and later" if build.compatibility == "ampere+" else ""
    return f"{build.target}{later}, {build.builder} {build.version}, {build.batch}x{window}"


def _layers(file: Path) -> str:
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(file))
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
    """Look into every file of a bundle; its layers need onnx (`attnseg[export]`)."""
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
    graphs = [bundle.folder / name for name, entry in entries.items() if entry.role == "onnx"]
    if importlib.util.find_spec("onnx") is None:
        return Contents(files, ["layers: need onnx; pip install 'attnseg[export]'"])
    return Contents(files, [_layers(graph) for graph in graphs])
