from __future__ import annotations

import ctypes
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tensorrt_rtx_bindings
from onnx import TensorProto, helper

from attnseg.runtime.cuda.device import Region
from attnseg.runtime.cuda.gpu import Gpu
from attnseg.runtime.engines import tensorrt
from attnseg.runtime.engines.tensorrt import TensorRtEngine, check_build
from attnseg.runtime.errors import BundleError, EngineError, UnavailableError
from attnseg.runtime.model.bundle import BundleFile, file_entry
from attnseg.runtime.model.manifest import EngineBuild, FileEntry
from tests.runtime.cuda.host_device import HostDevice

WINDOW = (4, 5, 6)


def build(**changes: Any) -> EngineBuild:
    fields = {
        "builder": "tensorrt-rtx",
        "version": "1.7.1",
        "target": "sm86",
        "compatibility": "same",
        "version_compatible": False,
        "window": WINDOW,
        "batch": 2,
    }
    return EngineBuild(**{**fields, **changes})


def gpu(target: str) -> Gpu:
    return Gpu("RTX", target, 24 << 30, "13.0")


def plan(kind: int) -> bytes:
    """An 'engine' that doubles two channels: an ONNX file, which the stand-in runs."""
    ends = [
        helper.make_tensor_value_info(name, kind, [2, 2, *WINDOW]) for name in ("image", "logits")
    ]
    node = helper.make_node("Add", ["image", "image"], ["logits"])
    graph = helper.make_graph([node], "doubling", ends[:1], ends[1:])
    opsets = [helper.make_opsetid("", 20)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


class StandIn:
    """TensorRT-RTX's Python interface as the adapter uses it, on host memory, by ONNX Runtime."""

    __version__ = "1.7.1"

    class ILogger:
        pass

    class DataType(Enum):
        HALF, FLOAT, INT8 = range(3)

    class TensorIOMode(Enum):
        NONE, INPUT, OUTPUT = range(3)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, content: bytes) -> Any:
            try:
                ort.InferenceSession(content, providers=["CPUExecutionProvider"])
                return StandIn.ICudaEngine(onnx.load_from_string(content))
            except Exception:
                self.logger.log(StandIn.Severity.ERROR, "this is\nno engine")
                return None

    class Severity(Enum):
        ERROR, INFO = range(2)

    class DynamicShapesKernelSpecializationStrategy(Enum):
        LAZY, EAGER, NONE = range(3)

    class ICudaEngine:
        num_io_tensors = 2
        device_memory_size_v2 = 1000

        def __init__(self, model: onnx.ModelProto) -> None:
            self.model = model

        def get_tensor_name(self, index: int) -> str:
            return ("image", "logits")[index]

        def get_tensor_mode(self, name: str) -> Any:
            mode = StandIn.TensorIOMode
            return mode.INPUT if name == "image" else mode.OUTPUT

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return (2, 2, *WINDOW)

        def get_tensor_dtype(self, name: str) -> Any:
            kind = self.model.graph.input[0].type.tensor_type.elem_type
            types = StandIn.DataType
            return {1: types.FLOAT, 10: types.HALF}.get(kind, types.INT8)

        def create_runtime_config(self) -> Any:
            return StandIn.IRuntimeConfig()

        def create_execution_context(self, config: Any = None) -> Any:
            return StandIn.IExecutionContext(self, config)

    class IRuntimeConfig:
        def create_runtime_cache(self) -> Any:
            return StandIn.IRuntimeCache()

        def set_runtime_cache(self, cache: Any) -> bool:
            self.cache = cache
            return True

    class IRuntimeCache:
        def __init__(self) -> None:
            self.content = b""

        def deserialize(self, blob: bytes) -> bool:
            self.content = blob
            return True

        def serialize(self) -> bytes:
            return self.content + b"+"

    class IExecutionContext:
        fails = False
        capturable = True

        def __init__(self, engine: Any, config: Any) -> None:
            content = engine.model.SerializeToString()
            self.session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
            self.engine, self.config = engine, config
            self.addresses: dict[str, int] = {}

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            return shape == (2, 2, *WINDOW)

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return (2, 2, *WINDOW)

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self.addresses[name] = memory
            return True

        def _memory(self, name: str) -> np.ndarray:
            half = self.engine.get_tensor_dtype(name) == StandIn.DataType.HALF
            kind = np.dtype(np.float16 if half else np.float32)
            count = int(np.prod(self.get_tensor_shape(name)))
            raw = (ctypes.c_uint8 * (count * kind.itemsize)).from_address(self.addresses[name])
            return np.frombuffer(raw, kind).reshape(self.get_tensor_shape(name))

        def is_stream_capturable(self, stream: int) -> bool:
            return self.capturable

        def execute_async_v3(self, stream_handle: int) -> bool:
            if self.fails:
                return False
            (result,) = self.session.run(None, {"image": self._memory("image")})
            self._memory("logits")[:] = result
            return True


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    tensorrt._logger.cache_clear()
    monkeypatch.setattr(tensorrt, "load_library", lambda _: StandIn)
    yield
    tensorrt._logger.cache_clear()


