"""The training loop: one run from its first step to its last, resumable at any step."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from attnseg.runtime.errors import TrainingError
from attnseg.trainer.augment import augment, margin_voxels
from attnseg.trainer.cases import DataSet, check_labels
from attnseg.trainer.checkpoint import (
    checkpoint_config,
    checkpoint_preparation,
    initial_weights,
    load_run,
    save_checkpoint,
)
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.data import (
    BatchFeed,
    PatchSampler,
    Preparation,
    TrainingCase,
    cached_case,
    learn_preparation,
    synthetic_cases,
)
from attnseg.trainer.devices import Devices, open_devices
from attnseg.trainer.interrupt import Interrupt, noted_interrupts
from attnseg.trainer.logs import LOG, cut_log, draw_log, log_epoch
from attnseg.trainer.loss import segmentation_loss
from attnseg.trainer.networks import Network, build_network, count_parameters
from attnseg.trainer.task import BRATS
from attnseg.trainer.validate import mixed_precision, validate

SYNTHETIC_SEED = 1000  # first seed of the phantoms mixed into training
CACHE = "cache"
_LOCK = ".lock"
log = logging.getLogger(__name__)


@dataclass
class _Run:
    """Everything that a checkpoint has to hold to go on as if nothing had happened."""

    config: TrainConfig
    data: DataSet
    preparation: Preparation
    devices: Devices
    model: Network
    average: Network | None
    optimiser: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.ReduceLROnPlateau
    scaler: torch.amp.GradScaler
    rng: np.random.Generator
    generator: torch.Generator
    steps_per_epoch: int
    epoch: int = 0
    losses: list[float] = field(default_factory=list)  # of the steps of the epoch so far
    best: float = -1.0
    validation: dict[str, float] | None = None
    seconds: float = 0.0  # of the epochs that are finished
    epoch_seconds: float = 0.0

    def state(self, rng_state: Any) -> dict[str, Any]:
        """What to save. Called in every process, as each has random states of its own."""
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
            "validation": None if self.losses else self.validation,  # of these very weights
            "seconds": self.seconds,
            "epoch_seconds": self.epoch_seconds,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raise `TrainingError` for a state that is not of such a run."""
        count = len(state.get("random", ()))
        if count and count != self.devices.count:
            raise TrainingError(
                f"last.pt: was trained by {count} processes, not {self.devices.count}; resume it "
                "with as many"
            )
        try:
            self._restore(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise TrainingError(f"last.pt: does not fit its own configuration ({error})") from error

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        rng_state, generator_state = state["random"][self.devices.rank]
        self.rng.bit_generator.state = rng_state
        self.generator.set_state(generator_state)
        self.epoch, self.best = state["epoch"], state["best"]
        self.losses = list(state["losses"])
        self.validation = state["validation"]
        self.seconds, self.epoch_seconds = state["seconds"], state.get("epoch_seconds", 0.0)

    @property
    def deployed(self) -> Network:
        """The weights that are validated and shipped."""
        return self.model if self.average is None else self.average

    @property
    def step(self) -> int:
        """Steps done since the start."""
        return self.epoch * self.steps_per_epoch + len(self.losses)


def _steps_per_epoch(config: TrainConfig, cases: int, devices: Devices) -> int:
    return config.steps_per_epoch or math.ceil(cases / (config.batch_size * devices.count))


def _place(network: Network, device: torch.device) -> Network:
    placed: Network = network.to(device).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return placed


def _start(
    config: TrainConfig, data: DataSet, preparation: Preparation, devices: Devices, steps: int
) -> _Run:
    torch.manual_seed(config.seed)
    model = _place(build_network(config.network), devices.device)
    average = _place(build_network(config.network), devices.device) if config.ema_decay else None
    if average:
        average.load_state_dict(model.state_dict())
    kind = torch.optim.AdamW if config.optimiser == "adamw" else torch.optim.Adam
    optimiser = kind(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    return _Run(
        config,
        data,
        preparation,
        devices,
        model,
        average,
        optimiser,
        torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimiser, factor=config.factor, patience=config.patience
        ),
        torch.amp.GradScaler(devices.device.type, enabled=config.precision == "fp16"),
        np.random.default_rng([config.seed, devices.rank]),
        torch.Generator().manual_seed(config.seed + devices.rank),
        steps,
    )


def _update_average(run: _Run) -> None:
    """Move the average towards the model; slower at first, as so few steps cannot fill it."""
    if run.average is None:
        return
    decay = min(run.config.ema_decay, (2 + run.step) / (11 + run.step))
    pairs = zip(run.average.state_dict().values(), run.model.state_dict().values(), strict=True)
    for kept, new in pairs:
        if kept.is_floating_point():
            kept.lerp_(new, 1 - decay)
        else:
            kept.copy_(new)


def _set_cosine_rate(run: _Run) -> None:
    if run.config.schedule != "cosine":
        return
    share = run.step / (run.config.epochs * run.steps_per_epoch)
    for group in run.optimiser.param_groups:
        group["lr"] = run.config.learning_rate * (1 + math.cos(math.pi * share)) / 2


def _agree(run: _Run, loss: float, stop: bool) -> tuple[float, bool]:
    """The mean loss over all processes, and whether one of them was asked to stop."""
    if run.devices.count == 1:
        return loss, stop
    values = torch.tensor([loss, float(stop)], dtype=torch.float64, device=run.devices.device)
    distributed.all_reduce(values)
    return float(values[0]) / run.devices.count, bool(values[1] > 0)


def _train_step(run: _Run, network: nn.Module, feed: BatchFeed, interrupt: Interrupt) -> bool:
    """One batch, one optimiser step; whether to stop after it. The loss goes to `run.losses`."""
    config, device = run.config, run.devices.device
    batch = feed.take()
    images, labels = batch.images.to(device), batch.labels.to(device)
    images, labels = augment(images, labels, config, run.generator)
    images = images.contiguous(memory_format=torch.channels_last_3d)

    network.train()
    with mixed_precision(config.precision, device):
        logits = network(images)
    loss = segmentation_loss(logits, labels, config.cross_entropy_weight, config.dice_epsilon)
    own = loss.item()
    value, stop = _agree(run, own, interrupt.asked)
    if not math.isfinite(value):
        where = "on patches of " + ", ".join(dict.fromkeys(batch.names))
        raise TrainingError(
            f"the loss became {value} {where if not math.isfinite(own) else 'in another process'}; "
            "lower the learning rate, set clip_norm=1, or check these cases"
        )
    run.optimiser.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    if config.clip_norm:
        run.scaler.unscale_(run.optimiser)
        nn.utils.clip_grad_norm_(run.model.parameters(), config.clip_norm)
    _set_cosine_rate(run)
    run.scaler.step(run.optimiser)
    run.scaler.update()
    _update_average(run)
    run.losses.append(value)
    return stop


def _progress_bar(devices: Devices) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        disable=not (devices.first and sys.stdout.isatty()),
    )


