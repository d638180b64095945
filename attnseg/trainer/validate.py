"""Validation: whole cases through the runtime's sliding window, with the network in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attnseg.runtime.engines.base import EngineInfo
from attnseg.runtime.errors import EngineError, TrainingError
from attnseg.runtime.executor import WindowOptions, sliding_window
from attnseg.trainer.config import Precision, TrainConfig
from attnseg.trainer.data import TrainingCase
from attnseg.trainer.devices import Devices
from attnseg.trainer.interrupt import Interrupt
from attnseg.trainer.loss import segmentation_loss
from attnseg.trainer.metrics import region_dice
from attnseg.trainer.networks import Network

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def mixed_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """Run the network in the configured precision."""
    half = _HALF.get(precision)
    with torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None):
        yield


class TorchEngine:
    """The network in PyTorch behind the runtime's engine contract, for validation."""

    def __init__(self, model: nn.Module, device: torch.device, precision: Precision) -> None:
        self._model = model
        self._device = device
        self._precision: Precision = precision
        self.info = EngineInfo("torch", torch.__version__, precision, str(device))

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `attnseg.runtime.engines.base.Engine.infer`."""
        images = torch.from_numpy(batch).to(self._device)
        images = images.contiguous(memory_format=torch.channels_last_3d)
        with torch.inference_mode(), mixed_precision(self._precision, self._device):
            logits: Tensor = self._model(images)
        return np.asarray(logits.float().cpu().contiguous().numpy())


def validate(
    model: Network,
    cases: Sequence[TrainingCase],
    config: TrainConfig,
    devices: Devices,
    regions: Mapping[str, Sequence[int]],
    interrupt: Interrupt,
) -> dict[str, float]:
    """Mean loss and Dice per region over whole cases, by the runtime's sliding window.

    Several processes share the cases; each returns the mean over all.

    Raises:
        TrainingError: the network's output for a case is not finite.
        KeyboardInterrupt: the run was asked to stop, and is one process.
    """
    model.eval()
    engine = TorchEngine(model, devices.device, config.precision)
    window = (config.patch, config.patch, config.patch)
    options = WindowOptions(window, config.overlap, config.network.stride)
    rows = []
    for case in cases[devices.rank :: devices.count]:
        try:
            logits = sliding_window(case.image.astype(np.float32), engine, options)
        except EngineError as error:
            raise TrainingError(
                f"case {case.name}: validation gave numbers that are not finite in "
                f"{config.precision}; lower the learning rate or set precision=fp32"
            ) from error
        classes = np.asarray(case.classes)
        loss = segmentation_loss(
            torch.from_numpy(logits)[None],
            torch.from_numpy(classes.astype(np.int64))[None],
            config.cross_entropy_weight,
            config.dice_epsilon,
        )
        dice = region_dice(logits.argmax(axis=0), classes, regions)
        rows.append((case.name, {"loss": float(loss), **dice}))
        if interrupt.asked and devices.count == 1:  # several have to meet again first
            raise KeyboardInterrupt
    every = sorted(row for part in devices.gather(rows) for row in part)
    return {name: float(np.mean([row[name] for _, row in every])) for name in every[0][1]}
