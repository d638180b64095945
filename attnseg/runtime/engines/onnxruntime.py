"""ONNX Runtime, on the CPU and on a CUDA device."""

from __future__ import annotations

import importlib.metadata
import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.engines.base import EngineInfo
from attnseg.runtime.errors import EngineError, NotHereError
from attnseg.runtime.gpu import find_gpu

_CUDA = "CUDAExecutionProvider"


class _Session:
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
        self._session = _Session(model, options, ["CPUExecutionProvider"])
        chosen = "int8" if precision == "int8" else "fp32"
        self.info = EngineInfo("onnxruntime", self._session.version, chosen, "cpu")

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `attnseg.runtime.engines.base.Engine.infer`."""
        return self._session.infer(batch)


class OnnxRuntimeCudaEngine:
    """Runs an ONNX graph by ONNX Runtime's CUDA provider, in the graph's own precision."""

    def __init__(self, model: Path, precision: str) -> None:
        """Open `model`.

        Raises:
            EngineError: there is no GPU, onnxruntime-gpu is missing or cannot load its CUDA
                libraries, or it refuses the file.
        """
        gpu = find_gpu()
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
        with redirect_stdout(io.StringIO()):  # it prints
            ort.preload_dlls()  # CUDA and cuDNN from their packages, where there are such
        # TensorFloat-32 would round fp32 graphs to 10 bits.
        settings = {"use_tf32": "0", "cudnn_conv_algo_search": "EXHAUSTIVE"}
        self._session = _Session(model, {}, [(_CUDA, settings)])
        if self._session.provider != _CUDA:  # it goes on without a word on the processor
            raise NotHereError(
                "ONNX Runtime could not load its CUDA provider; pip install "
                "'onnxruntime-gpu[cuda,cudnn]', and see attnseg doctor for the driver"
            )
        version = self._session.version
        self.info = EngineInfo("onnxruntime-cuda", version, precision, gpu.name)

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `attnseg.runtime.engines.base.Engine.infer`."""
        return self._session.infer(batch)
