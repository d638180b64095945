from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import onnx
import openvino
import pytest
from onnx import TensorProto, helper

from attnseg import Bundle
from attnseg.runtime.cuda.device import Region
from attnseg.runtime.engines import onnxruntime_cuda
from attnseg.runtime.engines import openvino as openvino_engine
from attnseg.runtime.engines.cpu import CPU_ENGINES, installed_engines, open_engine
from attnseg.runtime.engines.device import usual_batch
from attnseg.runtime.engines.onnxruntime import OnnxSession
from attnseg.runtime.errors import ConfigError, EngineError, OutOfMemoryError
from tests.runtime.cuda.engines import OnHost
from tests.runtime.cuda.host_device import HostDevice


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


@pytest.mark.parametrize("name", CPU_ENGINES)
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


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_onnxruntime_runs_on_memory_of_a_device(doubling: Path, kind: int) -> None:
    """The host in a device's place: the same binding of memory as on a GPU."""
    model = onnx.load(doubling)
    for end in (*model.graph.input, *model.graph.output):
        end.type.tensor_type.elem_type = kind
        end.type.tensor_type.shape.dim[1].dim_value = 2
    onnx.save(model, doubling)
    device = HostDevice()
    session = OnnxSession(doubling, {}, ["CPUExecutionProvider"])
    precision = "fp16" if kind == TensorProto.FLOAT16 else "fp32"
    engine = OnHost(session, precision, device, (128, 64, 64), max_memory_bytes=9)
    assert engine.half == (precision == "fp16")
    assert (engine.batches, engine.memory_bytes) == ((6, 1), 9)
    for batch in (1, 4, 3):
        array = np.arange(batch * 2 * 60).reshape(batch, 2, 3, 4, 5).astype(engine_type(engine))
        images, logits = (device.allocate(array.nbytes) for _ in range(2))
        device.upload(array, images)
        regions = [Region.of(buffer, 0, array.nbytes) for buffer in (images, logits)]
        engine.enqueue(*regions, array.shape)
        found = np.empty_like(array)
        device.download(logits, found)
        np.testing.assert_array_equal(found, 2 * array)
        np.testing.assert_array_equal(engine.infer(array.astype(np.float32)), 2 * array)
    with pytest.raises(EngineError, match=r"failed on a batch of shape \(1, 3, 4, 4, 4\)"):
        engine.infer(np.zeros((1, 3, 4, 4, 4), np.float32))


@pytest.mark.parametrize(
    ("window", "batch"),
    [((64, 64, 64), 12), ((32, 32, 32), 12), ((128, 128, 128), 1), ((96, 96, 96), 3), (None, 1)],
)
def test_a_batch_holds_at_most_twelve_windows_of_64_voxels(
    window: tuple[int, int, int] | None, batch: int
) -> None:
    assert usual_batch(window) == batch
    assert usual_batch((512, 512, 512)) == 1  # more voxels than 12 windows


class Preloading:
    """ONNX Runtime's loader of CUDA's libraries, which finds those of a folder, or fails."""

    def __init__(self, finds: bool) -> None:
        self.finds, self.calls = finds, []

    def preload_dlls(self, **arguments: object) -> None:
        self.calls.append(arguments)
        if not (self.finds and "directory" in arguments):
            print("Failed to load libcudnn.so.9: cannot open\nPlease follow the page")


def test_cuda_is_found_in_another_site_folder_and_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("cu13/lib/libcudart.so.13", "cudnn/lib/libcudnn.so.9"):
        (tmp_path / "nvidia" / file).parent.mkdir(parents=True)
        (tmp_path / "nvidia" / file).touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(onnxruntime_cuda.importlib.util, "find_spec", lambda _: spec)
    found = Preloading(finds=True)
    assert onnxruntime_cuda._load_cuda_libraries(found) == ""
    assert found.calls == [
        {},
        {"cuda": True, "cudnn": False, "directory": str(tmp_path / "nvidia/cu13/lib")},
        {"cuda": False, "cudnn": True, "directory": str(tmp_path / "nvidia/cudnn/lib")},
    ]
    for place in (spec, None):
        monkeypatch.setattr(onnxruntime_cuda.importlib.util, "find_spec", lambda _, s=place: s)
        told = onnxruntime_cuda._load_cuda_libraries(Preloading(finds=False))
        assert told == "Failed to load libcudnn.so.9: cannot open Please follow the page"


def engine_type(engine: OnHost) -> type:
    return np.float16 if engine.half else np.float32


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Failed to allocate memory for requested buffer of size 7", OutOfMemoryError),
        ("CUDA failure 2: out of memory", OutOfMemoryError),
        ("CUDNN_STATUS_EXECUTION_FAILED", EngineError),
    ],
)
def test_a_shortage_of_memory_in_onnxruntime_is_told_as_one(
    doubling: Path, monkeypatch: pytest.MonkeyPatch, text: str, kind: type[Exception]
) -> None:
    session = OnnxSession(doubling, {}, ["CPUExecutionProvider"])

    class Failing:
        def run_with_iobinding(self, *_: object) -> None:
            raise RuntimeError(text)

        def io_binding(self) -> Any:
            return MagicMock()

    session._session = Failing()
    region = Region(0, 2 * 27 * 4, HostDevice().allocate(1))
    with pytest.raises(kind, match=r"failed on a batch of shape \(1, 2, 3, 3, 3\)") as caught:
        OnHost(session, "fp32", HostDevice()).enqueue(region, region, (1, 2, 3, 3, 3))
    assert type(caught.value) is kind


