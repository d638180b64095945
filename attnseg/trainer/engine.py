"""A PyTorch network as an engine of the runtime."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attnseg.runtime.engines.base import EngineInfo
from attnseg.trainer.config import Precision

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def mixed_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """Context in which networks on `device` run in `precision`."""
    half = _HALF.get(precision)
    with torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None):
        yield


class TorchEngine:
    """Runs a network in PyTorch, for validation and as the reference of every export."""

    def __init__(
        self,
        network: nn.Module,
        device: torch.device | None = None,
        precision: Precision = "fp32",
    ) -> None:
        """Wrap a network.

        Args:
            network: Network in evaluation mode, on `device`.
            device: Device that runs the network; None for the CPU.
            precision: Precision of the network's arithmetic.
        """
        self._network, self._precision = network, precision
        self._device = device or torch.device("cpu")
        self.info = EngineInfo("torch", torch.__version__, precision, str(self._device))

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `attnseg.runtime.engines.base.Engine.infer`."""
        images = torch.from_numpy(batch).to(self._device)
        with torch.inference_mode(), mixed_precision(self._precision, self._device):
            logits: Tensor = self._network(images)
        return np.asarray(logits.float().cpu().contiguous().numpy())
