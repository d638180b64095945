"""Training loop: one run from its first step to its last, resumable at any step."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from attnseg.runtime.errors import Setting, TrainingError, TrainingSetting
from attnseg.runtime.files import remove_partial
from attnseg.trainer.augment import augment, margin_voxels
from attnseg.trainer.cases import check_phantoms, new_preparation, prepare_cases
from attnseg.trainer.checkpoint import (
    checkpoint_config,
    checkpoint_preparation,
    initial_weights,
    save_checkpoint,
)
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.data import BatchFeed, PatchSampler, TrainingCase
from attnseg.trainer.data_set import DataSet
from attnseg.trainer.devices import Devices, open_devices
from attnseg.trainer.engine import mixed_precision
from attnseg.trainer.interrupt import Interrupt, noted_interrupts
from attnseg.trainer.logs import CURVES, EVENTS, LOG, cut_log, draw_log, log_epoch
from attnseg.trainer.loss import loss_regions, segmentation_loss
from attnseg.trainer.networks import count_parameters, empty_network
from attnseg.trainer.progress import shown_progress
from attnseg.trainer.run import (
    Run,
    new_run,
    set_cosine_rate,
    start_from,
    steps_per_epoch,
    update_average,
)
from attnseg.trainer.validate import validate

CACHE = "cache"
_LOCK = ".lock"
log = logging.getLogger(__name__)


def _agree(run: Run, loss: float, stop: bool) -> tuple[float, bool]:
    """Return the mean loss over all processes, and whether any was requested to stop."""
    if run.devices.count == 1:
        return loss, stop
    values = torch.tensor([loss, float(stop)], dtype=torch.float64, device=run.devices.device)
    distributed.all_reduce(values)
    return float(values[0]) / run.devices.count, bool(values[1] > 0)


def _train_step(run: Run, network: nn.Module, feed: BatchFeed, interrupt: Interrupt) -> bool:
    """Train on one batch, append the loss to `run.losses`, and return whether to stop."""
    config, device = run.config, run.devices.device
    batch = feed.take()
    images, labels = batch.images.to(device), batch.labels.to(device)
    images, labels = augment(images, labels, config, run.generator)
    images = images.contiguous(memory_format=torch.channels_last_3d)

    network.train()
    with mixed_precision(config.precision, device):
        logits = network(images)
    regions = loss_regions(config, run.preparation.task.class_regions)
    weight, epsilon = config.cross_entropy_weight, config.dice_epsilon
    loss = segmentation_loss(logits, labels, weight, epsilon, regions)
    own = loss.item()
    value, stop = _agree(run, own, interrupt.asked)
    if not math.isfinite(value):
        where = "on patches of " + ", ".join(dict.fromkeys(batch.names))
        raise TrainingError(
            f"the loss became {value} {where if not math.isfinite(own) else 'in another process'}",
            "lower the learning rate, give {}, or check these cases",
            TrainingSetting("clip_norm", 1),
        )
    run.optimiser.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    if config.clip_norm:
        run.scaler.unscale_(run.optimiser)
        nn.utils.clip_grad_norm_(run.model.parameters(), config.clip_norm)
    set_cosine_rate(run)
    run.scaler.step(run.optimiser)
    run.scaler.update()
    update_average(run)
    run.losses.append(value)
    return stop


def _save(run: Run, files: Sequence[Path], feed: BatchFeed) -> None:
    state = run.state(feed.state)
    if run.devices.first:
        for file in files:
            save_checkpoint(file, state)


def _train_epoch(run: Run, network: nn.Module, feed: BatchFeed, interrupt: Interrupt) -> bool:
    """Run the remaining steps of the epoch, and return whether a stop was requested."""
    stop = False
    with shown_progress(_epoch_title(run), run.steps_per_epoch, len(run.losses)) as advance:
        while len(run.losses) < run.steps_per_epoch and not stop:
            stop = _train_step(run, network, feed, interrupt)
            advance(f"loss {run.losses[-1]:.3f}")
    return stop


def _epoch_title(run: Run) -> str:
    return f"epoch {run.epoch + 1} of {run.config.epochs}"


def _finish_epoch(run: Run, output: Path, feed: BatchFeed, validation: dict[str, float]) -> None:
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
    score = float(np.mean([validation[region] for region in run.preparation.task.task.regions]))
    improved = score > run.best
    run.best = max(run.best, score)
    if run.devices.first:
        log_epoch(output, row)
    # last.pt is written last: a run that stops before that repeats the validation.
    _save(run, [output / "best.pt", output / "last.pt"][0 if improved else 1 :], feed)


def _check_patch(config: TrainConfig, device: torch.device) -> None:
    # oneDNN's bfloat16 weight gradient of such convolutions is noise (observed in torch 2.13).
    network = config.network
    two_left = network.architecture != "deepmedic" and config.patch // network.stride == 2
    if device.type == "cpu" and config.precision == "bf16" and two_left:
        raise TrainingError(
            f"patches of {config.patch} leave 2 voxels at the bottom of the network, where PyTorch "
            "computes wrong gradients in bf16 on a CPU",
            "give {} or a larger patch",
            TrainingSetting("precision", "fp32"),
        )


def _run_for(
    data: DataSet,
    config: TrainConfig,
    stored: dict[str, Any] | None,
    devices: Devices,
    cache: Path,
) -> tuple[Run, list[TrainingCase], list[TrainingCase]]:
    """Return the run, new or restored, its training cases and its validation cases."""
    if stored:
        preparation = checkpoint_preparation(stored)
    else:
        preparation = new_preparation(data, config, devices)
    training, validation = prepare_cases(data, preparation, config, cache, devices)
    steps = steps_per_epoch(config, len(training), devices)
    run = new_run(config, data, preparation, devices, steps)
    if stored:
        run.restore(stored)
    return run, training, validation


def train(
    data: DataSet,
    config: TrainConfig,
    output: Path,
    stored: dict[str, Any] | None = None,
    initial: Path | None = None,
    cache: Path | None = None,
) -> Path:
    """Train a network.

    Under `torchrun` every process makes the same call and draws its own `batch_size` patches.

    Args:
        data: Cases and their split.
        config: Settings of the run; channels and classes of the network are set by the task.
        output: Folder for `last.pt`, `best.pt`, `log.csv`, `curves.png` and the TensorBoard
            events.
        stored: Checkpoint in `output` to resume from, as `load_run` returns it; its
            configuration and split replace `config` and the split of `data`. None for a new run.
        initial: Checkpoint or `weights.safetensors` to start from instead of random weights.
        cache: Folder for prepared cases, which several runs may share; None for one in `output`.

    Returns:
        File of the checkpoint with the highest mean Dice over regions on the validation part.

    Raises:
        TrainingError: `output` holds another run or other files, a case is not usable, the loss
            is not finite, `initial` does not fit the network, or a checkpoint cannot be written.
        KeyboardInterrupt: The run was stopped by Ctrl-C or SIGTERM, after saving a checkpoint
            to resume from.
    """
    if stored:
        config, data = checkpoint_config(stored), data.with_split(stored["split"])
    else:
        _check_free(output)
    task = data.task.task
    network = replace(config.network, in_channels=len(task.channels), classes=len(task.labels))
    config = replace(config, network=network)
    check_phantoms(config, data)
    weights = initial_weights(initial, empty_network(network)) if initial else None
    torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
    with open_devices() as devices, _run_folder(output, devices):
        _check_patch(config, devices.device)
        run, training, validation = _run_for(data, config, stored, devices, cache or output / CACHE)
        if devices.first:
            log.info(_announcement(run, training, validation))
        if devices.first:
            cut_log(output, run.epoch)
        if weights and not stored:
            start_from(run, weights)
        feed = _open_feed(run, training)
        with noted_interrupts() as interrupt:
            _train_epochs(run, feed, validation, output, interrupt)
    return output / "best.pt"


def _check_free(output: Path) -> None:
    """Raise `TrainingError` for a folder that holds a run, or anything that is not of a run."""
    if any((output / name).exists() for name in ("last.pt", "best.pt")):
        raise TrainingError(
            f"{output}: holds a run already",
            "give {} or choose another folder",
            Setting("resume", True),
        )
    refuse_other_files(output, (CACHE, LOG, CURVES, EVENTS))


def refuse_other_files(folder: Path, own: Collection[str]) -> None:
    """Raise `TrainingError` for a folder with anything besides `own` names and hidden files."""
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in names if name not in own and not name.startswith(".")]
    if others:
        raise TrainingError(
            f"{folder}: is not empty, and {others[0]} in it is of no run",
            "choose an empty or a new folder",
        )


@contextmanager
def _run_folder(output: Path, devices: Devices) -> Iterator[None]:
    """Create and lock the folder of a run; remove it again if it stays empty."""
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / _LOCK, timeout=0)
    try:
        with devices.together():
            try:
                if devices.first:
                    lock.acquire()
                    remove_partial(output)  # of a run that was killed
            except Timeout as error:
                raise TrainingError(
                    f"{output}: is being trained by another process",
                    "wait for it, or choose another folder",
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
    run: Run, training: Sequence[TrainingCase], validation: Sequence[TrainingCase]
) -> str:
    config, millions = run.config, count_parameters(run.model) / 1e6
    plan = f"{config.epochs} epochs of {run.steps_per_epoch} steps"
    if run.epoch >= config.epochs:
        plan = f"all {config.epochs} epochs are done; to train on, start a new run from best.pt"
    elif run.step:
        plan += f", of which {run.step} steps are done"
    return (
        f"{len(training)} training and {len(validation)} validation cases, {millions:.2f} M "
        f"parameters, {run.devices.name}: {plan}"
    )


def _open_feed(run: Run, training: Sequence[TrainingCase]) -> BatchFeed:
    """Return the source of training patches, after a search of each class's voxels."""
    config = run.config
    patch = config.patch + 2 * margin_voxels(config)
    with shown_progress("locating the labels", len(training)) as advance:
        sampler = PatchSampler(
            training,
            patch,
            config.tumour_share,
            config.network.classes,
            progress=advance,
            half_resolution_share=config.half_resolution_share,
        )
    return BatchFeed(sampler, config.batch_size, run.rng)