def engine(folder: Path, content: bytes, cache: Path | None = None, **changes: Any) -> Any:
    file = folder / "model.tensorrt-rtx"
    file.write_bytes(content)
    return TensorRtEngine(
        file,
        build(**changes),
        "fp16",
        device=HostDevice(),
        library=StandIn,
        cache_file=cache,
    )


def test_an_engine_file_that_was_exchanged_is_not_loaded(tmp_path: Path) -> None:
    content = plan(TensorProto.FLOAT16)
    file = BundleFile(tmp_path / "model", file_entry("engine", content, "fp16", build()))
    file.path.write_bytes(content)
    TensorRtEngine(file, build(), "fp16", device=HostDevice(), library=StandIn)
    file.path.write_bytes(plan(TensorProto.FLOAT))
    with pytest.raises(BundleError, match="model: does not match its checksum"):
        TensorRtEngine(file, build(), "fp16", device=HostDevice(), library=StandIn)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_windows_goes_through_an_engine_for_two(
    tmp_path: Path, kind: int, count: int
) -> None:
    batch = np.random.default_rng(count).integers(-9, 9, (count, 2, *WINDOW)).astype(np.float32)
    result = engine(tmp_path, plan(kind)).infer(batch)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, 2 * batch)


class Recording(HostDevice):
    """Repeats work as a CUDA graph does, and counts."""

    stream = 7

    def __init__(self) -> None:
        super().__init__()
        self.repeated = 0

    def recorded(self, work: Any) -> Any:
        def repeat() -> None:
            self.repeated += 1
            work(8)  # a stream other than the device's, otherwise idle

        return repeat


def test_work_on_the_same_memory_is_recorded_at_the_second_time(tmp_path: Path) -> None:
    device = Recording()
    (tmp_path / "model").write_bytes(plan(TensorProto.FLOAT16))
    opened = TensorRtEngine(tmp_path / "model", build(), "fp16", device=device, library=StandIn)
    assert opened.half and opened.batches == (2, 2)
    assert opened.memory_bytes == 1000 + len(plan(TensorProto.FLOAT16))
    size = 2 * 2 * 2 * 4 * 5 * 6
    memory = [Region.of(device.allocate(size), 0, size) for _ in range(4)]
    for run in range(4):
        for images, logits in (memory[:2], memory[2:]):
            batch = np.full((2, 2, *WINDOW), run, np.float16)
            device.upload(batch, images)
            opened.enqueue(images, logits, batch.shape)
            device.download(logits, batch)
            assert (batch == 2 * run).all()
        assert device.repeated == 2 * run
    with pytest.raises(EngineError, match=r"batch of shape \(1, 2, 4, 5, 6\) \(the engine takes"):
        opened.enqueue(memory[0], memory[1], (1, 2, *WINDOW))


