"""Instance norms that are spelt out, against PyTorch in float64."""

from __future__ import annotations

import numpy as np
import onnx
import openvino
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

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
