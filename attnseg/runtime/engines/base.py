"""Interface of an inference engine on host arrays.

This module imports neither an engine nor CUDA. Engines that run on device memory implement the
extended interface in `attnseg.runtime.engines.device`.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.errors import EngineError, Setting
from attnseg.runtime.extras import install
from attnseg.runtime.limits import limit_reached

PRECISIONS = ("auto", "fp16", "bf16", "fp32", "int8")
"""Precisions that can be requested; no engine supports all of them."""


@dataclass(frozen=True)
class EngineInfo:
    """Description of an engine, as recorded in reports.

    Attributes:
        name: Name of the engine, such as `openvino`.
        version: Version of the engine's library.
        precision: Arithmetic of the network, such as `bf16`; inputs and outputs stay float32.
        device: `cpu`, or the name of the GPU.
    """

    name: str
    version: str
    precision: str
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in reports."""
        return asdict(self)


_NOISE = re.compile(
    r"Exception from \S+:|\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from .*? failed:|"
    r"Check '[^']*' failed at \S+:"
)
_LONGEST = 240


def reason_of(error: Exception) -> str:
    """Message of another library's exception in one line, without source lines and file names."""
    text = " ".join(_NOISE.sub("", str(error)).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3].rstrip()}..."


def failed(what: str, error: Exception) -> EngineError:
    """Error for an engine that failed; `what` is the start of the cause.

    The mend says what helps if memory or threads are lacking.
    """
    reached = limit_reached(error)
    return EngineError(f"{what} ({reason_of(error)})", reached.mend if reached else "")


def not_loaded(name: str, error: ImportError) -> EngineError:
    """Error for an engine whose library is not installed, or is and cannot be loaded."""
    if isinstance(error, ModuleNotFoundError):
        return EngineError(f"engine {name} is not installed", install("cpu"))
    return failed(f"engine {name} cannot be loaded", error)


class ModelFile(Protocol):
    """A graph or an engine file; a bundle's compares its content with the checksum."""

    @property
    def name(self) -> str:
        """Name of the file, for the texts of errors."""

    def read_bytes(self) -> bytes:
        """Content of the file, which the engine runs; it reads no other file.

        Raises:
            BundleError: The content is not that which the bundle's manifest names.
        """


class Engine(Protocol):
    """Runs the network on one batch at a time."""

    @property
    def info(self) -> EngineInfo:
        """Name, version, precision and device of the engine."""

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute the logits of a batch.

        Args:
            batch: `(B, C, X, Y, Z)` float32, C-contiguous; owned by the caller, not retained.

        Returns:
            `(B, K, X, Y, Z)` float32; owned by the engine, valid until the next call.

        Raises:
            EngineError: The engine does not support the shape of the batch, or fails.
        """


def not_finite(info: EngineInfo) -> EngineError:
    """Error for an engine whose logits are NaN or infinite."""
    return EngineError(
        f"engine {info.name} returned logits that are not finite in {info.precision}",
        "try {} or another engine",
        Setting("precision", "fp32"),
    )
