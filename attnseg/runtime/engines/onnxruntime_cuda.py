"""ONNX Runtime's CUDA provider, on device memory of the caller."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.cuda.device import Device, Region
from attnseg.runtime.cuda.gpu import find_gpu
from attnseg.runtime.engines.base import EngineInfo, ModelFile
from attnseg.runtime.engines.device import usual_batch
from attnseg.runtime.engines.libraries import import_onnxruntime
from attnseg.runtime.engines.onnxruntime import OnnxSession
from attnseg.runtime.errors import EngineError, OutOfMemoryError, UnavailableError
from attnseg.runtime.extras import install
from attnseg.runtime.geometry import Shape

_PROVIDER = "CUDAExecutionProvider"
_SHORTAGES = ("FAILED TO ALLOCATE MEMORY", "OUT OF MEMORY", "ALLOC_FAILED", "ALLOCATION_FAILED")


class OnnxRuntimeDeviceEngine:
    """Runs an ONNX graph on device memory by I/O binding, in the graph's own precision."""

    device_type = "cuda"
    recorded = "no: ONNX Runtime launches its kernels one by one"

    def __init__(
        self,
        session: OnnxSession,
        precision: str,
        device: Device,
        window: Shape | None = None,
        max_memory_bytes: int | None = None,
    ) -> None:
        """Wrap an open session.

        Args:
            session: Session of the graph, with a provider for the device.
            precision: Precision of the graph.
            device: Device that runs it.
            window: Window in voxels along X, Y and Z; None for any size.
            max_memory_bytes: Limit of the session's device memory; None for no limit.
        """
        self._session, self._device = session, device
        self._batch = usual_batch(window)
        self.memory_bytes = max_memory_bytes or 0
        self.info = EngineInfo("onnxruntime-cuda", session.version, precision, device.name)

    @property
    def device(self) -> Device:
        """See `attnseg.runtime.engines.device.DeviceEngine`."""
        return self._device

    @property
    def classes(self) -> int | None:
        """See `attnseg.runtime.engines.device.DeviceEngine`."""
        return self._session.classes

    @property
    def half(self) -> bool:
        """See `attnseg.runtime.engines.device.DeviceEngine`."""
        return self._session.half

    @property
    def batches(self) -> tuple[int, int]:
        """See `attnseg.runtime.engines.device.DeviceEngine`."""
        fixed = self._session.fixed_batch
        return (fixed, fixed) if fixed else (self._batch, 1)

    def enqueue(self, images: Region, logits: Region, shape: Sequence[int]) -> None:
        """See `attnseg.runtime.engines.device.DeviceEngine.enqueue`."""
        session, binding = self._session, self._session.io_binding()
        place = self.device_type, self._device.ordinal, session.dtype
        voxels = shape[0] * prod(shape[2:])
        classes = logits.size_bytes // (voxels * np.dtype(session.dtype).itemsize)
        binding.bind_input(session.input, *place, list(shape), images.pointer)
        given = [shape[0], classes, *shape[2:]]
        binding.bind_output(session.output, *place, given, logits.pointer)
        try:
            session.run_bound(binding)
        except Exception as error:  # its exceptions share no base but Exception
            text = " ".join(str(error).split())
            short = any(sign in text.upper() for sign in _SHORTAGES)
            kind_of_error = OutOfMemoryError if short else EngineError
            raise kind_of_error(
                f"ONNX Runtime failed on a batch of shape {tuple(shape)} ({text})"
            ) from error

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
    """ONNX Runtime with its CUDA provider. Raises `UnavailableError` if it is not installed."""
    try:
        importlib.metadata.version("onnxruntime-gpu")
        ort = import_onnxruntime()
    except ImportError as error:  # PackageNotFoundError is an ImportError
        raise UnavailableError("onnxruntime-gpu is not installed", install("gpu")) from error
    if _PROVIDER not in ort.get_available_providers():
        raise UnavailableError(
            "onnxruntime is installed beside onnxruntime-gpu and hides its CUDA provider",
            "uninstall onnxruntime, then install onnxruntime-gpu anew",
        )
    return ort


