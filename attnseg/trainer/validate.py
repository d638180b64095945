"""Validation on whole cases, by the runtime's sliding window with the network in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from attnseg.evaluation.metrics import region_dice
from attnseg.runtime.errors import EngineError, TrainingError, TrainingSetting
from attnseg.runtime.pipelines.sliding_window import sliding_window
from attnseg.runtime.steps.windows import WindowOptions
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.data import TrainingCase
from attnseg.trainer.devices import Devices
from attnseg.trainer.engine import TorchEngine
from attnseg.trainer.interrupt import Interrupt
from attnseg.trainer.loss import loss_regions, segmentation_loss
from attnseg.trainer.networks import Network


def validate(
    model: Network,
    cases: Sequence[TrainingCase],
    config: TrainConfig,
    *,
    devices: Devices,
    regions: Mapping[str, Sequence[int]],
    interrupt: Interrupt,
    progress: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """Compute the mean loss and the mean Dice per region over whole cases.

    Several processes share the cases; each returns the means over all of them.

    Args:
        model: Network to validate; it is set to evaluation mode.
        cases: Cases of the validation part.
        config: Configuration with the window, overlap, loss and precision.
        devices: Devices of the run.
        regions: Class indices of each region.
        interrupt: Record of requests to stop, which is looked at after every window.
        progress: Function called with the name of each case that is done.

    Returns:
        Mean `loss`, and the mean Dice under each region's name.

    Raises:
        TrainingError: The network's output for a case is not finite.
        KeyboardInterrupt: A stop was requested in any process.
    """
    model.eval()
    engine = TorchEngine(model, devices.device, config.precision)
    windows = WindowOptions((config.patch,) * 3, config.overlap, config.network.stride)
    rows: list[tuple[str, dict[str, float]]] = []

    def score(case: TrainingCase) -> None:
        logits = _logits(case, engine, windows, config, interrupt)
        rows.append((case.name, _scores(logits, case, config, regions)))
        if progress:
            progress(case.name)

    with suppress(_Stopped):  # raised only after every process has met here
        for case in cases[devices.rank :: devices.count]:
            score(case)
    if any(devices.gather(interrupt.asked)):
        raise KeyboardInterrupt
    every = sorted(row for part in devices.gather(rows) for row in part)
    return {name: float(np.mean([row[name] for _, row in every])) for name in every[0][1]}


class _Stopped(Exception):  # noqa: N818
    """A stop was requested."""


def _logits(
    case: TrainingCase,
    engine: TorchEngine,
    windows: WindowOptions,
    config: TrainConfig,
    interrupt: Interrupt,
) -> NDArray[np.float32]:
    """Logits `(K, X, Y, Z)` of a whole case; raises `_Stopped` between windows."""

    def look(_: float) -> None:
        if interrupt.asked:
            raise _Stopped

    try:
        plan = windows.plan(case.image.shape[1:])
        background = np.zeros(config.network.classes, np.float32)  # argmax gives class 0
        return sliding_window(case.image.astype(np.float32), engine, plan, background, look)
    except EngineError as error:
        raise TrainingError(
            f"case {case.name}: the logits of the validation are not finite in {config.precision}",
            "lower the learning rate, or set {}",
            TrainingSetting("precision", "fp32"),
        ) from error


def _scores(
    logits: NDArray[np.float32],
    case: TrainingCase,
    config: TrainConfig,
    regions: Mapping[str, Sequence[int]],
) -> dict[str, float]:
    """Loss, and Dice by region."""
    classes = np.asarray(case.classes)
    loss = segmentation_loss(
        torch.from_numpy(logits)[None],
        torch.from_numpy(classes.astype(np.int64))[None],
        config.cross_entropy_weight,
        config.dice_epsilon,
        loss_regions(config, regions),
    )
    return {"loss": float(loss), **region_dice(logits.argmax(axis=0), classes, regions)}
