"""What an inference engine is: the seam between the executor and whoever runs the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.cuda.device import Device, Region


@dataclass(frozen=True)
class EngineInfo:
    """What ran, for the report.

    Attributes:
        name: `openvino`, `onnxruntime`, ...
        version: of the library.
        precision: arithmetic of the network, `fp32` or `bf16`; inputs and outputs stay float32.
        device: `cpu`, or the GPU's name.
    """

    name: str
    version: str
    precision: str
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in reports."""
        return {
            "name": self.name,
            "version": self.version,
            "precision": self.precision,
            "device": self.device,
        }


class Engine(Protocol):
    """Runs the network on one batch at a time."""

    @property
    def info(self) -> EngineInfo:
        """What runs."""

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of a batch.

        Args:
            batch: `(B, C, X, Y, Z)` float32, C-contiguous. The caller's; not kept.

        Returns:
            `(B, K, X, Y, Z)` float32. The engine's; valid until the next call.

        Raises:
            EngineError: the engine refuses the batch's shape or fails to run.
        """


@runtime_checkable
class DeviceEngine(Engine, Protocol):
    """Runs the network on device memory, for `attnseg.runtime.cuda.executor`.

    Input and output belong to the caller, who keeps them until the device has done the work. What
    the engine needs besides (weights, activations) belongs to the engine. Calls come within
    `device.active()`, but for `infer`.
    """

    @property
    def device(self) -> Device:
        """Where it runs."""

    @property
    def batches(self) -> tuple[int, int]:
        """Most and least windows that one call takes."""

    @property
    def classes(self) -> int | None:
        """Channels of its logits; None if that is not known before it runs."""

    @property
    def half(self) -> bool:
        """Whether it takes and gives fp16; otherwise fp32."""

    @property
    def memory_bytes(self) -> int:
        """Device memory that it holds itself, as far as it is known."""

    def enqueue(self, images: Region, logits: Region, shape: Sequence[int]) -> None:
        """Run one batch, in the order of the device's stream; need not wait for it.

        Args:
            images: `(B, C, x, y, z)` fp16 or fp32; read only.
            logits: `(B, K, x, y, z)` of the same type; written.
            shape: B, C, x, y, z.

        Raises:
            OutOfMemoryError: the device has not enough memory for a batch of this size.
            EngineError: it does not take the shape, or failed.
        """
