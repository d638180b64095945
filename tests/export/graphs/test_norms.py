"""Instance and group norms that are spelt out, against PyTorch in float64."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import onnx
import openvino
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from attnseg.export.graphs.norms import spell_out_norms
from attnseg.runtime.engines.cpu import open_engine


class File:
    """Content of an ONNX file."""

    name = "model.onnx"

    def __init__(self, model: onnx.ModelProto) -> None:
        self._content = model.SerializeToString()

    def read_bytes(self) -> bytes:
        return self._content


def model(rank: int = 5, channels: int = 3) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    values = {"scale": rng.uniform(0.5, 2, channels), "bias": rng.normal(0, 1, channels)}
    weights = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in values.items()]
    shape = ["batch", channels, "x", "y", "z"][:rank]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("image", "logits")]
    nodes = [
        helper.make_node("InstanceNormalization", ["image", "scale", "bias"], ["a"], epsilon=1e-3),
        helper.make_node("InstanceNormalization", ["a", "scale", "bias"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "norms", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def mostly_background(edge: int) -> np.ndarray:
    image = np.full((1, 3, edge, edge, edge), -0.4, np.float32)
    part = edge // 3
    noise = np.random.default_rng(1).normal(1.5, 1, (1, 3, part, edge, edge))
    image[:, :, :part] = noise
    return image


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_spelt_out_norms_are_accurate_over_large_windows(engine: str) -> None:
    exact = model()
    spelt = onnx.ModelProto()
    spelt.CopyFrom(exact)
    assert spell_out_norms(spelt) == 2
    onnx.checker.check_model(spelt, full_check=True)
    assert not [n for n in spelt.graph.node if n.op_type == "InstanceNormalization"]
    image = mostly_background(96)
    values = {i.name: numpy_helper.to_array(i) for i in exact.graph.initializer}
    scale, bias = (torch.tensor(values[n]).double() for n in ("scale", "bias"))
    tensor = torch.from_numpy(image).double()
    first = torch.nn.functional.instance_norm(tensor, weight=scale, bias=bias, eps=1e-3)
    expected = torch.nn.functional.instance_norm(first, weight=scale, bias=bias).numpy()
    top = np.abs(expected).max()
    found = open_engine(engine, File(spelt), "fp32", 2).infer(image)
    assert np.abs(found - expected).max() / top < 1e-5


def test_norms_of_other_tensors_stay_as_they_are() -> None:
    flat = model(rank=3)
    before = flat.SerializeToString()
    assert spell_out_norms(flat) == 0
    assert flat.SerializeToString() == before
    assert openvino.__version__  # the engine that the clips are for


def test_constants_may_be_nodes_and_names_are_new() -> None:
    exact = model()
    (scale,) = (i for i in exact.graph.initializer if i.name == "scale")
    exact.graph.initializer.remove(scale)
    exact.graph.node.insert(0, helper.make_node("Constant", [], ["scale"], value=scale))
    for node in exact.graph.node:  # as the first value that the rewrite would write
        for names in (node.input, node.output):
            names[:] = ["norm_1_mean_4" if name == "a" else name for name in names]
    image = mostly_background(8)
    expected = open_engine("onnxruntime", File(exact), "fp32", 1).infer(image)
    assert spell_out_norms(exact) == 2
    onnx.checker.check_model(exact, full_check=True)
    found = open_engine("onnxruntime", File(exact), "fp32", 1).infer(image)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def group_norm() -> nn.Module:
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.eval()


def exported(network: nn.Module, dynamic: bool = True) -> onnx.ModelProto:
    """Graph of a network of four channels, as PyTorch writes it."""
    auto = torch.export.Dim.AUTO
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        program = torch.onnx.export(
            network,
            (torch.zeros(2, 4, 8, 8, 8),),
            dynamo=True,
            dynamic_shapes=({0: auto, 2: auto, 3: auto, 4: auto},) if dynamic else None,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_group_norms_are_accurate_over_large_windows(engine: str) -> None:
    norm, edge = group_norm(), 96
    image = np.random.default_rng(0).normal(300, 60, (1, 4, edge, edge, edge)).astype(np.float32)
    image[..., : 2 * edge // 3] = 0
    spelt = exported(norm)
    assert spell_out_norms(spelt) == 1
    with torch.inference_mode():
        expected = norm.double()(torch.from_numpy(image).double()).numpy()
    found = open_engine(engine, File(spelt), "fp32", 2).infer(image)
    assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-5


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_reshapes_of_a_group_norm_are_replaced(dynamic: bool) -> None:
    network = nn.Sequential(nn.Conv3d(4, 4, 1), group_norm(), nn.ReLU(), group_norm()).eval()
    spelt = exported(network, dynamic)
    assert spell_out_norms(spelt) == 2
    onnx.checker.check_model(spelt, full_check=True)
    kinds = Counter(node.op_type for node in spelt.graph.node)
    assert kinds["InstanceNormalization"] == kinds["Shape"] == 0
    assert kinds["Reshape"] == 2 * 4  # around the mean of each group, for mean and variance
    image = np.random.default_rng(1).normal(size=(2, 4, 8, 8, 8)).astype(np.float32)
    with torch.inference_mode():
        wanted = network(torch.tensor(image)).numpy()
    found = open_engine("onnxruntime", File(spelt), "fp32", 2).infer(image)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def grouped(
    split: list[int],
    shape: list[int],
    first: str = "Reshape",
    last: str = "Reshape",
    counted: str = "",
    end: Mapping[str, int] = MappingProxyType({"end": 5}),
    channels: int | str = 4,
) -> onnx.ModelProto:
    """A norm of two groups between nodes; `counted` is a tensor whose shape the result takes."""
    sizes = {"split": split, "shape": shape}
    constants = [numpy_helper.from_array(np.array(v, np.int64), k) for k, v in sizes.items()]
    constants += [numpy_helper.from_array(np.ones(2, np.float32), k) for k in ("scale", "bias")]
    nodes = [
        helper.make_node(first, ["image", "split"], ["groups"]),
        helper.make_node("InstanceNormalization", ["groups", "scale", "bias"], ["normed"]),
        helper.make_node(last, ["normed", "shape"], ["out"]),
    ]
    if counted:
        nodes.insert(0, helper.make_node("Shape", [counted], ["counted"], **end))
        nodes[-1].input[1] = "counted"
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, 2, 2, 2])
        for name in ("image", "out")
    ]
    graph = helper.make_graph(nodes, "norm", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


@pytest.mark.parametrize(
    "other",
    [
        grouped([0, 2, 16], [1, 4, 2, 2, 2]),  # not the reshape of a group norm
        grouped([0, 2, -1], [1, 2, 2, 2, 4]),  # another shape behind the norm
        grouped([1, 2, 16], [1, 4, 2, 2, 2], "Expand"),
        grouped([0, 2, -1], [1, 2, 16], last="Expand"),
        grouped([0, 2, -1], [1, 4, 2, 2, 2], counted="image"),  # may be a part
        grouped([0, 2, -1], [1, 4, 2, 2, 2], counted="split"),
        grouped([0, 2, -1], [1, 4, 2, 2, 2], counted="image", end={}, channels="n"),
    ],
)
def test_other_norms_of_groups_stay_as_they_are(other: onnx.ModelProto) -> None:
    before = other.SerializeToString()
    assert spell_out_norms(other) == 0
    assert other.SerializeToString() == before
