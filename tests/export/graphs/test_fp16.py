from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from attnseg.export.graphs.fp16 import (
    audit_ranges,
    check_convolutions,
    convert_to_fp16,
    convolutions_in_fp32,
    nodes_at_risk,
    open_session,
    simulate_fp16,
)
from attnseg.export.graphs.graph import Graph
from attnseg.runtime.errors import ExportError

SHAPE = ["batch", 1, 2, 2, 2]


def graph(nodes: list[onnx.NodeProto], **weights: Any) -> Graph:
    """A model from `image` to `logits`, both `(batch, 1, 2, 2, 2)`."""
    tensors = [numpy_helper.from_array(np.asarray(w, np.float32), n) for n, w in weights.items()]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE)
        for name in ("image", "logits")
    ]
    body = helper.make_graph(nodes, "test", ends[:1], ends[1:], tensors)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return Graph(model)


def node(kind: str, inputs: list[str], output: str, **settings: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], name=f"node_{output}", **settings)


def pointwise(inputs: str, weight: str, output: str) -> onnx.NodeProto:
    return node("Conv", [inputs, weight], output)


def kernel(value: float) -> NDArray[np.float32]:
    return np.full((1, 1, 1, 1, 1), value, np.float32)


def image(*values: float) -> NDArray[np.float32]:
    return np.resize(np.array(values, np.float32), (1, 1, 2, 2, 2))


UP_AND_DOWN = graph(
    [
        pointwise("image", "up", "high"),
        pointwise("high", "down", "low"),
        pointwise("low", "one", "logits"),
    ],
    up=kernel(1e4),
    down=kernel(1e-4),
    one=kernel(1),
)


def run(model: onnx.ModelProto, window: NDArray[np.float32]) -> NDArray[np.float32]:
    result: NDArray[np.float32] = open_session(model, 1).run(None, {"image": window})[0]
    return result


def test_ranges_of_every_tensor_by_hand() -> None:
    # 8 voxels: 1, 10, -20 and so on; times 1e4 the 10s and 20s are beyond 65504.
    windows = [image(1, 10, -20, 0), image(0.5)]
    high, low, _ = audit_ranges(UP_AND_DOWN, windows, 1)
    assert (high.name, high.operator, high.largest) == ("high", "Conv", 2e5)
    assert high.overflow_share == 0.5
    assert low.largest == pytest.approx(20)
    assert (low.overflow_share, low.subnormal_share) == (0, 0)
    tiny = audit_ranges(UP_AND_DOWN, [image(1, 1e-5, 0, 0)], 1)[-1]
    assert tiny.subnormal_share == 0.5  # of the values other than 0


def test_what_may_overflow_stays_in_fp32_and_the_result_with_it() -> None:
    window = image(1, 10, -20, 0)
    risky = nodes_at_risk(UP_AND_DOWN, audit_ranges(UP_AND_DOWN, [window], 1))
    assert risky == ["node_high", "node_low"]  # the producer and the consumer of `high`
    exact = run(UP_AND_DOWN.model, window)
    kept = run(simulate_fp16(convert_to_fp16(UP_AND_DOWN, risky)), window)
    np.testing.assert_allclose(kept, exact, rtol=1e-3)
    lost = run(simulate_fp16(convert_to_fp16(UP_AND_DOWN)), window)
    assert np.isinf(lost).any()


def test_a_tensor_near_the_end_of_the_range_is_at_risk_too() -> None:
    scale = graph([pointwise("image", "w", "logits")], w=kernel(1000))
    for largest, risky in ((16, []), (17, ["node_logits"])):  # 65504 / 4 = 16376
        assert nodes_at_risk(scale, audit_ranges(scale, [image(largest)], 1)) == risky


def test_a_weight_beyond_the_range_keeps_its_node_in_fp32() -> None:
    model = graph([pointwise("image", "w", "logits")], w=kernel(1e6))
    ranges = audit_ranges(model, [image(1e-6)], 1)
    assert not any(r.at_risk for r in ranges)
    assert nodes_at_risk(model, ranges) == ["node_logits"]


def test_small_weights_keep_their_value_in_fp16() -> None:
    # The converter's own bounds, 1e-7 and 1e4, would change both.
    values = np.array([2e4, 6e-8, 0.1], np.float32)
    model = graph([pointwise("image", "w", "x"), node("Add", ["x", "b"], "logits")],
                  w=kernel(2e4), b=kernel(6e-8))  # fmt: skip
    found = convert_to_fp16(model).model.graph.initializer
    weights = {i.name: float(numpy_helper.to_array(i).ravel()[0]) for i in found}
    assert weights["w"] == np.float16(values[0])
    assert weights["b"] == np.float16(values[1]) > 0


@pytest.mark.parametrize("io", ["fp16", "fp32"])
def test_the_ends_have_the_type_asked_for(io: str) -> None:
    half = convert_to_fp16(UP_AND_DOWN, io=io)
    model = half.model
    wanted = TensorProto.FLOAT16 if io == "fp16" else TensorProto.FLOAT
    ends = (*model.graph.input, *model.graph.output)
    assert [v.type.tensor_type.elem_type for v in ends] == [wanted, wanted]
    assert convolutions_in_fp32(half) == []


def test_the_same_graph_converts_to_the_same_bytes() -> None:
    assert convert_to_fp16(UP_AND_DOWN).content == convert_to_fp16(UP_AND_DOWN).content


def test_convolutions_left_in_fp32_are_named() -> None:
    mixed = convert_to_fp16(UP_AND_DOWN, ["node_low"])
    assert convolutions_in_fp32(mixed) == ["node_low"]
    check_convolutions(mixed, ["node_low"])
    with pytest.raises(ExportError, match=r"holds 1 convolutions in fp32 \(node_low\)"):
        check_convolutions(mixed, [])
    with pytest.raises(ExportError, match="holds 3 convolutions"):
        check_convolutions(UP_AND_DOWN, [])


def test_every_tensor_is_rounded_as_numpy_rounds() -> None:
    # 2048 + 1 is 2048 in fp16, so a third 1 is lost as well; in fp32 the sum is 2050.
    adding = [node("Add", ["image", "one"], "x"), node("Add", ["x", "one"], "logits")]
    model = graph(adding, one=kernel(1))
    assert run(model.model, image(2048)).max() == 2050
    assert run(simulate_fp16(convert_to_fp16(model)), image(2048)).max() == 2048


def test_a_simulated_graph_is_what_numpy_computes_in_fp16() -> None:
    rng = np.random.default_rng(0)
    window = rng.standard_normal((1, 1, 2, 2, 2)).astype(np.float32) * 30
    steps = [
        pointwise("image", "w", "x"),
        node("Relu", ["x"], "y"),
        node("Mul", ["y", "image"], "z"),
        node("Add", ["z", "b"], "logits"),
    ]
    model = graph(steps, w=kernel(0.3), b=kernel(-7.7))
    half = window.astype(np.float16)
    product = (half.astype(np.float32) * np.float32(np.float16(0.3))).astype(np.float16)
    expected = np.maximum(product, 0) * half + np.float16(-7.7)
    for io in ("fp16", "fp32"):
        found = run(simulate_fp16(convert_to_fp16(model, io=io)), window)
        np.testing.assert_array_equal(found, expected.astype(np.float32))