def _save(run: _Run, files: Sequence[Path], feed: BatchFeed) -> None:
    state = run.state(feed.state)
    if run.devices.first:
        for file in files:
            save_checkpoint(file, state)


def _train_epoch(run: _Run, network: nn.Module, feed: BatchFeed, interrupt: Interrupt) -> bool:
    """The steps left of the epoch; whether the run was asked to stop after one of them."""
    stop = False
    with _progress_bar(run.devices) as bar:
        title = f"epoch {run.epoch + 1}/{run.config.epochs}"
        task = bar.add_task(title, total=run.steps_per_epoch, completed=len(run.losses))
        while len(run.losses) < run.steps_per_epoch and not stop:
            stop = _train_step(run, network, feed, interrupt)
            bar.update(task, advance=1)
    return stop


def _finish_epoch(run: _Run, output: Path, feed: BatchFeed, validation: dict[str, float]) -> None:
    """Step the schedule, log the epoch, write `best.pt` if it is the best, and `last.pt`."""
    row = {
        "epoch": run.epoch + 1,
        "train_loss": round(float(np.mean(run.losses)), 5),
        **{f"validation_{k}": round(v, 5) for k, v in validation.items()},
        "learning_rate": run.optimiser.param_groups[0]["lr"],
        "seconds": round(run.epoch_seconds, 1),
    }
    if run.config.schedule == "plateau":
        run.scheduler.step(validation["loss"])
    run.epoch, run.losses = run.epoch + 1, []
    run.seconds, run.epoch_seconds = run.seconds + run.epoch_seconds, 0.0
    run.validation = validation
    score = float(np.mean([validation[region] for region in run.preparation.task.regions]))
    improved = score > run.best
    run.best = max(run.best, score)
    if run.devices.first:
        log_epoch(output, row)
    # last.pt comes last: a run that stops before it takes the validation again.
    _save(run, [output / "best.pt", output / "last.pt"][0 if improved else 1 :], feed)


