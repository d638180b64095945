"""The training loop: one run from its first step to its last, resumable at any epoch."""

from __future__ import annotations

import csv
import logging
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from attnseg.runtime.engines.base import EngineInfo
from attnseg.runtime.errors import TrainingError
from attnseg.runtime.executor import WindowOptions, sliding_window
from attnseg.runtime.normalise import Normalisation
from attnseg.trainer.augment import augment, margin_voxels
from attnseg.trainer.checkpoint import (
    checkpoint_config,
    checkpoint_normalisation,
    load_run,
    save_checkpoint,
)
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.data import (
    DataSet,
    PatchSampler,
    TrainingCase,
    cached_case,
    learn_landmarks,
    synthetic_cases,
)
from attnseg.trainer.loss import segmentation_loss
from attnseg.trainer.metrics import region_dice
from attnseg.trainer.model import AttentionResNetUNet
from attnseg.trainer.task import BRATS

log = logging.getLogger(__name__)

SYNTHETIC_SEED = 1000  # first seed of the phantoms mixed into training


class TorchEngine:
    """The network in PyTorch behind the runtime's engine contract, for validation."""

    def __init__(self, model: nn.Module, device: torch.device, precision: str) -> None:
        self._model = model
        self._device = device
        self._bf16 = precision == "bf16"
        self.info = EngineInfo("torch", torch.__version__, precision, str(device))

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `attnseg.runtime.engines.base.Engine.infer`."""
        images = torch.from_numpy(batch).to(self._device)
        images = images.contiguous(memory_format=torch.channels_last_3d)
        with (
            torch.inference_mode(),
            torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16),
        ):
            logits: Tensor = self._model(images)
        return np.asarray(logits.float().cpu().contiguous().numpy())


@dataclass
class _Run:
    """Everything that a checkpoint has to hold to go on as if nothing had happened."""

    config: TrainConfig
    data: str
    split: dict[str, list[str]]
    normalisation: Normalisation
    device: torch.device
    model: AttentionResNetUNet
    average: AttentionResNetUNet | None
    optimiser: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    rng: np.random.Generator
    generator: torch.Generator
    epoch: int = 0
    best: float = -1.0
    validation: dict[str, float] | None = None
    seconds: float = 0.0

    def state(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "data": self.data,
            "split": self.split,
            "normalisation": asdict(self.normalisation),
            "device": _device_name(self.device),
            "model": self.model.state_dict(),
            "average": self.average and self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": self.rng.bit_generator.state,
            "generator": self.generator.get_state(),
            "epoch": self.epoch,
            "best": self.best,
            "validation": self.validation,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Raise `TrainingError` for a state that is not of such a run."""
        try:
            self._restore(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise TrainingError(f"last.pt: does not fit its own configuration ({error})") from error

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.rng.bit_generator.state = state["rng"]
        self.generator.set_state(state["generator"])
        self.epoch, self.best = state["epoch"], state["best"]
        self.validation, self.seconds = state["validation"], state["seconds"]

    @property
    def deployed(self) -> AttentionResNetUNet:
        """The weights that are validated and shipped."""
        return self.model if self.average is None else self.average


def _steps_per_epoch(config: TrainConfig, cases: int) -> int:
    return config.steps_per_epoch or math.ceil(cases / config.batch_size)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _start(config: TrainConfig, data: DataSet, normalisation: Normalisation, steps: int) -> _Run:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    model = AttentionResNetUNet(config.network)
    model.to(device).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    average = None
    if config.ema_decay:
        average = AttentionResNetUNet(config.network)
        average.to(device).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        average.load_state_dict(model.state_dict())
    optimiser = torch.optim.Adam(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    scheduler: torch.optim.lr_scheduler.LRScheduler
    if config.schedule == "plateau":
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimiser, factor=config.factor, patience=config.patience
        )
    else:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.epochs * steps)
    rng = np.random.default_rng(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    return _Run(
        config,
        data.name,
        data.split,
        normalisation,
        device,
        model,
        average,
        optimiser,
        scheduler,
        rng,
        generator,
    )


def _update_average(run: _Run) -> None:
    """Move the average towards the model; slower at first, as so few steps cannot fill it."""
    if run.average is None:
        return
    steps = next(iter(run.optimiser.state.values()))["step"].item()
    decay = min(run.config.ema_decay, (1 + steps) / (10 + steps))
    pairs = zip(run.average.state_dict().values(), run.model.state_dict().values(), strict=True)
    for kept, new in pairs:
        if kept.is_floating_point():
            kept.lerp_(new, 1 - decay)
        else:
            kept.copy_(new)


def _train_step(run: _Run, sampler: PatchSampler) -> float:
    """Draw a batch, augment, one optimiser step; returns the loss."""
    config, device = run.config, run.device
    patches = [sampler.draw(run.rng) for _ in range(config.batch_size)]
    images = torch.stack([p[1] for p in patches]).to(device)
    labels = torch.stack([p[2] for p in patches]).to(device)
    images, labels = augment(images, labels, config, run.generator)
    images = images.contiguous(memory_format=torch.channels_last_3d)

    run.model.train()
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        logits = run.model(images)
    loss = segmentation_loss(logits, labels, config.cross_entropy_weight, config.dice_epsilon)
    value = loss.item()
    if not math.isfinite(value):
        names = ", ".join(p[0] for p in patches)
        raise TrainingError(
            f"the loss became {value} on patches of {names}; lower the learning rate or check "
            "these cases"
        )
    run.optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    run.optimiser.step()
    if run.config.schedule == "cosine":
        run.scheduler.step()
    _update_average(run)
    return value


def validate(
    model: AttentionResNetUNet,
    cases: Sequence[TrainingCase],
    config: TrainConfig,
    device: torch.device,
) -> dict[str, float]:
    """Mean loss and Dice per region over whole cases, by the runtime's sliding window."""
    model.eval()
    engine = TorchEngine(model, device, config.precision)
    window = (config.patch, config.patch, config.patch)
    options = WindowOptions(window, config.overlap, config.network.stride)
    rows = []
    for case in cases:
        logits = sliding_window(case.image.astype(np.float32), engine, options)
        classes = np.asarray(case.classes)
        loss = segmentation_loss(
            torch.from_numpy(logits)[None],
            torch.from_numpy(classes.astype(np.int64))[None],
            config.cross_entropy_weight,
            config.dice_epsilon,
        )
        dice = region_dice(logits.argmax(axis=0), classes, BRATS.class_regions)
        rows.append({"loss": float(loss), **dice})
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _append_log(path: Path, row: dict[str, Any]) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def _cut_log(path: Path, epochs: int) -> None:
    """Drop the rows after `epochs`: of an epoch whose checkpoint was never finished."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[: epochs + 1]), encoding="utf-8")


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )


def _train_epoch(run: _Run, sampler: PatchSampler, steps: int) -> float:
    losses = []
    with _progress_bar() as bar:
        task = bar.add_task(f"epoch {run.epoch + 1}/{run.config.epochs}", total=steps)
        for _ in range(steps):
            losses.append(_train_step(run, sampler))
            bar.update(task, advance=1)
    return float(np.mean(losses))


def _finish_epoch(
    run: _Run,
    output: Path,
    train_loss: float,
    validation: dict[str, float],
    seconds: float,
) -> None:
    """Step the schedule, log the epoch, write `best.pt` if it is the best, and `last.pt`."""
    if isinstance(run.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        run.scheduler.step(validation["loss"])
    run.epoch += 1
    run.seconds += seconds
    run.validation = validation
    score = float(np.mean([validation[region] for region in BRATS.class_regions]))
    improved = score > run.best
    run.best = max(run.best, score)
    row = {
        "epoch": run.epoch,
        "train_loss": round(train_loss, 5),
        **{f"validation_{k}": round(v, 5) for k, v in validation.items()},
        "learning_rate": run.optimiser.param_groups[0]["lr"],
        "seconds": round(seconds, 1),
    }
    # last.pt comes last: a run that stops before it takes the whole epoch again.
    _append_log(output / "log.csv", row)
    log.info("%s", "  ".join(f"{k} {v}" for k, v in row.items()))
    if improved:
        save_checkpoint(output / "best.pt", run.state())
    save_checkpoint(output / "last.pt", run.state())


def _training_cases(
    data: DataSet, normalisation: Normalisation, config: TrainConfig, cache: Path
) -> tuple[list[TrainingCase], list[TrainingCase]]:
    """Prepared cases of the training part, with the phantoms, and of the validation part."""
    phantoms = synthetic_cases(config.synthetic_cases, SYNTHETIC_SEED, cache / "synthetic")
    training = [*data.part("train"), *phantoms]
    return (
        [cached_case(case, normalisation, cache) for case in training],
        [cached_case(case, normalisation, cache) for case in data.part("validation")],
    )


def train(data: DataSet, config: TrainConfig, output: Path, resume: bool = False) -> Path:
    """Train a network.

    Args:
        data: cases and their split.
        config: every setting.
        output: folder for `last.pt`, `best.pt`, `log.csv` and the cache of prepared cases.
        resume: go on from `last.pt`, with the configuration, split and random state in it.

    Returns:
        The file of the best checkpoint, by mean Dice over the regions on the validation part.

    Raises:
        TrainingError: `output` holds another run, a case cannot be used, the loss is not
            finite, or a checkpoint cannot be written.
    """
    if not resume and (output / "last.pt").exists():
        raise TrainingError(f"{output}: holds a run already; add --resume or choose another folder")
    stored = load_run(output) if resume else None
    output.mkdir(parents=True, exist_ok=True)
    if stored:
        config, data = checkpoint_config(stored), data.with_split(stored["split"])
        normalisation = checkpoint_normalisation(stored)
    else:
        landmarks = learn_landmarks(data.part("train")) if config.histogram_matching else None
        normalisation = Normalisation("nonzero", landmarks)

    training, validation = _training_cases(data, normalisation, config, output / "cache")
    patch = config.patch + 2 * margin_voxels(config)
    sampler = PatchSampler(training, patch, config.tumour_share, config.network.classes)
    steps = _steps_per_epoch(config, len(training))
    run = _start(config, data, normalisation, steps)
    if stored:
        run.restore(stored)
        _cut_log(output / "log.csv", run.epoch)
    while run.epoch < config.epochs:
        began = time.perf_counter()
        train_loss = _train_epoch(run, sampler, steps)
        scores = validate(run.deployed, validation, config, run.device)
        _finish_epoch(run, output, train_loss, scores, time.perf_counter() - began)
    return output / "best.pt"