@pytest.mark.parametrize(
    ("device", "capturable", "reason"),
    [
        (Recording(), True, "yes"),
        (Recording(), False, "no: TensorRT-RTX does not record this engine on this stream"),
        (HostDevice(), True, "no: the host records nothing"),
    ],
)
def test_an_engine_says_whether_its_work_is_recorded_and_runs_anyway(
    tmp_path: Path, device: HostDevice, capturable: bool, reason: str
) -> None:
    (tmp_path / "model").write_bytes(plan(TensorProto.FLOAT))
    opened = TensorRtEngine(tmp_path / "model", build(), "fp32", device=device, library=StandIn)
    opened._context.capturable = capturable
    assert opened.recorded == "not yet"
    for value in (1, 2, 3):
        batch = np.full((2, 2, *WINDOW), value, np.float32)
        np.testing.assert_array_equal(opened.infer(batch), 2 * batch)
    assert opened.recorded == reason


def test_of_many_addresses_those_used_last_stay_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "_MOST_RECORDED", 2)
    device = Recording()
    (tmp_path / "model").write_bytes(plan(TensorProto.FLOAT16))
    opened = TensorRtEngine(tmp_path / "model", build(), "fp16", device=device, library=StandIn)
    size = 2 * 2 * 2 * 4 * 5 * 6
    images, *logits = (Region.of(device.allocate(size), 0, size) for _ in range(4))
    for target, replays in ((0, 0), (0, 1), (1, 1), (2, 1), (0, 1), (0, 2), (2, 3), (2, 4)):
        opened.enqueue(images, logits[target], (2, 2, *WINDOW))
        assert device.repeated == replays, target


def test_a_portable_engine_that_the_library_refuses_is_not_available_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").write_bytes(b"junk")
    portable = build(target="sm80", compatibility="ampere+")
    entry = FileEntry("engine", "fp16", portable, "0" * 64, 4)
    for target, kind in (("sm90", UnavailableError), ("sm80", EngineError)):
        monkeypatch.setattr(tensorrt, "find_gpu", lambda target=target: gpu(target))
        with pytest.raises(EngineError, match="refuses it") as caught:
            tensorrt.open_tensorrt(tmp_path / "model", entry, WINDOW, HostDevice)
        assert type(caught.value) is kind
    # The engine was built for 8.0: that its own GPU refuses it is a fault.


def test_the_engine_says_what_it_is(tmp_path: Path) -> None:
    info = engine(tmp_path, plan(TensorProto.FLOAT16)).info
    assert (info.name, info.version, info.precision) == ("tensorrt-rtx", "1.7.1", "fp16")
    assert info.device == "host"


def test_what_was_compiled_is_kept_for_the_next_start(tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "engine.runtime-cache"
    for expected in (b"+", b"++"):
        opened = engine(tmp_path, plan(TensorProto.FLOAT16), cache)
        for _ in range(2):
            opened.infer(np.zeros((1, 2, *WINDOW), np.float32))
        assert cache.read_bytes() == expected
    assert [f.name for f in cache.parent.iterdir()] == [cache.name]


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    opened = engine(tmp_path, plan(TensorProto.FLOAT16), tmp_path / "file" / "cache")
    assert opened.infer(np.ones((1, 2, *WINDOW), np.float32)).max() == 2


def test_a_damaged_engine_is_refused_with_the_librarys_reason(tmp_path: Path) -> None:
    for content in (b"", b"junk", plan(TensorProto.FLOAT16)[:-30]):
        with pytest.raises(EngineError, match=r"refuses it \(this is no engine\)") as caught:
            engine(tmp_path, content)
        assert "\n" not in str(caught.value)


def test_an_engine_that_fails_or_does_not_fit_is_one_clear_error(tmp_path: Path) -> None:
    opened = engine(tmp_path, plan(TensorProto.FLOAT16))
    with pytest.raises(EngineError, match=r"failed on a batch of shape \(1, 3, 4, 5, 6\)"):
        opened.infer(np.zeros((1, 3, *WINDOW), np.float32))
    opened._context.fails = True
    opened._log.error = "of an earlier engine"
    with pytest.raises(EngineError, match=r"tensorrt-rtx failed \(no reason given\)"):
        opened.infer(np.zeros((1, 2, *WINDOW), np.float32))
    with pytest.raises(EngineError, match="does not take the window of the manifest"):
        engine(tmp_path, plan(TensorProto.FLOAT16), batch=3)
    with pytest.raises(EngineError, match="neither fp16 nor fp32"):
        engine(tmp_path, plan(TensorProto.INT32))


def test_a_library_that_does_not_start_is_an_engine_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Any) -> Any:
        raise TypeError("factory function returned nullptr")

    monkeypatch.setattr(StandIn, "Runtime", fails)
    with pytest.raises(EngineError, match=r"does not start \(factory function returned nullptr"):
        engine(tmp_path, plan(TensorProto.FLOAT16))