def _training_cases(
    data: DataSet,
    preparation: Preparation,
    config: TrainConfig,
    cache: Path,
    devices: Devices | None = None,
) -> tuple[list[TrainingCase], list[TrainingCase]]:
    """Prepared cases of the training part, with the phantoms, and of the validation part.

    With `devices`, only the share of this process.
    """
    phantoms = synthetic_cases(config.synthetic_cases, SYNTHETIC_SEED, cache / "synthetic")
    training, validation = (
        [
            cached_case(case, preparation, cache)
            for case in (cases[devices.rank :: devices.count] if devices else cases)
        ]
        for cases in ([*data.part("train"), *phantoms], data.part("validation"))
    )
    return training, validation


def _check_patch(config: TrainConfig, device: torch.device) -> None:
    # oneDNN's weight gradient of such convolutions in bfloat16 is noise (seen in torch 2.13).
    network = config.network
    two_left = network.architecture != "deepmedic" and config.patch // network.stride == 2
    if device.type == "cpu" and config.precision == "bf16" and two_left:
        raise TrainingError(
            f"patches of {config.patch} leave 2 voxels at the bottom of the network, where PyTorch "
            "computes wrong gradients in bf16 on a CPU; set precision=fp32 or a larger patch"
        )


def _check_phantoms(config: TrainConfig, data: DataSet) -> None:
    if config.synthetic_cases and data.task.channels != BRATS.channels:
        raise TrainingError(
            f"{data.name}: synthetic_cases are brain scans, which this task does not take; leave "
            "them out"
        )


def _run_for(
    data: DataSet,
    config: TrainConfig,
    stored: dict[str, Any] | None,
    devices: Devices,
    cache: Path,
) -> tuple[_Run, list[TrainingCase], list[TrainingCase]]:
    """The run as it starts or goes on, its training cases and its validation cases."""
    with devices.together():
        if stored:
            preparation = checkpoint_preparation(stored)
        else:
            cases = [case for part in data.split for case in data.part(part)]
            check_labels(cases[devices.rank :: devices.count], data.task)
            preparation = learn_preparation(data.part("train"), data.task, config)
        if devices.first:
            synthetic_cases(config.synthetic_cases, SYNTHETIC_SEED, cache / "synthetic")
    with devices.together():  # each prepares a share, then all read the whole
        _training_cases(data, preparation, config, cache, devices)
    training, validation = _training_cases(data, preparation, config, cache)
    steps = _steps_per_epoch(config, len(training), devices)
    run = _start(config, data, preparation, devices, steps)
    if stored:
        run.restore(stored)
    return run, training, validation


def train(
    data: DataSet,
    config: TrainConfig,
    output: Path,
    resume: bool = False,
    initial: Path | None = None,
    cache: Path | None = None,
) -> Path:
    """Train a network.

    Under `torchrun` every process calls this alike; the batch is then `batch_size` each.

    Args:
        data: cases and their split.
        config: every setting; channels and classes of the network are set by the task.
        output: folder for `last.pt`, `best.pt`, `log.csv`, `curves.png` and the events for
            TensorBoard.
        resume: go on from `last.pt`, with the configuration, split and random state in it.
        initial: checkpoint or `weights.safetensors` to start from instead of random weights.
        cache: folder for prepared cases, which several runs may share; None for one in `output`.

    Returns:
        The file of the best checkpoint, by mean Dice over the regions on the validation part.

    Raises:
        TrainingError: `output` holds another run, a case cannot be used, the loss is not
            finite, `initial` is of another network, or a checkpoint cannot be written.
        KeyboardInterrupt: the run was asked to stop, by Ctrl-C or SIGTERM; it was saved, so
            that `resume` goes on with the next step.
    """
    if not resume and any((output / name).exists() for name in ("last.pt", "best.pt")):
        raise TrainingError(f"{output}: holds a run already; add --resume or choose another folder")
    stored = load_run(output) if resume else None
    if stored:
        config, data = checkpoint_config(stored), data.with_split(stored["split"])
    task = data.task
    network = replace(config.network, in_channels=len(task.channels), classes=len(task.labels))
    config = replace(config, network=network)
    _check_phantoms(config, data)
    weights = initial_weights(initial, build_network(network)) if initial else None
    torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
    with open_devices() as devices, _run_folder(output, devices):
        _check_patch(config, devices.device)
        run, training, validation = _run_for(data, config, stored, devices, cache or output / CACHE)
        if devices.first:
            log.info(_announcement(run, training, validation))
        if devices.first:
            cut_log(output, run.epoch)
        if weights and not stored:
            _start_from(run, weights)
        with noted_interrupts() as interrupt:
            _train_epochs(run, training, validation, output, interrupt)
    return output / "best.pt"


