"""ONNX Runtime: a session, and the engine on its CPU provider."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.engines.base import EngineInfo, ModelFile, failed, not_loaded
from attnseg.runtime.engines.libraries import import_onnxruntime
from attnseg.runtime.errors import EngineError, Setting


class OnnxSession:
    """ONNX Runtime session of a graph with one input."""

    def __init__(self, model: ModelFile, options: dict[str, Any], providers: list[Any]) -> None:
        ort = import_onnxruntime()
        settings = ort.SessionOptions()
        settings.log_severity_level = 4  # what fails is raised, too
        for name, value in options.items():
            setattr(settings, name, value)
        content = model.read_bytes()
        try:
            # Without enable_fallback=0, a failure is printed, and another provider tried silently.
            self._session = ort.InferenceSession(
                content, settings, providers=providers, enable_fallback=0
            )
        except Exception as error:  # its exceptions share no base but Exception
            raise failed(f"{model}: ONNX Runtime refuses it", error) from error
        self.input = str(self._session.get_inputs()[0].name)
        self._output = self._session.get_outputs()[0]
        self.output = str(self._output.name)
        half = self._session.get_inputs()[0].type == "tensor(float16)"
        self.dtype: type[Any] = np.float16 if half else np.float32
        self.version = str(ort.__version__)

    @property
    def provider(self) -> str:
        """Execution provider of the highest priority."""
        return str(self._session.get_providers()[0])

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `attnseg.runtime.engines.base.Engine.infer`."""
        try:
            result = self._session.run(None, {self.input: batch.astype(self.dtype, copy=False)})
        except Exception as error:  # its exceptions share no base but Exception
            raise failed(f"ONNX Runtime failed on a batch of shape {batch.shape}", error) from error
        return np.asarray(result[0]).astype(np.float32, copy=False)

    def io_binding(self) -> Any:
        """Create a binding of input and output to memory, for `run_bound`."""
        return self._session.io_binding()

    def run_bound(self, binding: Any) -> None:
        """Run the graph on the memory of a binding; need not wait for the device."""
        options = import_onnxruntime().RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._session.run_with_iobinding(binding, options)

    @property
    def half(self) -> bool:
        """Whether input and output of the graph are fp16."""
        return self.dtype is np.float16

    @property
    def classes(self) -> int | None:
        """Number of channels of the logits; None if the graph does not fix it."""
        channels = self._output.shape[1]
        return channels if isinstance(channels, int) else None

    @property
    def fixed_batch(self) -> int | None:
        """Batch size of the graph; None if it is dynamic."""
        size = self._session.get_inputs()[0].shape[0]
        return size if isinstance(size, int) else None


class OnnxRuntimeEngine:
    """Runs an fp32 or quantised (int8) ONNX graph on ONNX Runtime's CPU provider."""

    def __init__(self, model: ModelFile, precision: str, threads: int) -> None:
        """Open `model`.

        Raises:
            EngineError: ONNX Runtime is missing, rejects the file, or does not support the
                precision.
        """
        if precision not in ("auto", "fp32", "int8"):
            raise EngineError(
                f"engine onnxruntime runs fp32 on the CPU, got precision {precision}",
                "use {} or {}",
                Setting("precision", "fp32"),
                Setting("engine", "openvino"),
            )
        try:
            import_onnxruntime()
        except ImportError as error:
            raise not_loaded("onnxruntime", error) from error
        options = {"intra_op_num_threads": threads}
        self._session = OnnxSession(model, options, ["CPUExecutionProvider"])
        chosen = "int8" if precision == "int8" else "fp32"
        self.info = EngineInfo("onnxruntime", self._session.version, chosen, "cpu")

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `attnseg.runtime.engines.base.Engine.infer`."""
        return self._session.infer(batch)
