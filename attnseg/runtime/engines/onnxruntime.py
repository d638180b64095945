"""ONNX Runtime, on the CPU and on a CUDA device."""

from __future__ import annotations

import importlib.metadata
import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.cuda.device import Device, Region
from attnseg.runtime.engines.base import EngineInfo
from attnseg.runtime.errors import EngineError, NotHereError, OutOfMemoryError
from attnseg.runtime.gpu import find_gpu

_CUDA = "CUDAExecutionProvider"
_SHORTAGES = ("FAILED TO ALLOCATE MEMORY", "OUT OF MEMORY", "ALLOC_FAILED", "ALLOCATION_FAILED")
_BATCH = 4  # windows of one call; enough to fill a GPU, and a divisor of most volumes' windows


class OnnxSession:
    """An ONNX graph with one input, as ONNX Runtime runs it."""

    def __init__(self, model: Path, options: dict[str, Any], providers: list[Any]) -> None:
        import onnxruntime as ort

        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        for name, value in options.items():
            setattr(settings, name, value)
        try:
            self._session = ort.InferenceSession(str(model), settings, providers=providers)
        except Exception as error:  # its exceptions share no base but Exception
            raise EngineError(f"{model}: ONNX Runtime refuses it ({error})") from error
        self._session.disable_fallback()  # to another provider, without a word
        self._input = self._session.get_inputs()[0].name
        self._output = self._session.get_outputs()[0]
        half = self._session.get_inputs()[0].type == "tensor(float16)"
        self._type = np.float16 if half else np.float32
        self.version = str(ort.__version__)

    @property
    def provider(self) -> str:
        """What runs most of the graph."""
        return str(self._session.get_providers()[0])

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `attnseg.runtime.engines.base.Engine.infer`."""
        try:
            result = self._session.run(None, {self._input: batch.astype(self._type, copy=False)})
        except Exception as error:  # its exceptions share no base but Exception
            raise EngineError(
                f"ONNX Runtime failed on a batch of shape {batch.shape} ({error})"
            ) from error
        return np.asarray(result[0]).astype(np.float32, copy=False)

    @property
    def half(self) -> bool:
        """Whether the graph takes and gives fp16."""
        return self._type is np.float16

    @property
    def classes(self) -> int | None:
        """Channels of the logits, if the graph says."""
        channels = self._output.shape[1]
        return channels if isinstance(channels, int) else None

    @property
    def fixed_batch(self) -> int | None:
        """Windows of one call, if the graph takes no other number."""
        size = self._session.get_inputs()[0].shape[0]
        return size if isinstance(size, int) else None

    def run_on(self, device: Device, images: Region, logits: Region, shape: Sequence[int]) -> None:
        """Run a batch of `shape` (B, C, x, y, z) on memory of a device; need not wait for it."""
        import onnxruntime as ort

        binding = self._session.io_binding()
        place = device.kind, device.number, self._type
        voxels = shape[0] * prod(shape[2:])
        classes = logits.size_bytes // (voxels * np.dtype(self._type).itemsize)
        given = [shape[0], classes, *shape[2:]]
        binding.bind_input(self._input, *place, list(shape), images.pointer)
        binding.bind_output(self._output.name, *place, given, logits.pointer)
        options = ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:  # its exceptions share no base but Exception
            text = " ".join(str(error).split())
            short = any(sign in text.upper() for sign in _SHORTAGES)
            kind_of_error = OutOfMemoryError if short else EngineError
            raise kind_of_error(
                f"ONNX Runtime failed on a batch of shape {tuple(shape)} ({text})"
            ) from error


class OnnxRuntimeEngine:
    """Runs an ONNX graph in fp32, or one that was quantised, by ONNX Runtime's CPU provider."""

    def __init__(self, model: Path, precision: str, threads: int) -> None:
        """Open `model`.

        Raises:
            EngineError: ONNX Runtime is missing, refuses the file, or has no such precision.
        """
        if precision not in ("auto", "fp32", "int8"):
            raise EngineError(
                f"engine onnxruntime runs fp32 on the CPU, got precision {precision}; "
                "use --precision fp32 or --engine openvino"
            )
        try:
            import onnxruntime  # noqa: F401
        except ImportError as error:
            raise EngineError(
                "engine onnxruntime is not installed; pip install 'attnseg[cpu]'"
            ) from error
        options = {"intra_op_num_threads": threads}
        self._session = OnnxSession(model, options, ["CPUExecutionProvider"])
        chosen = "int8" if precision == "int8" else "fp32"
        self.info = EngineInfo("onnxruntime", self._session.version, chosen, "cpu")

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `attnseg.runtime.engines.base.Engine.infer`."""
        return self._session.infer(batch)


class OnnxRuntimeDeviceEngine:
    """Runs an ONNX graph on memory of a device, in the graph's own precision, by IO binding."""

    def __init__(
        self, session: OnnxSession, precision: str, device: Device, limit: int = 0
    ) -> None:
        """An open session.

        Args:
            session: of the graph, with a provider for the device.
            precision: of the graph.
            device: where it runs.
            limit: device memory that the session may take, 0 if it has no limit.
        """
        self._session, self._device, self.memory_bytes = session, device, limit
        name = "onnxruntime-cuda" if device.kind == "cuda" else "onnxruntime"
        self.info = EngineInfo(name, session.version, precision, device.name)

    @property
    def device(self) -> Device:
        """See `attnseg.runtime.engines.base.DeviceEngine`."""
        return self._device

    @property
    def classes(self) -> int | None:
        """See `attnseg.runtime.engines.base.DeviceEngine`."""
        return self._session.classes

    @property
    def half(self) -> bool:
        """See `attnseg.runtime.engines.base.DeviceEngine`."""
        return self._session.half

    @property
    def batches(self) -> tuple[int, int]:
        """See `attnseg.runtime.engines.base.DeviceEngine`."""
        fixed = self._session.fixed_batch
        return (fixed, fixed) if fixed else (_BATCH, 1)

    def enqueue(self, images: Region, logits: Region, shape: Sequence[int]) -> None:
        """See `attnseg.runtime.engines.base.DeviceEngine.enqueue`."""
        self._session.run_on(self._device, images, logits, shape)

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `attnseg.runtime.engines.base.Engine.infer`."""
        if self._session.classes is None:
            return self._session.infer(batch)
        kind = np.float16 if self.half else np.float32
        content = np.ascontiguousarray(batch, kind)
        logits = np.empty((len(batch), self._session.classes, *batch.shape[2:]), kind)
        with self._device.active():
            taken, given = (
                Region.of(self._device.allocate(array.nbytes), 0, array.nbytes)
                for array in (content, logits)
            )
            self._device.upload(content, taken)
            self.enqueue(taken, given, batch.shape)
            self._device.download(given, logits)
        return logits.astype(np.float32, copy=False)


def _import_gpu_runtime() -> Any:
    """ONNX Runtime with its CUDA provider. Raises `NotHereError` if it is not installed."""
    try:
        importlib.metadata.version("onnxruntime-gpu")
        import onnxruntime as ort
    except ImportError as error:  # PackageNotFoundError is one too
        raise NotHereError(
            "onnxruntime-gpu is not installed; pip install 'attnseg[gpu]'"
        ) from error
    if _CUDA not in ort.get_available_providers():
        raise NotHereError(
            "onnxruntime is installed beside onnxruntime-gpu and hides its CUDA provider; "
            "pip uninstall onnxruntime, then pip install --force-reinstall onnxruntime-gpu"
        )
    return ort


def open_onnxruntime_cuda(
    model: Path, precision: str, open_device: Callable[[], Device], limit: int = 0
) -> OnnxRuntimeDeviceEngine:
    """Open an ONNX graph on the GPU.

    Args:
        model: the graph.
        precision: of the graph.
        open_device: opens the GPU.
        limit: device memory that ONNX Runtime may take for weights and activations, in bytes; 0
            for any.

    Raises:
        EngineError: there is no GPU, onnxruntime-gpu is missing or cannot load its CUDA libraries,
            or it refuses the file.
    """
    find_gpu()
    ort = _import_gpu_runtime()
    device = open_device()
    if not device.primary:
        raise NotHereError(
            "ONNX Runtime works in the primary context of a GPU only, another is current; open the "
            "segmenter outside of it, or use an engine of TensorRT"
        )
    with redirect_stdout(io.StringIO()):  # it prints
        ort.preload_dlls()  # CUDA and cuDNN from their packages, where there are such
    settings = {
        "device_id": str(device.number),
        "user_compute_stream": str(device.stream),
        "use_tf32": "0",  # TensorFloat-32 would round fp32 graphs to 10 bits
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "arena_extend_strategy": "kSameAsRequested",  # not twice as much each time
    }
    if limit:
        settings["gpu_mem_limit"] = str(limit)
    with device.active():
        session = OnnxSession(model, {}, [(_CUDA, settings)])
    if session.provider != _CUDA:  # it goes on without a word on the processor
        raise NotHereError(
            "ONNX Runtime could not load its CUDA provider; pip install "
            "'onnxruntime-gpu[cuda,cudnn]', and see attnseg doctor for the driver"
        )
    return OnnxRuntimeDeviceEngine(session, precision, device, limit)