def _other_site_folder() -> dict[str, Path]:
    """Folders of CUDA's and cuDNN's libraries among the Python packages, by argument of ORT.

    Empty if they are not there, or spread over one folder per library.
    """
    spec = importlib.util.find_spec("nvidia")
    found = {}
    for name, library in (("cuda", "libcudart.so.*"), ("cudnn", "libcudnn.so.*")):
        for root in (spec.submodule_search_locations if spec else None) or ():
            for file in sorted(Path(root).glob(f"*/lib/{library}")):
                found[name] = file.parent
    return found


def _load_cuda_libraries(ort: Any) -> str:
    """Load CUDA and cuDNN from their Python packages, or from the system.

    ONNX Runtime looks beside its own package; they may be in another site folder.

    Returns:
        What ONNX Runtime said about libraries that it could not load, in one line.
    """
    with redirect_stdout(io.StringIO()) as printed:  # preload_dlls prints
        ort.preload_dlls()
    if not printed.getvalue():
        return ""
    folders = _other_site_folder()
    with redirect_stdout(io.StringIO()) as again:
        for name, folder in folders.items():
            only = {"cuda": name == "cuda", "cudnn": name == "cudnn"}
            ort.preload_dlls(**only, directory=str(folder))
    loaded = len(folders) == 2 and not again.getvalue()
    return "" if loaded else " ".join(printed.getvalue().split())


def open_onnxruntime_cuda(
    model: ModelFile,
    precision: str,
    open_device: Callable[[], Device],
    window: Shape | None = None,
    max_memory_bytes: int | None = None,
) -> OnnxRuntimeDeviceEngine:
    """Open an ONNX graph on the GPU.

    Args:
        model: The graph.
        precision: Precision of the graph.
        open_device: Function that opens the GPU.
        window: Window in voxels along X, Y and Z that it runs on; None for any size.
        max_memory_bytes: Limit of the device memory for weights and activations; None for no
            limit.

    Raises:
        EngineError: There is no GPU, onnxruntime-gpu is missing or cannot load its CUDA libraries,
            or it rejects the file.
    """
    find_gpu()
    ort = _import_gpu_runtime()
    device = open_device()
    if not device.primary:
        raise UnavailableError(
            "ONNX Runtime works in the primary context of a GPU only, and another is current",
            "open the segmenter outside of that context, or use an engine of TensorRT",
        )
    complaints = _load_cuda_libraries(ort)
    # It prints an error for each fused convolution that cuDNN has no kernel for, and then runs the
    # convolution in another way; errors that stop it are raised as well.
    ort.set_default_logger_severity(4)
    settings = {
        "device_id": str(device.ordinal),
        "user_compute_stream": str(device.stream),
        "use_tf32": "0",  # TensorFloat-32 would round fp32 graphs to 10 bits
        "cudnn_conv_algo_search": "HEURISTIC",  # EXHAUSTIVE selects by time: bytes could differ
        "prefer_nhwc": "1",  # channels last: a third less time than channels first on an H200
        "arena_extend_strategy": "kSameAsRequested",  # instead of doubling each time
    }
    if max_memory_bytes is not None:
        settings["gpu_mem_limit"] = str(max_memory_bytes)
    with device.active():
        session = OnnxSession(model, {"use_deterministic_compute": True}, [(_PROVIDER, settings)])
    if session.provider != _PROVIDER:  # ONNX Runtime silently continues on the CPU
        raise UnavailableError(
            f"ONNX Runtime could not load its CUDA provider ({complaints or 'no reason given'})",
            "pip install 'onnxruntime-gpu[cuda,cudnn]', and see attnseg doctor for the driver",
        )
    return OnnxRuntimeDeviceEngine(session, precision, device, window, max_memory_bytes)
