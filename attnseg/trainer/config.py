"""Settings of a training run, with the paper's protocol (section 3.3) as defaults."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, get_args

from attnseg.runtime.errors import ConfigError
from attnseg.runtime.steps.foreground import Crop
from attnseg.runtime.steps.resample import LARGEST_GRID
from attnseg.runtime.steps.windows import LARGEST_WINDOW
from attnseg.trainer.decode import STORED, decode_config
from attnseg.trainer.model import NetworkConfig
from attnseg.trainer.networks import check_size

Schedule = Literal["plateau", "cosine"]
Optimiser = Literal["adamw", "adam"]
Precision = Literal["bf16", "fp16", "fp32"]
Augmentation = Literal["paper", "strong"]
Overlap = Literal["classes", "regions"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    The paper states loss, optimiser, learning rate, weight decay, schedule, batch size, epochs,
    patch, rotation, elastic grid, intensity scale and gamma. It does not state steps per epoch,
    tumour share, elastic displacement, mirroring, and everything that is off by default; those
    values are chosen here.

    Attributes:
        network: Configuration of the network; its channels and classes are set by the task.
        patch: Edge of the cubic training patch and of the inference window, in voxels.
        overlap: Overlap of neighbouring windows in the validation, as a share of the window.
        batch_size: Patches per step and process.
        epochs: Number of epochs of `steps_per_epoch` steps; each ends with a validation.
        steps_per_epoch: Optimiser steps per epoch; 0 for one patch per training case.
        tumour_share: Share of patches centred on a tumour voxel; the others are anywhere.
        half_resolution_share: Share of patches that are cut at half the resolution, for networks
            that find a tumour before they segment it.
        learning_rate: Initial learning rate of the optimiser.
        weight_decay: Weight decay per step, multiplied by the learning rate.
        optimiser: `adamw` for decoupled weight decay (Loshchilov 2019); `adam` adds the decay
            to the gradient, another reading of the paper, which drives the weights of the
            deepest stages to zero (docs/training.md).
        schedule: `plateau` multiplies the rate by `factor` after `patience` epochs without a
            lower validation loss; `cosine` anneals it to zero over the run.
        patience: Epochs that `plateau` waits for a lower validation loss.
        factor: Factor by which `plateau` reduces the learning rate.
        cross_entropy_weight: Weight of the cross-entropy in the loss; the rest is Dice.
        dice_epsilon: Term added to numerator and denominator of the Dice loss.
        rotation_degrees: Largest rotation angle about each axis.
        elastic_spacing_voxels: Knot spacing of the elastic deformation.
        elastic_voxels: Standard deviation of the displacement at the knots.
        intensity_scale: Largest relative change of a modality's intensities.
        gamma: Range of the exponent applied to intensities scaled to [0, 1].
        augmentation: Changes of intensities: `paper` for `intensity_scale` and `gamma`, `strong`
            for noise, blur, brightness, contrast, low resolution and gamma both ways, as in
            nnU-Net, and one modality dimmed.
        zoom: Range of the factor by which a third of the patches is scaled.
        dice_of: What the Dice loss is averaged over: `classes`, or the `regions` of the task.
        mirror: Whether to flip each axis, and swap X and Y, with probability 0.5 each.
        resize: Shape (X, Y, Z) that every volume is resampled to; empty to keep its own.
        spacing_mm: Voxel size (X, Y, Z) that volumes are resampled to; empty to keep their own.
        foreground: Voxels over which the normalisation computes its statistics: `nonzero`,
            `all`, or `task` for the task's own choice (BraTS: nonzero, `dataset.json`: all).
        histogram_matching: Whether to match to landmarks learned from the training cases.
        ema_decay: Decay of an exponential moving average of the weights, which is then
            validated and deployed instead of them; 0 for none.
        clip_norm: Largest norm of the gradient, which is scaled down to it; 0 for no limit.
        validation_share: Share of the subjects held out when no split is given.
        folds: Number of cross-validation folds that define the split; 0 for none.
        fold: Index of the fold that is held out, from 0.
        synthetic_cases: Number of phantoms of `attnseg.synthetic` added to the training cases.
        precision: `bf16` or `fp16` for mixed precision, the latter with gradient scaling, or
            `fp32`.
        deterministic: Whether to request deterministic algorithms where PyTorch has them (on
            a CPU with a fixed number of threads, results are reproducible without).
        seed: Seed of the split, the initial weights, the patches and the augmentation.
    """

    __pydantic_config__ = STORED

    network: NetworkConfig = field(default_factory=NetworkConfig)
    patch: int = 64
    overlap: float = 0.25
    batch_size: int = 2
    epochs: int = 200
    steps_per_epoch: int = 0
    tumour_share: float = 0.67
    half_resolution_share: float = 0.0
    learning_rate: float = 3e-4
    weight_decay: float = 5e-5
    optimiser: Optimiser = "adamw"
    schedule: Schedule = "plateau"
    patience: int = 4
    factor: float = 0.5
    cross_entropy_weight: float = 0.5
    dice_epsilon: float = 1e-6
    rotation_degrees: float = 10.0
    elastic_spacing_voxels: int = 20
    elastic_voxels: float = 2.0
    intensity_scale: float = 0.1
    gamma: tuple[float, float] = (0.8, 1.2)
    augmentation: Augmentation = "paper"
    zoom: tuple[float, float] = (1.0, 1.0)
    dice_of: Overlap = "classes"
    mirror: bool = False
    resize: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    foreground: Literal["task"] | Crop = "task"
    histogram_matching: bool = True
    ema_decay: float = 0.0
    clip_norm: float = 0.0
    validation_share: float = 0.2
    folds: int = 0
    fold: int = 0
    synthetic_cases: int = 0
    precision: Precision = "bf16"
    deterministic: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (rule, holds) in self._rules().items():
            if not holds:
                raise ConfigError(f"{name} must be {rule}, got {getattr(self, name)!r}")
        check_size(self.network)

    def _rules(self) -> dict[str, tuple[str, bool]]:
        """Rule of each field in words, and whether the field satisfies it."""
        stride, lowest = self.network.stride, 2 * self.network.stride
        largest = round(LARGEST_WINDOW ** (1 / 3))
        gamma = self.gamma
        return {
            "patch": (
                f"a multiple of {stride} from {lowest} to {largest}",
                lowest <= self.patch <= largest and self.patch % stride == 0,
            ),
            "overlap": ("at least 0 and below 1", 0 <= self.overlap < 1),
            "batch_size": (
                f"at least 1, and a batch have at most {LARGEST_GRID} voxels",
                self.batch_size >= 1 and self.batch_size * self.patch**3 <= LARGEST_GRID,
            ),
            "epochs": ("at least 1", self.epochs >= 1),
            "steps_per_epoch": ("at least 0", self.steps_per_epoch >= 0),
            "half_resolution_share": ("within 0 and 1", 0 <= self.half_resolution_share <= 1),
            "tumour_share": ("within 0 and 1", 0 <= self.tumour_share <= 1),
            "learning_rate": ("positive and finite", 0 < self.learning_rate < math.inf),
            "weight_decay": ("at least 0 and finite", 0 <= self.weight_decay < math.inf),
            "optimiser": (" or ".join(get_args(Optimiser)), self.optimiser in get_args(Optimiser)),
            "schedule": (" or ".join(get_args(Schedule)), self.schedule in get_args(Schedule)),
            "patience": ("at least 0", self.patience >= 0),
            "factor": ("above 0 and below 1", 0 < self.factor < 1),
            "cross_entropy_weight": ("within 0 and 1", 0 <= self.cross_entropy_weight <= 1),
            "dice_epsilon": ("positive and finite", 0 < self.dice_epsilon < math.inf),
            "rotation_degrees": ("within 0 and 180", 0 <= self.rotation_degrees <= 180),
            "elastic_spacing_voxels": ("at least 1", self.elastic_spacing_voxels >= 1),
            "elastic_voxels": ("at least 0 and finite", 0 <= self.elastic_voxels < math.inf),
            "intensity_scale": ("at least 0 and below 1", 0 <= self.intensity_scale < 1),
            "gamma": (
                "two ascending positive numbers",
                len(gamma) == 2 and 0 < gamma[0] <= gamma[1] < math.inf,
            ),
            "augmentation": (
                " or ".join(get_args(Augmentation)),
                self.augmentation in get_args(Augmentation),
            ),
            "zoom": (
                "two ascending numbers from 0.5 to 2",
                len(self.zoom) == 2 and 0.5 <= self.zoom[0] <= self.zoom[1] <= 2,
            ),
            "dice_of": (" or ".join(get_args(Overlap)), self.dice_of in get_args(Overlap)),
            "resize": (
                f"three numbers of voxels, at most {LARGEST_GRID} in all, or empty",
                len(self.resize) in (0, 3)
                and all(v >= 2 for v in self.resize)
                and math.prod(self.resize) <= LARGEST_GRID,
            ),
            "spacing_mm": (
                "three positive numbers, or empty, and not given with resize",
                not self.spacing_mm
                or (
                    len(self.spacing_mm) == 3
                    and all(0 < v < math.inf for v in self.spacing_mm)
                    and not self.resize
                ),
            ),
            "foreground": (
                "task, nonzero or all",
                self.foreground in ("task", "nonzero", "all"),
            ),
            "clip_norm": ("at least 0 and finite", 0 <= self.clip_norm < math.inf),
            "folds": ("0, or at least 2", self.folds == 0 or self.folds >= 2),
            "fold": ("at least 0 and below folds", 0 <= self.fold < max(1, self.folds)),
            "ema_decay": ("at least 0 and below 1", 0 <= self.ema_decay < 1),
            "validation_share": ("above 0 and below 1", 0 < self.validation_share < 1),
            "synthetic_cases": ("at least 0", self.synthetic_cases >= 0),
            "precision": (" or ".join(get_args(Precision)), self.precision in get_args(Precision)),
            "seed": ("at least 0 and below 2**63", 0 <= self.seed < 1 << 63),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as stored in checkpoints."""
        return {
            **asdict(self),
            "network": self.network.to_dict(),
            **{name: list(getattr(self, name)) for name in _LISTS},
        }

    @classmethod
    def from_dict(cls, values: object) -> TrainConfig:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: A field does not exist, or its value is of another type or breaks a rule.
        """
        return decode_config(cls, values, "training")

    def with_settings(self, settings: dict[str, str]) -> TrainConfig:
        """Return a copy with fields set from text, as in `learning_rate=1e-3`.

        `widths`, `bottleneck`, `attention` and `multi_scale` are fields of the network.

        Raises:
            ConfigError: A field does not exist or cannot be set from text, or its text cannot
                be parsed.
        """
        own = {f.name for f in fields(self)} - {"network"}
        changes: dict[str, Any] = {}
        network: dict[str, Any] = {}
        for name, text in settings.items():
            if name not in own and name not in _NETWORK_SETTINGS:
                choices = (*sorted(own), *_NETWORK_SETTINGS)
                near = get_close_matches(name, choices, 1) or choices
                raise ConfigError(f"unknown training field {name}", f"choose {', '.join(near)}")
            if name in own:
                changes[name] = _parse(name, text, getattr(self, name))
            else:
                network[name] = _parse(name, text, getattr(self.network, name))
        return replace(self, network=replace(self.network, **network), **changes)


_LISTS = ("gamma", "resize", "spacing_mm", "zoom")
_NETWORK_SETTINGS = ("widths", "bottleneck", "attention", "multi_scale")
_EXAMPLES = {
    "resize": "192,192,128",
    "spacing_mm": "1,1,1",
    "widths": "12,24,48,96",
    "gamma": "0.8,1.2",
    "zoom": "0.8,1.25",
}


def _parse(name: str, text: str, current: object) -> Any:
    try:
        if isinstance(current, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(current, tuple):
            number = int if name in ("resize", "widths") else float
            return tuple(number(part) for part in text.split(",") if text)
        return (int if isinstance(current, int) else float if isinstance(current, float) else str)(
            text
        )
    except (KeyError, ValueError) as error:
        example = "true or false" if isinstance(current, bool) else _EXAMPLES.get(name, current)
        raise ConfigError(f"{name}={text}: expected a value such as {example}") from error
