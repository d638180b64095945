from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
from onnx import TensorProto, helper

from attnseg import Bundle
from attnseg.runtime.engines import openvino as openvino_engine
from attnseg.runtime.engines.cpu import ENGINES, installed_engines, open_engine
from attnseg.runtime.errors import EngineError


@pytest.fixture
def doubling(tmp_path: Path) -> Path:
    """An ONNX file that doubles its input, of any size."""
    dims = ["batch", 2, "x", "y", "z"]
    graph = helper.make_graph(
        [helper.make_node("Add", ["image", "image"], ["logits"])],
        "doubling",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, dims)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "doubling.onnx")
    return tmp_path / "doubling.onnx"


@pytest.mark.parametrize("name", ENGINES)
def test_each_engine_runs_batches_of_any_shape(doubling: Path, name: str) -> None:
    engine = open_engine(name, doubling, "fp32", 1)
    for shape in ((1, 2, 4, 5, 6), (3, 2, 4, 5, 6), (1, 2, 7, 2, 2), (1, 2, 4, 5, 6)):
        batch = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        result = engine.infer(batch)
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, 2 * batch, rtol=1e-6)
    assert engine.info.name == name
    assert engine.info.precision == "fp32"
    assert engine.info.version == installed_engines()[name]


@pytest.mark.parametrize("name", ENGINES)
def test_a_batch_that_does_not_fit_is_one_clear_error(doubling: Path, name: str) -> None:
    engine = open_engine(name, doubling, "fp32", 1)
    with pytest.raises(EngineError, match=r"failed on a batch of shape \(1, 3, 4, 4, 4\)"):
        engine.infer(np.zeros((1, 3, 4, 4, 4), np.float32))


@pytest.mark.parametrize("name", ENGINES)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "broken.onnx"
    file.write_bytes(b"this is no protobuf")
    with pytest.raises(EngineError, match=r"broken\.onnx: .* refuses it"):
        open_engine(name, file, "fp32", 1)


def test_auto_takes_the_first_that_is_installed(
    doubling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_engine("auto", doubling, "fp32", 1).info.name == "openvino"
    monkeypatch.setattr(
        "attnseg.runtime.engines.cpu.installed_engines",
        lambda: {"openvino": None, "onnxruntime": "1"},
    )
    assert open_engine("auto", doubling, "fp32", 1).info.name == "onnxruntime"


def test_without_an_engine_the_extra_is_named(
    doubling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "attnseg.runtime.engines.cpu.installed_engines", lambda: dict.fromkeys(ENGINES)
    )
    with pytest.raises(EngineError, match=r"pip install 'attnseg\[cpu\]'"):
        open_engine("auto", doubling, "auto", 1)


@pytest.mark.parametrize("name", ENGINES)
def test_a_named_engine_that_is_missing_names_the_extra(
    doubling: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineError, match=rf"engine {name} is not installed; pip install"):
        open_engine(name, doubling, "auto", 1)


def test_unknown_engines_and_precisions_are_refused(doubling: Path) -> None:
    with pytest.raises(EngineError, match="engine cudnn does not exist; choose auto, openvino"):
        open_engine("cudnn", doubling, "auto", 1)
    with pytest.raises(EngineError, match="precision int4 does not exist"):
        open_engine("openvino", doubling, "int4", 1)
    with pytest.raises(EngineError, match="use --precision fp32 or --engine openvino"):
        open_engine("onnxruntime", doubling, "bf16", 1)


def test_auto_falls_through_to_an_engine_that_opens(
    doubling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(
        "attnseg.runtime.engines.cpu.installed_engines",
        lambda: {"openvino": "broken", "onnxruntime": "1"},
    )
    assert open_engine("auto", doubling, "auto", 1).info.name == "onnxruntime"


def has_bf16() -> bool:
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_bf16_runs_in_bf16_where_the_processor_has_it() -> None:
    model = Bundle.default().file("onnx")
    if not has_bf16():
        with pytest.raises(EngineError, match="no bf16 instructions; use --precision fp32"):
            open_engine("openvino", model, "bf16", 1)
        assert open_engine("openvino", model, "auto", 1).info.precision == "fp32"
        return
    batch = np.random.default_rng(0).standard_normal((1, 4, 32, 32, 32)).astype(np.float32)
    exact = open_engine("openvino", model, "fp32", 1).infer(batch).copy()
    engine = open_engine("openvino", model, "auto", 1)
    assert engine.info.precision == "bf16"
    difference = np.abs(engine.infer(batch) - exact).max() / np.abs(exact).max()
    assert 1e-5 < difference < 0.05


def test_a_processor_without_bf16_is_told_so(
    doubling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain:
        read_model = staticmethod(openvino_engine._core().read_model)

        def get_property(self, *_: object) -> list[str]:
            return ["FP32"]

    monkeypatch.setattr(openvino_engine, "_core", Plain)
    with pytest.raises(EngineError, match="no bf16 instructions; use --precision fp32"):
        open_engine("openvino", doubling, "bf16", 1)
    assert open_engine("openvino", doubling, "auto", 1).info.precision == "fp32"


SIGNAL_AFTER_ENGINES = """
import signal, sys
from pathlib import Path
from attnseg.runtime.engines.cpu import open_engine

first, second = (open_engine(sys.argv[1], Path(sys.argv[2]), "fp32", 1) for _ in range(2))
del first
del second
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("name", ENGINES)
def test_a_signal_after_engines_were_freed_is_handled(doubling: Path, name: str) -> None:
    command = [sys.executable, "-c", SIGNAL_AFTER_ENGINES, name, str(doubling)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
