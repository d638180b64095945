from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import NodeProto, TensorProto, numpy_helper

from attnseg.export.export import ExportOptions, export_bundle
from attnseg.export.source.first_run import check_first_run
from attnseg.export.source.foreign import read_spec
from attnseg.runtime.errors import ExportError
from tests.conftest import LinearEngine
from tests.export.conftest import spec_file
from tests.export.source.graphs import node, save_model

CASES: dict[str, tuple[list[NodeProto], str]] = {
    "softmax spelled out": (
        [
            node("Exp", "logits", "e"),
            node("ReduceSum", "e axes", "s", keepdims=1),
            node("Div", "e s", "out"),
        ],
        "outputs values that sum to 1 over the classes, as probabilities do, in place of logits; "
        "the output must be the logits",
    ),
    "sigmoid spelled out": (
        [
            node("Neg", "logits", "a"),
            node("Exp", "a", "b"),
            node("Add", "b one", "c"),
            node("Reciprocal", "c", "out"),
        ],
        "outputs values from 0 to 1 that do not sum to 1 over the classes, as a sigmoid does; .*"
        "overlap",
    ),
    "half the size": (
        [node("MaxPool", "logits", "out", kernel_shape=[2] * 3, strides=[2] * 3)],
        r"outputs 16x16x16 voxels for a window of 32x32x32; .* the size of its input",
    ),
    "not finite": ([node("Log", "logits", "out")], "outputs NaN or infinite values for a window"),
    "constant": ([node("Mul", "logits zero", "out")], "outputs -?0 for every class and voxel"),
    "sizes that do not fit": (
        [node("Reshape", "logits odd", "r"), node("Add", "logits r", "out")],
        r"ONNX Runtime failed on a batch of shape \(1, 1, 32, 32, 32\) .*inference\.window",
    ),
}
CONSTANTS: dict[str, Any] = {
    "axes": np.array([1]),
    "one": np.array(1, np.float32),
    "zero": np.array(0, np.float32),
    "odd": np.array([1, 3, 5, -1, 7]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_comes_out_of_a_window_is_judged_before_the_gate(tmp_path: Path, case: str) -> None:
    nodes, message = CASES[case]
    path = save_model(tmp_path / "m.onnx", *nodes, out=("n", 3, "a", "b", "c"), **CONSTANTS)
    with pytest.raises(ExportError, match=rf"m\.onnx: {message}") as caught:
        export_bundle(path, tmp_path / "model", ExportOptions(spec=spec_file(tmp_path)))
    assert "\n" not in str(caught.value)
    assert "/model.onnx" not in str(caught.value)  # no file of a temporary folder
    assert not (tmp_path / "model").exists()


class Noisy(LinearEngine):
    """Logits that differ from call to call."""

    def infer(self, batch: np.ndarray) -> np.ndarray:
        return super().infer(batch) + np.float32(self.calls)


def test_an_output_that_differs_between_two_runs_is_refused(tmp_path: Path) -> None:
    spec = read_spec(spec_file(tmp_path))
    window = np.random.default_rng(0).standard_normal((1, 1, 32, 32, 32)).astype(np.float32)
    matrix = np.array([[1], [-1], [0.5]], np.float32)
    check_first_run(tmp_path / "m.onnx", LinearEngine(matrix), window, spec)
    with pytest.raises(ExportError, match=r"gives other values when it runs again.*model\.eval"):
        check_first_run(tmp_path / "m.onnx", Noisy(matrix), window, spec)
    with pytest.raises(ExportError, match=r"outputs \(1, 2, 32, 32, 32\) .* names 3 outputs"):
        check_first_run(tmp_path / "m.onnx", LinearEngine(matrix[:2]), window, spec)


def test_a_graph_partly_in_fp16_is_exported_but_not_converted_again(tmp_path: Path) -> None:
    half = numpy_helper.to_array(numpy_helper.from_array(np.full((3, 1, 1, 1), 2, np.float16)))
    nodes = [
        node("Cast", "logits", "a", to=TensorProto.FLOAT16),
        node("Mul", "a half", "b"),
        node("Cast", "b", "out", to=TensorProto.FLOAT),
    ]
    path = save_model(tmp_path / "m.onnx", *nodes, half=half)
    spec = spec_file(tmp_path)
    with pytest.raises(ExportError, match=r"3 tensors .* fp16 or bf16 already.* or leave fp16 out"):
        export_bundle(path, tmp_path / "model", ExportOptions(spec=spec, fp16=True))
    assert not (tmp_path / "model").exists()
    export_bundle(path, tmp_path / "model", ExportOptions(spec=spec))
