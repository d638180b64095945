from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from attnseg import Bundle
from attnseg.runtime.engines.cpu import CPU_ENGINES, open_engine
from attnseg.runtime.errors import BundleError, EngineError
from attnseg.runtime.model.bundle import file_entry
from attnseg.runtime.model.graph import TENSORS, check_graph
from attnseg.runtime.model.protobuf import read_fields
from tests.bundles import small_graph, small_model, write_bundle

FILE = Path("model.onnx")
TASK = Bundle.default().manifest.task  # 4 channels and 4 labels


def stored_outside(tensor: onnx.TensorProto, location: str = "weights.bin") -> onnx.TensorProto:
    """The tensor, with its values in another file."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "64")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def tensor() -> onnx.TensorProto:
    return stored_outside(helper.make_tensor("values", TensorProto.FLOAT, [16], [0.0] * 16))


def outer(model: onnx.ModelProto) -> onnx.GraphProto:
    """A graph within the graph, as of `If`."""
    node = model.graph.node.add(op_type="If")
    return node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g


PLACES: dict[str, Callable[[onnx.ModelProto], object]] = {
    "weights": lambda m: stored_outside(m.graph.initializer[0]),
    "constant": lambda m: m.graph.node.add(op_type="Constant").attribute.add(t=tensor()),
    "constants": lambda m: m.graph.node.add(op_type="A").attribute.add(tensors=[tensor()]),
    "subgraph": lambda m: outer(m).initializer.append(tensor()),
    "subgraphs": lambda m: m.graph.node.add().attribute.add().graphs.add(initializer=[tensor()]),
    "sparse values": lambda m: m.graph.sparse_initializer.add(values=tensor()),
    "sparse indices": lambda m: m.graph.sparse_initializer.add(indices=tensor()),
    "sparse constant": lambda m: (
        m.graph.node.add().attribute.add().sparse_tensor.values.CopyFrom(tensor())
    ),
    "function": lambda m: m.functions.add().node.add().attribute.add(t=tensor()),
    "default of a function": lambda m: m.functions.add().attribute_proto.add(t=tensor()),
    "training": lambda m: m.training_info.add().algorithm.initializer.append(tensor()),
}


@pytest.mark.parametrize("place", PLACES)
def test_values_in_another_file_are_found_wherever_a_tensor_may_be(place: str) -> None:
    model = small_model()
    PLACES[place](model)
    with pytest.raises(BundleError, match=r"model\.onnx: stores values in other files") as caught:
        check_graph(FILE, model.SerializeToString(), TASK)
    assert "\n" not in str(caught.value)


def test_the_fields_that_lead_to_tensors_are_those_of_onnx() -> None:
    """A newer onnx with further places for tensors fails here."""
    found: dict[str, dict[int, str]] = {}
    left = [onnx.ModelProto.DESCRIPTOR]
    while left:
        message = left.pop()
        if message.name not in found:
            inner = [(f.number, f.message_type) for f in message.fields if f.message_type]
            found[message.name] = {number: kind.name for number, kind in inner}
            left += [kind for _, kind in inner]
    leading = {"TensorProto"}
    while more := {n for n, f in found.items() if leading & set(f.values())} - leading:
        leading |= more
    assert {
        name: {number: kind for number, kind in found[name].items() if kind in leading}
        for name in leading
    } == TENSORS


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_an_engine_reads_no_file_beside_the_graph(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would read one in the current folder, so a bundle with such a graph is not opened."""
    np.full(16, 7, np.float32).tofile(tmp_path / "weights.bin")
    model = small_model()
    stored_outside(model.graph.initializer[0])
    onnx.save(model, tmp_path / "model.onnx")
    content = model.SerializeToString()
    monkeypatch.chdir("/")
    image = np.ones((1, 4, 2, 2, 2), np.float32)
    with pytest.raises(EngineError):
        open_engine(engine, tmp_path / "model.onnx", "fp32", 1).infer(image)
    monkeypatch.chdir(tmp_path)
    manifest = replace(
        Bundle.default().manifest, files={"model.onnx": file_entry("onnx", content, "fp32")}
    )
    with pytest.raises(BundleError, match="stores values in other files"):
        write_bundle(tmp_path / "bundle", manifest, {"model.onnx": content})


