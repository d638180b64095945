"""Attention weights in the ONNX graph of a bundle, computed by ONNX Runtime.

The weights are outputs of sigmoids within the graph. ONNX Runtime returns a tensor that the graph
declares as an output, and declaring one needs no ONNX library: a message in protobuf's encoding
may hold a field several times, and a reader then merges them (protobuf.dev, "Encoding", section
"Last One Wins"). A second `graph` field that only names outputs is therefore appended to the file.
The numbers of the fields are those of `onnx.proto`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.engines.base import failed
from attnseg.runtime.engines.libraries import import_onnxruntime
from attnseg.runtime.errors import BundleError, ConfigError
from attnseg.runtime.extras import require
from attnseg.runtime.model.bundle import Bundle
from attnseg.runtime.model.manifest import Manifest
from attnseg.runtime.model.protobuf import BYTES, read_fields, read_messages
from attnseg.runtime.options import available_threads

_MODEL_GRAPH, _GRAPH_NODE, _GRAPH_OUTPUT, _VALUE_NAME = 7, 1, 12, 1
_NODE_INPUT, _NODE_OUTPUT, _NODE_OPERATOR = 1, 2, 4


@dataclass(frozen=True)
class _Node:
    operator: str
    inputs: list[str]
    outputs: list[str]


def _read_node(data: memoryview) -> _Node:
    node: dict[int, list[str]] = {_NODE_INPUT: [], _NODE_OUTPUT: [], _NODE_OPERATOR: []}
    for number, content in read_fields(data):
        if number in node and isinstance(content, memoryview):
            node[number].append(str(content, "utf-8", "replace"))
    return _Node("".join(node[_NODE_OPERATOR]), node[_NODE_INPUT], node[_NODE_OUTPUT])


def _read_nodes(model: bytes) -> Iterator[_Node]:
    """Nodes of an ONNX file, in which each follows those that it depends on."""
    for node in read_messages(memoryview(model), _MODEL_GRAPH, _GRAPH_NODE):
        yield _read_node(node)


def _field(number: int, content: bytes) -> bytes:
    """Encode a string or message field."""
    size, length = len(content), b""
    while size > 0x7F:
        length += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | BYTES]) + length + bytes([size]) + content


def with_outputs(model: bytes, names: list[str]) -> bytes:
    """Declare tensors of an ONNX file as further outputs, after those that it has."""
    values = (_field(_VALUE_NAME, name.encode()) for name in names)
    return model + _field(_MODEL_GRAPH, b"".join(_field(_GRAPH_OUTPUT, v) for v in values))


def find_sigmoids(model: bytes) -> dict[str, int]:
    """Find the outputs of sigmoids in the ONNX file of an Attention-ResNetUNet.

    Returns:
        Encoder stage whose output each tensor is computed from, by the tensor's name: one more
        than the number of poolings before it. The names themselves differ between versions of
        the exporter, and the order between attention modules.
    """
    stages: dict[str, int] = {}
    found: dict[str, int] = {}
    for node in _read_nodes(model):
        stage = max((stages.get(name, 1) for name in node.inputs), default=1)
        stages |= dict.fromkeys(node.outputs, stage + (node.operator == "MaxPool"))
        if node.operator == "Sigmoid":
            found |= dict.fromkeys(node.outputs[:1], stage)
    return found


def check_attention(manifest: Manifest) -> None:
    """Raise `ConfigError` for a model whose network has no attention."""
    network = manifest.network
    kind = network.get("attention", "none")
    if network.get("architecture") != "attnresunet" or kind == "none":
        title = ", ".join(str(network[k]) for k in ("architecture", "attention") if k in network)
        raise ConfigError(
            f"the model has no attention ({title or manifest.name})",
            "give one with gap, se or cbam",
        )


class AttentionGraph:
    """The fp32 graph of a bundle, run for the attention weights within it.

    Attributes:
        stages: Number of encoder stages.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Open the graph.

        Raises:
            ConfigError: The network has no attention.
            BundleError: A stage of the network has no weights in the graph.
            DependencyError: ONNX Runtime is not installed.
            EngineError: ONNX Runtime rejects the graph.
        """
        check_attention(bundle.manifest)
        require("attention weights", "cpu", ("onnxruntime",))
        self._file = bundle.file("onnx")
        content = self._file.read_bytes()
        widths = bundle.manifest.network.get("widths")
        self.stages = len(widths) if isinstance(widths, list) else 0
        self._sigmoids = find_sigmoids(content)
        self._check(set(self._sigmoids.values()))
        self._session = self._open(with_outputs(content, list(self._sigmoids)))
        self._input = self._session.get_inputs()[0].name

    def _check(self, found: Collection[int]) -> None:
        """Check the stages of the tensors that were found, each of which must occur once."""
        if sorted(found) != list(range(1, self.stages + 1)):
            raise BundleError(
                f"{self._file}: does not have one tensor of attention weights for each of its "
                f"{self.stages} stages",
                "export the model again",
            )

    def _open(self, model: bytes) -> Any:
        ort = import_onnxruntime()
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = available_threads()
        settings.log_severity_level = 4  # what fails is raised, too
        providers = ["CPUExecutionProvider"]
        try:
            return ort.InferenceSession(model, settings, providers=providers, enable_fallback=0)
        except Exception as error:  # its exceptions share no base but Exception
            raise failed(f"{self._file}: ONNX Runtime refuses it", error) from error

    def weights(self, window: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Compute the weights of one window.

        Args:
            window: Preprocessed window `(C, X, Y, Z)`.

        Returns:
            Weight of each channel, `(C,)` with the C of the stage, first stage first.

        Raises:
            BundleError: The graph does not have one tensor of weights per stage.
            EngineError: ONNX Runtime fails.
        """
        try:
            values = self._session.run(list(self._sigmoids), {self._input: window[None]})
        except Exception as error:  # its exceptions share no base but Exception
            raise failed(f"{self._file}: ONNX Runtime failed", error) from error
        found = [
            (stage, value[0, :, 0, 0, 0])
            for stage, value in zip(self._sigmoids.values(), values, strict=True)
            if value.shape[2:] == (1, 1, 1)  # cbam has a sigmoid of each voxel too
        ]
        self._check([stage for stage, _ in found])
        return [value for _, value in sorted(found, key=itemgetter(0))]