@contextmanager
def _run_folder(output: Path, devices: Devices) -> Iterator[None]:
    """The folder of a run, for this run alone; gone again if it stays empty."""
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / _LOCK, timeout=0)
    try:
        with devices.together():
            try:
                if devices.first:
                    lock.acquire()
            except Timeout as error:
                raise TrainingError(
                    f"{output}: is being trained by another process; wait for it, or choose "
                    "another folder"
                ) from error
        yield
    finally:
        if lock.is_locked:
            lock.release()
            (output / _LOCK).unlink(missing_ok=True)
        for folder in (output / CACHE, output):
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _announcement(
    run: _Run, training: Sequence[TrainingCase], validation: Sequence[TrainingCase]
) -> str:
    config, millions = run.config, count_parameters(run.model) / 1e6
    plan = f"{config.epochs} epochs of {run.steps_per_epoch} steps"
    if run.epoch >= config.epochs:
        plan = f"all {config.epochs} epochs are done; to train on, start a new run with --init"
    elif run.step:
        plan += f", of which {run.step} steps are done"
    return (
        f"{len(training)} training and {len(validation)} validation cases, {millions:.2f} M "
        f"parameters, {run.devices.name}: {plan}"
    )


def _start_from(run: _Run, weights: Mapping[str, Tensor]) -> None:
    run.model.load_state_dict(weights)
    if run.average is not None:
        run.average.load_state_dict(weights)


def _train_epochs(
    run: _Run,
    training: Sequence[TrainingCase],
    validation: Sequence[TrainingCase],
    output: Path,
    interrupt: Interrupt,
) -> None:
    config, devices = run.config, run.devices
    network: nn.Module = run.model
    if devices.count > 1:
        network = DistributedDataParallel(run.model)
    patch = config.patch + 2 * margin_voxels(config)
    sampler = PatchSampler(training, patch, config.tumour_share, config.network.classes)
    feed = BatchFeed(sampler, config.batch_size, run.rng)
    regions = run.preparation.task.class_regions
    try:
        while run.epoch < config.epochs:
            with _counted_seconds(run):
                stop = _train_epoch(run, network, feed, interrupt)
            _save(run, [output / "last.pt"], feed)  # whatever happens in the validation
            if stop:
                raise KeyboardInterrupt
            _share_weights(run)
            with _counted_seconds(run):
                scores = validate(run.deployed, validation, config, devices, regions, interrupt)
            _finish_epoch(run, output, feed, scores)
            if any(devices.gather(interrupt.asked)) and run.epoch < config.epochs:
                raise KeyboardInterrupt
    finally:
        feed.close()
        del network  # a traceback would keep it beyond the group it belongs to, and hang
        if devices.first and (output / LOG).exists():
            draw_log(output)


@contextmanager
def _counted_seconds(run: _Run) -> Iterator[None]:
    began = time.perf_counter()
    yield
    run.epoch_seconds += time.perf_counter() - began


def _share_weights(run: _Run) -> None:
    """Give every process the first one's weights; batch norms count their own batches."""
    if run.devices.count > 1:
        for value in run.deployed.state_dict().values():
            distributed.broadcast(value, 0)