def with_input(model: onnx.ModelProto, name: str) -> None:
    model.graph.input.append(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 4, "x", "y", "z"])
    )


def test_graphs_that_fit_are_taken() -> None:
    check_graph(FILE, small_graph(), TASK)
    model = small_model()
    with_input(model, "W")  # a weight, listed among the inputs as by early versions of ONNX
    for end in (model.graph.input[0], model.graph.output[0]):
        end.type.tensor_type.elem_type = TensorProto.FLOAT16
        end.type.tensor_type.shape.dim[1].dim_param = "any"
    model.graph.initializer[0].data_location = TensorProto.DEFAULT
    check_graph(FILE, model.SerializeToString(), TASK)


def reshaped(model: onnx.ModelProto, dims: list[int]) -> None:
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", 1, dims))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: with_input(m, "second"), "has 2 inputs, a network has one"),
        (lambda m: m.graph.ClearField("output"), "has 0 outputs, a network has one"),
        (lambda m: reshaped(m, [1, 3, 8, 8, 8]), "its output has 3 outputs, its manifest names 4"),
        (lambda m: reshaped(m, [1, 4, 8, 8]), r"its output is no tensor \(batch, outputs, x, y, z"),
        (lambda m: m.graph.output[0].ClearField("type"), "its output is no tensor"),
        (
            lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.INT64),
            r"its input is no tensor \(batch, channels, x, y, z\) of float32 or float16",
        ),
        (lambda m: m.ClearField("graph"), "has 0 inputs"),
    ],
)
def test_a_graph_that_does_not_fit_its_manifest_is_refused(
    change: Callable[[onnx.ModelProto], object], message: str
) -> None:
    model = small_model()
    change(model)
    with pytest.raises(BundleError, match=rf"model\.onnx: {message}"):
        check_graph(FILE, model.SerializeToString(), TASK)
    with pytest.raises(BundleError, match="its input has 2 channels, its manifest names 4"):
        check_graph(FILE, small_graph(2, 4), TASK)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'<?xml version="1.0"?><net name="model" version="11"/>', "wire type 4"),
        (b"\x0a", "an integer is cut"),
        (b"\xff" * 11, "an integer is cut or too long"),
        (b"\x0a\x05abc", "a field is cut"),
        (b"\x0d\x00", "a field is cut"),  # a number of 4 bytes
        (b"\x3a\x03\x0a\x02\x0a", "a field is cut"),  # within the graph
        (b"\x08\x01" * 1_000_001, "more than 1000000 fields"),
    ],
)
def test_files_that_are_not_onnx_are_refused(content: bytes, reason: str) -> None:
    with pytest.raises(BundleError, match=rf"damaged or not an ONNX file \(.*{reason}") as caught:
        check_graph(FILE, content, TASK)
    assert "\n" not in str(caught.value)


def test_fields_are_read_as_specified() -> None:
    """Two examples of protobuf.dev, and the numbers of fixed size, which are skipped."""
    assert list(read_fields(memoryview(b"\x08\x96\x01"))) == [(1, 150)]
    assert list(read_fields(memoryview(b"\x12\x07testing"))) == [(2, b"testing")]
    assert list(read_fields(memoryview(b"\x0d1234\x0912345678\x10\x01"))) == [(2, 1)]


def test_random_changes_of_a_graph_never_raise_anything_else() -> None:
    stored = small_graph()
    rng = np.random.default_rng(0)
    messages = []
    for _ in range(3000):
        content = bytearray(stored)
        for place in rng.integers(0, len(stored), rng.integers(1, 4)):
            content[place] = rng.integers(0, 256)
        if rng.integers(0, 4) == 0:
            del content[rng.integers(0, len(stored)) :]
        try:
            check_graph(FILE, bytes(content), TASK)
        except BundleError as error:
            messages.append(str(error))
    assert 100 < len(messages) < 2900
    assert not any("\n" in message for message in messages)
