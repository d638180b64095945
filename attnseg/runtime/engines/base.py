"""What an inference engine is: the seam between the executor and whoever runs the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


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