def test_the_real_library_has_what_the_adapter_calls() -> None:
    """The stand-in's classes and methods, with their arguments, are those of the bindings."""
    for name in ("Runtime", "ICudaEngine", "IRuntimeConfig", "IRuntimeCache", "IExecutionContext"):
        real = getattr(tensorrt_rtx_bindings, name)
        for method in vars(getattr(StandIn, name)):
            if not method.startswith("_") and method not in ("fails", "capturable"):
                assert hasattr(real, method), f"{name}.{method}"
    context = tensorrt_rtx_bindings.IExecutionContext
    assert "name: str, memory:" in context.set_tensor_address.__doc__
    assert "stream_handle:" in context.execute_async_v3.__doc__
    assert "name: str, shape: tuple" in context.set_input_shape.__doc__
    for strategy in StandIn.DynamicShapesKernelSpecializationStrategy:
        assert hasattr(
            tensorrt_rtx_bindings.DynamicShapesKernelSpecializationStrategy, strategy.name
        )
    config = tensorrt_rtx_bindings.IRuntimeConfig
    assert hasattr(config, "dynamic_shapes_kernel_specialization_strategy")
    assert hasattr(tensorrt_rtx_bindings.Runtime, "engine_host_code_allowed")
    for kind in ("HALF", "FLOAT"):
        assert hasattr(tensorrt_rtx_bindings.DataType, kind)
    for mode in ("INPUT", "OUTPUT"):
        assert hasattr(tensorrt_rtx_bindings.TensorIOMode, mode)


def test_an_engine_for_this_gpu_version_and_window_is_taken() -> None:
    check_build(build(), "1.7.1", gpu("sm86"), WINDOW)
    check_build(build(version_compatible=True), "1.8.0", gpu("sm86"), WINDOW)
    for target in ("sm80", "sm86", "sm89", "sm120"):
        later = build(builder="tensorrt", compatibility="ampere+", version="10.3")
        check_build(later, "10.3", gpu(target), WINDOW)


@pytest.mark.parametrize(
    ("changes", "target", "message"),
    [
        (
            {},
            "sm89",
            "compute capability 8.6, this GPU is 8.9; export the model with target='sm89'",
        ),
        ({}, "sm90", "this GPU is 9.0; export the model with compatibility='ampere"),
        ({}, "sm120", "capability 8.6, this GPU is 12.0; export the model with target='sm120'"),
        (
            {"builder": "tensorrt", "compatibility": "ampere+"},
            "sm75",
            "8.6, this GPU is 7.5; export the model on RTX with builder='tensorrt'",
        ),
        (
            {"version": "1.6.0"},
            "sm86",
            "rtx 1.6.0, installed is 1.7.1; export the model again",
        ),
        ({"version": "1.8.0", "version_compatible": True}, "sm86", "1.8.0, installed is 1.7.1"),
        ({"window": (8, 8, 8)}, "sm86", "takes windows of 8x8x8, 4x5x6 is requested; leave"),
    ],
)
def test_an_engine_for_something_else_is_refused_in_words(
    changes: dict[str, Any], target: str, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        check_build(build(**changes), "1.7.1", gpu(target), WINDOW)


def test_one_pass_over_the_brain_is_no_window_of_an_engine() -> None:
    with pytest.raises(EngineError, match=r"windows of 4x5x6, any size is requested"):
        check_build(build(), "1.7.1", gpu("sm86"), None)
