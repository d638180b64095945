"""State of a training run, complete enough to resume as if it had never stopped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnseg.runtime.errors import TrainingError
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.data_set import DataSet
from attnseg.trainer.devices import Devices
from attnseg.trainer.networks import Network, build_network
from attnseg.trainer.preparation import Preparation


@dataclass
class Run:
    """A training run in progress, with everything that a checkpoint stores."""

    config: TrainConfig
    data: DataSet
    preparation: Preparation
    devices: Devices
    model: Network
    average: Network | None
    optimiser: torch.optim.Adam
    scheduler: torch.optim.lr_scheduler.ReduceLROnPlateau
    scaler: torch.amp.GradScaler
    rng: np.random.Generator
    generator: torch.Generator
    steps_per_epoch: int
    epoch: int = 0
    losses: list[float] = field(default_factory=list)  # one per step of the current epoch
    best: float = -1.0
    validation: dict[str, float] | None = None
    seconds: float = 0.0  # duration of the finished epochs
    epoch_seconds: float = 0.0

    def state(self, rng_state: Any) -> dict[str, Any]:
        """Return the state to save. Must be called in every process: random states are gathered."""
        return {
            "config": self.config.to_dict(),
            "data": self.data.name,
            **self.preparation.to_dict(),
            "split": self.data.split,
            "device": self.devices.name,
            "model": self.model.state_dict(),
            "average": self.average and self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": self.devices.gather((rng_state, self.generator.get_state())),
            "epoch": self.epoch,
            "losses": self.losses,
            "best": self.best,
            "validation": None if self.losses else self.validation,  # of these weights
            "seconds": self.seconds,
            "epoch_seconds": self.epoch_seconds,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state` returned.

        Raises:
            TrainingError: The state does not fit this run.
        """
        count = len(state.get("random", ()))
        if count and count != self.devices.count:
            raise TrainingError(
                f"last.pt: was trained by {count} processes, not {self.devices.count}",
                "resume it with the same number of processes",
            )
        try:
            self._restore(state)
        except Exception as error:  # PyTorch and numpy raise any type for the state of another run
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise TrainingError(
                f"last.pt: does not fit its own configuration ({reason})"
            ) from error

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(_optimiser_state(self.optimiser, state["optimiser"]))
        self.scheduler.load_state_dict(_plain_state(self.scheduler, state["scheduler"]))
        self.scaler.load_state_dict(_plain_state(self.scaler, state["scaler"]))
        rng_state, generator_state = state["random"][self.devices.rank]
        self.rng.bit_generator.state = rng_state
        self.generator.set_state(generator_state)
        self.epoch, self.best = state["epoch"], state["best"]
        self.losses = list(state["losses"])
        self.validation = state["validation"]
        self.seconds, self.epoch_seconds = state["seconds"], state.get("epoch_seconds", 0.0)

    @property
    def deployed(self) -> Network:
        """Network whose weights are validated and exported."""
        return self.model if self.average is None else self.average

    @property
    def step(self) -> int:
        """Number of steps since the start of the run."""
        return self.epoch * self.steps_per_epoch + len(self.losses)


def _optimiser_state(optimiser: torch.optim.Adam, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Stored moments and learning rate; the other settings are those of the configuration.

    Raises:
        ValueError, KeyError, TypeError: A moment is not of the shape of its parameter.
    """
    (group,), (kept,) = optimiser.state_dict()["param_groups"], stored["param_groups"]
    (parameters,) = (own["params"] for own in optimiser.param_groups)
    for index, moments in stored["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[name].shape != parameters[index].shape:
                raise ValueError(f"{name} of parameter {index} is {tuple(moments[name].shape)}")
        moments["step"].item()
    return {"state": stored["state"], "param_groups": [{**group, "lr": float(kept["lr"])}]}


def _plain_state(owner: Any, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of `owner.state_dict()` as stored, each of the type of the owner's.

    Raises:
        TypeError: An entry is of another type.
    """
    state: dict[str, Any] = owner.state_dict()
    for name in state.keys() & stored.keys():
        number = isinstance(state[name], int | float)
        if not isinstance(stored[name], (int, float) if number else type(state[name])):
            raise TypeError(f"{name} is {stored[name]!r}")
        state[name] = stored[name]
    return state


def steps_per_epoch(config: TrainConfig, cases: int, devices: Devices) -> int:
    """Number of optimiser steps in an epoch over `cases` training cases."""
    return config.steps_per_epoch or math.ceil(cases / (config.batch_size * devices.count))


def _place(network: Network, device: torch.device) -> Network:
    placed: Network = network.to(device).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return placed


def new_run(
    config: TrainConfig, data: DataSet, preparation: Preparation, devices: Devices, steps: int
) -> Run:
    """Create a run before its first step, with random weights from the configured seed."""
    torch.manual_seed(config.seed)
    model = _place(build_network(config.network), devices.device)
    average = _place(build_network(config.network), devices.device) if config.ema_decay else None
    if average:
        average.load_state_dict(model.state_dict())
    kind = torch.optim.AdamW if config.optimiser == "adamw" else torch.optim.Adam
    optimiser = kind(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    return Run(
        config=config,
        data=data,
        preparation=preparation,
        devices=devices,
        model=model,
        average=average,
        optimiser=optimiser,
        scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimiser, factor=config.factor, patience=config.patience
        ),
        scaler=torch.amp.GradScaler(devices.device.type, enabled=config.precision == "fp16"),
        rng=np.random.default_rng([config.seed, devices.rank]),
        generator=torch.Generator().manual_seed(config.seed + devices.rank),
        steps_per_epoch=steps,
    )


def update_average(run: Run) -> None:
    """Move the average towards the model, faster in the first steps, while it is still short."""
    if run.average is None:
        return
    decay = min(run.config.ema_decay, (2 + run.step) / (11 + run.step))
    pairs = zip(run.average.state_dict().values(), run.model.state_dict().values(), strict=True)
    for kept, new in pairs:
        if kept.is_floating_point():
            kept.lerp_(new, 1 - decay)
        else:
            kept.copy_(new)


def set_cosine_rate(run: Run) -> None:
    """Set the learning rate of the next step if the schedule is `cosine`."""
    if run.config.schedule != "cosine":
        return
    share = run.step / (run.config.epochs * run.steps_per_epoch)
    for group in run.optimiser.param_groups:
        group["lr"] = run.config.learning_rate * (1 + math.cos(math.pi * share)) / 2


def start_from(run: Run, weights: Mapping[str, Tensor]) -> None:
    """Replace the initial weights."""
    run.model.load_state_dict(weights)
    if run.average is not None:
        run.average.load_state_dict(weights)
