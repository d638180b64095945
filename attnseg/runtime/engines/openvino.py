"""OpenVINO on the CPU: bf16 where the CPU supports it, static shapes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.engines.base import EngineInfo, ModelFile, failed, not_loaded
from attnseg.runtime.engines.libraries import import_openvino
from attnseg.runtime.errors import EngineError, Setting

_HINTS = {"bf16": "bf16", "fp32": "f32"}


@cache
def _core() -> Any:
    """The only `openvino.Core` of the process, never freed.

    Each core installs an alternate signal stack in its thread and unmaps it when freed. If two are
    freed in the order of their creation, the thread is left with an unmapped stack, and the next
    signal that Python handles, such as Ctrl-C, crashes the process (seen in OpenVINO 2026.4).
    """
    return import_openvino().Core()


class OpenVinoEngine:
    """Runs an ONNX graph on OpenVINO's CPU plugin, recompiled when the batch shape changes.

    The precision is always set explicitly, as OpenVINO otherwise selects bf16 wherever it is fast.
    """

    def __init__(self, model: ModelFile, precision: str, threads: int) -> None:
        """Open `model`.

        Raises:
            EngineError: OpenVINO is missing, rejects the file, or does not support the precision on
                this CPU.
        """
        try:
            ov = import_openvino()
        except ImportError as error:
            raise not_loaded("openvino", error) from error
        self._ov = ov
        try:
            self._core = _core()
            has_bf16 = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        except RuntimeError as error:
            raise failed("engine openvino cannot be loaded", error) from error
        if precision == "bf16" and not has_bf16:
            raise EngineError(
                "this processor has no bf16 instructions", "use {}", Setting("precision", "fp32")
            )
        chosen = ("bf16" if has_bf16 else "fp32") if precision == "auto" else precision
        if chosen not in _HINTS:
            raise EngineError(f"engine openvino runs bf16 and fp32, got precision {precision}")
        self._settings = {
            "INFERENCE_PRECISION_HINT": _HINTS[chosen],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }
        content = model.read_bytes()
        try:
            self._model = self._core.read_model(content)
            self._takes = self._model.input(0).partial_shape
        except Exception as error:  # UnicodeDecodeError, if a name in its message is damaged
            raise failed(f"{model}: OpenVINO refuses it", error) from error
        self._shape: tuple[int, ...] | None = None
        self._request: Any = None
        self.info = EngineInfo("openvino", ov.__version__.split("-")[0], chosen, "cpu")

    def _compile(self, shape: tuple[int, ...]) -> None:
        if not self._takes.compatible(self._ov.PartialShape(list(shape))):
            raise RuntimeError(f"the model takes {self._takes}")
        self._model.reshape(list(shape))
        compiled = self._core.compile_model(self._model, "CPU", self._settings)
        self._request, self._shape = compiled.create_infer_request(), shape

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `attnseg.runtime.engines.base.Engine.infer`."""
        try:
            if batch.shape != self._shape:
                self._compile(batch.shape)
            result = self._request.infer(batch, share_inputs=True, share_outputs=True)
        except Exception as error:  # see above
            raise failed(f"OpenVINO failed on a batch of shape {batch.shape}", error) from error
        return np.asarray(result[0])