@pytest.mark.parametrize("name", CPU_ENGINES)
def test_a_batch_that_does_not_fit_is_one_clear_error(doubling: Path, name: str) -> None:
    engine = open_engine(name, doubling, "fp32", 1)
    with pytest.raises(EngineError, match=r"failed on a batch of shape \(1, 3, 4, 4, 4\)"):
        engine.infer(np.zeros((1, 3, 4, 4, 4), np.float32))


@pytest.mark.parametrize("name", CPU_ENGINES)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "broken.onnx"
    file.write_bytes(b"this is no protobuf")
    with pytest.raises(EngineError, match=r"broken\.onnx: .* refuses it"):
        open_engine(name, file, "fp32", 1)


@pytest.mark.parametrize("name", CPU_ENGINES)
def test_a_graph_whose_operator_is_no_text_is_one_error_and_nothing_is_printed(
    doubling: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both libraries raise UnicodeDecodeError, as their own message holds the name."""
    doubling.write_bytes(doubling.read_bytes().replace(b"Add", b"A\x83d"))
    with pytest.raises(EngineError, match=r"doubling\.onnx: .* refuses it \(.*decode") as caught:
        open_engine(name, doubling, "fp32", 1).infer(np.zeros((1, 2, 4, 4, 4), np.float32))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", CPU_ENGINES)
def test_a_graph_that_fails_in_use_is_one_error_and_nothing_is_printed(
    doubling: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """It adds 3 numbers along an axis of 4 voxels."""
    model = onnx.load(doubling)
    model.graph.node[0].input[1] = "numbers"
    model.graph.initializer.append(helper.make_tensor("numbers", TensorProto.FLOAT, [3], [0] * 3))
    onnx.save(model, doubling)
    with pytest.raises(
        EngineError, match=r"failed on a batch of shape \(1, 2, 4, 4, 4\)"
    ) as caught:
        open_engine(name, doubling, "fp32", 1).infer(np.zeros((1, 2, 4, 4, 4), np.float32))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", CPU_ENGINES)
def test_a_named_engine_that_is_missing_names_the_extra(
    doubling: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineError, match=rf"engine {name} is not installed; pip install"):
        open_engine(name, doubling, "auto", 1)


def test_unknown_engines_and_precisions_are_refused(doubling: Path) -> None:
    with pytest.raises(ConfigError, match="engine cudnn does not exist; choose openvino, onnx"):
        open_engine("cudnn", doubling, "auto", 1)
    with pytest.raises(ConfigError, match="precision int4 does not exist"):
        open_engine("openvino", doubling, "int4", 1)
    with pytest.raises(EngineError, match="use precision='fp32' or engine='openvino'"):
        open_engine("onnxruntime", doubling, "bf16", 1)


def has_bf16() -> bool:
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_bf16_runs_in_bf16_where_the_processor_has_it() -> None:
    model = Bundle.default().file("onnx")
    if not has_bf16():
        with pytest.raises(EngineError, match="no bf16 instructions; use precision='fp32'"):
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
    with pytest.raises(EngineError, match="no bf16 instructions; use precision='fp32'"):
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


@pytest.mark.parametrize("name", CPU_ENGINES)
def test_a_signal_after_engines_were_freed_is_handled(doubling: Path, name: str) -> None:
    command = [sys.executable, "-c", SIGNAL_AFTER_ENGINES, name, str(doubling)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


@pytest.mark.parametrize("name", CPU_ENGINES)
def test_a_library_that_cannot_be_loaded_is_not_called_missing(
    name: str, doubling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ImportError("x.so: failed to map segment")

    monkeypatch.setattr(f"attnseg.runtime.engines.{name}.import_{name}", fail)
    with pytest.raises(EngineError) as caught:
        open_engine(name, doubling, "fp32", 1)
    cause, mend = str(caught.value).split("; ", 1)
    assert cause == f"engine {name} cannot be loaded (x.so: failed to map segment)"
    assert mend.startswith("close other programs, raise the limit on memory (ulimit -v)")


def test_a_plugin_of_openvino_that_cannot_be_loaded_is_one_line(
    doubling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("Resource temporarily unavailable")

    monkeypatch.setattr(openvino_engine, "_core", fail)
    with pytest.raises(EngineError, match=r"openvino cannot be loaded \(Resource .*ulimit -u"):
        open_engine("openvino", doubling, "fp32", 1)


def test_a_failure_for_lack_of_memory_says_what_helps(doubling: Path) -> None:
    engine = open_engine("openvino", doubling, "fp32", 1)
    engine._request = SimpleNamespace(infer=MagicMock(side_effect=RuntimeError("std::bad_alloc")))
    batch = np.zeros((1, 1, 2, 2, 2), np.float32)
    engine._shape = batch.shape
    with pytest.raises(EngineError, match=r"\(std::bad_alloc\); close other programs, raise"):
        engine.infer(batch)
