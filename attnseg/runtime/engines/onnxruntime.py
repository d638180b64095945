"""ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.engines.base import EngineInfo
from attnseg.runtime.errors import EngineError


class OnnxRuntimeEngine:
    """Runs an ONNX graph in fp32 by ONNX Runtime's CPU provider."""

    def __init__(self, model: Path, precision: str, threads: int) -> None:
        """Open `model`.

        Raises:
            EngineError: ONNX Runtime is missing, refuses the file, or the precision is not fp32.
        """
        if precision not in ("auto", "fp32"):
            raise EngineError(
                f"engine onnxruntime runs fp32 on the CPU, got precision {precision}; "
                "use --precision fp32 or --engine openvino"
            )
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise EngineError(
                "engine onnxruntime is not installed; pip install 'attnseg[cpu]'"
            ) from error
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(
                str(model), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions share no base but Exception
            raise EngineError(f"{model}: ONNX Runtime refuses it ({error})") from error
        self._input = self._session.get_inputs()[0].name
        self.info = EngineInfo("onnxruntime", ort.__version__, "fp32", "cpu")

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `attnseg.runtime.engines.base.Engine.infer`."""
        try:
            return np.asarray(self._session.run(None, {self._input: batch})[0])
        except Exception as error:  # its exceptions share no base but Exception
            raise EngineError(
                f"ONNX Runtime failed on a batch of shape {batch.shape} ({error})"
            ) from error