def _validate(
    run: Run, validation: Sequence[TrainingCase], interrupt: Interrupt
) -> dict[str, float]:
    devices = run.devices
    own = len(range(devices.rank, len(validation), devices.count))
    with shown_progress(f"validation of {_epoch_title(run)}", own) as advance:
        return validate(
            run.deployed,
            validation,
            run.config,
            devices=devices,
            regions=run.preparation.task.class_regions,
            interrupt=interrupt,
            progress=advance,
        )


def _train_epochs(
    run: Run,
    feed: BatchFeed,
    validation: Sequence[TrainingCase],
    output: Path,
    interrupt: Interrupt,
) -> None:
    config, devices = run.config, run.devices
    network: nn.Module = run.model
    if devices.count > 1:
        network = DistributedDataParallel(run.model)
    try:
        while run.epoch < config.epochs:
            with _counted_seconds(run):
                stop = _train_epoch(run, network, feed, interrupt)
            _save(run, [output / "last.pt"], feed)  # before the validation, which may fail
            if stop:
                raise KeyboardInterrupt
            _share_weights(run)
            with _counted_seconds(run):
                scores = _validate(run, validation, interrupt)
            _finish_epoch(run, output, feed, scores)
            if any(devices.gather(interrupt.asked)) and run.epoch < config.epochs:
                raise KeyboardInterrupt
    finally:
        feed.close()
        del network  # held by a traceback, it would outlive its process group and hang
        if devices.first and (output / LOG).exists():
            draw_log(output)


@contextmanager
def _counted_seconds(run: Run) -> Iterator[None]:
    began = time.perf_counter()
    yield
    run.epoch_seconds += time.perf_counter() - began


def _share_weights(run: Run) -> None:
    """Copy rank 0's weights to every process: batch norm statistics differ between them."""
    if run.devices.count > 1:
        for value in run.deployed.state_dict().values():
            distributed.broadcast(value, 0)
