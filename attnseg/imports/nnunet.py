"""Import of a model folder of nnU-Net 2: its steps as a record, and its folds as one network.

Source: Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image
segmentation" (Nature Methods 2021), and nnU-Net 2.8.1, whose predictor the runtime follows step by
step (docs/import.md). Arrays keep nnU-Net's order of axes (z, y, x).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

from attnseg.data.nnunet_labels import nnunet_labels
from attnseg.imports.architectures import build_nnunet, strides_of
from attnseg.imports.folder import naming_file, read_json, read_weights
from attnseg.imports.networks import Ensemble, ImportedModel, load_weights
from attnseg.imports.nnunet_trainers import is_own_trainer
from attnseg.runtime.errors import ConfigError, ExportError, Setting
from attnseg.runtime.geometry import Shape, shape_of
from attnseg.runtime.model.manifest import Inference, ModelRecord
from attnseg.runtime.steps.preprocess import Preprocessing
from attnseg.runtime.steps.resample import Grid, Order
from attnseg.runtime.steps.schemes import ClipZScore, Range, Scheme, SingleZScore, Unchanged
from attnseg.runtime.task import Channel, Task, distinct_names

_AS_WRITTEN = "copy the model folder again, as nnU-Net wrote it"
_OVERLAP = 0.5  # nnUNetPredictor's `tile_step_size`
_READERS = {"SimpleITKIO": None, "NibabelIO": None, "NibabelIOWithReorient": "RAS"}
"""Readers of 3-D images, and the orientation that each turns them to."""
_RESAMPLE = "resample_data_or_seg_to_shape"
_RESAMPLE_DEFAULTS = {
    "is_seg": False,
    "order": 3,
    "order_z": 0,
    "force_separate_z": False,
    "separate_z_anisotropy_threshold": 3,  # nnU-Net's ANISO_THRESHOLD
}
"""Options of nnU-Net's resampling function, and the default arguments of its signature."""


@dataclass(frozen=True)
class _Fold:
    """Content of a fold's checkpoint."""

    file: Path
    trainer: str
    configuration: str
    mirror_axes: tuple[int, ...]
    weights: Mapping[str, Any]

    @classmethod
    def read(cls, file: Path) -> Self:
        stored = read_weights(file)
        with naming_file(file, _AS_WRITTEN):
            return cls(
                file=file,
                trainer=str(stored["trainer_name"]),
                configuration=str(stored["init_args"]["configuration"]),
                mirror_axes=tuple(
                    int(axis) for axis in stored.get("inference_allowed_mirroring_axes") or ()
                ),
                weights=stored["network_weights"],
            )


def read_nnunet(folder: Path, folds: Sequence[str], checkpoint: str = "final") -> ImportedModel:
    """Read a model folder, `nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION`.

    Args:
        folder: The folder, with `plans.json`, `dataset.json` and `fold_N/checkpoint_*.pth`.
        folds: Numbers of folds, or `all` for every numbered fold that is there; `fold_all` is
            read if it is named beside others, or is the only one.
        checkpoint: `final` or `best`.

    Raises:
        ExportError: The folder is no such model, a fold is missing, or the model needs something
            that the runtime does not have; the cause names the file and the entry.
    """
    plans, (task, description) = _read_plans(folder), _read_dataset(folder)
    stored = {
        name: _Fold.read(file) for name, file in _checkpoints(folder, folds, checkpoint).items()
    }
    first = next(iter(stored.values()))
    if not is_own_trainer(first.trainer):
        raise ExportError(
            f"{first.file}: was trained by {first.trainer}, a custom trainer, which may change "
            "any step",
            "import models of nnU-Net's own trainers",
        )
    with naming_file(folder / "plans.json", _AS_WRITTEN):
        settings = _configuration(plans, first.configuration)
        record = _record(plans, settings, task, description, first.mirror_axes)
        networks = [
            build_nnunet(settings, first.trainer, len(task.channels), task.output_channels)
            for _ in stored
        ]
        origin = {
            "framework": "nnU-Net 2",
            "dataset": str(plans["dataset_name"]),
            "plans": str(plans["plans_name"]),
            "trainer": first.trainer,
            "configuration": first.configuration,
            "folds": list(stored),
            "checkpoint": first.file.name,
        }
    network = Ensemble(
        load_weights(own.file, built, own.weights)
        for own, built in zip(stored.values(), networks, strict=True)
    )
    notes = _notes(folder, list(stored), first.file.name)
    return ImportedModel(record, network.eval(), origin, notes)


def _notes(folder: Path, folds: Sequence[str], checkpoint: str) -> tuple[str, ...]:
    """Sentences on the folds that were read, and on those without a checkpoint."""
    said = f"Fold {folds[0]} was read" if len(folds) == 1 else "The mean of the folds "
    if len(folds) > 1:
        said += f"{', '.join(folds[:-1])} and {folds[-1]} was taken"
    empty = sorted(
        path.name
        for path in folder.glob("fold_*")
        if _is_numbered(path.name) and not (path / checkpoint).is_file()
    )
    lacking = (f"Left out is {', '.join(empty)}, without {checkpoint}",) if empty else ()
    return (f"{said} ({checkpoint})", *lacking)


def read_channels(folder: Path) -> tuple[Channel, ...]:
    """Channels of a model folder, whose suffixes are `_0000` and so on.

    Raises:
        ExportError: The folder is no model folder of nnU-Net 2.
    """
    _read_plans(folder)
    return _read_dataset(folder)[0].channels


def _read_plans(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ExportError(f"{folder}: is not a folder", "give a model folder of nnU-Net")
    if not (folder / "plans.json").is_file():
        if list(folder.glob("*.pkl")):
            raise ExportError(
                f"{folder}: is a model of nnU-Net 1, whose plans are pickled",
                "train it again with nnU-Net 2",
            )
        inner = [path.parent for path in sorted(folder.glob("*/plans.json"))]
        raise ExportError(
            f"{folder}: has no plans.json, so it is no model folder of nnU-Net",
            f"give {' or '.join(map(str, inner[:3]))}"
            if inner
            else "give the folder TRAINER__PLANS__CONFIGURATION",
        )
    return read_json(folder / "plans.json")


def _checkpoints(folder: Path, folds: Sequence[str], checkpoint: str) -> dict[str, Path]:
    """Checkpoint of each fold."""
    name = f"checkpoint_{checkpoint}.pth"
    if not folds:
        raise ConfigError("folds names no fold", "give all, or numbers such as 0,1")
    numbered = sorted((p.name for p in folder.glob("fold_*") if _is_numbered(p.name)), key=_number)
    there = {
        fold.removeprefix("fold_"): folder / fold / name
        for fold in (*numbered, "fold_all")
        if (folder / fold / name).is_file()
    }
    if not there:
        raise _no_checkpoint(folder, name)
    if list(folds) == ["all"]:  # a fold of all cases is called `all`, too
        chosen = [fold for fold in there if fold != "all"] or ["all"]
        return {fold: there[fold] for fold in chosen}
    for fold in folds:
        if fold not in there:
            raise ExportError(
                f"{folder}: has no fold_{fold}/{name}", f"choose of {', '.join(there)}"
            )
    return {fold: there[fold] for fold in dict.fromkeys(folds)}


def _is_numbered(name: str) -> bool:
    return re.fullmatch(r"fold_[0-9]+", name) is not None


def _number(name: str) -> int:
    return int(name.removeprefix("fold_"))


def _no_checkpoint(folder: Path, name: str) -> ExportError:
    cause = f"{folder}: has no fold_N/{name}, with N a number or all"
    for other in ("final", "best"):
        if any(folder.glob(f"fold_*/checkpoint_{other}.pth")) and other not in name:
            return ExportError(cause, "choose {}", Setting("checkpoint", other))
    return ExportError(cause, "copy the folders of the folds, too, once their training has ended")


def _configuration(plans: dict[str, Any], name: str) -> dict[str, Any]:
    """Settings of a configuration, with those that it inherits."""
    known, settings = plans["configurations"], dict[str, Any]()
    seen: list[str] = []
    following: str | None = name
    while following is not None:
        if following in seen:
            raise ConfigError(
                f"configuration {name} inherits from itself ({', '.join([*seen, following])})",
                "correct its inherits_from",
            )
        if following not in known:
            raise ConfigError(
                f"has no configuration {following}, only {', '.join(known)}", _AS_WRITTEN
            )
        seen.append(following)
        settings = {**known[following], **settings}
        following = known[following].get("inherits_from")
    if settings.get("previous_stage"):
        raise ConfigError(
            f"{name} is the second stage of a cascade, and needs the labels of the first",
            "import 3d_fullres or 3d_lowres",
        )
    if len(settings["patch_size"]) != 3:
        raise ConfigError(f"{name} is a 2-D configuration", "import 3d_fullres")
    return settings


def _read_dataset(folder: Path) -> tuple[Task, str]:
    """Task and description of the `dataset.json`."""
    file = folder / "dataset.json"
    stored = read_json(file)
    with naming_file(file, _AS_WRITTEN):
        given = stored.get("channel_names") or stored["modality"]
        names = distinct_names([str(given[key]) for key in sorted(given, key=int)])
        found = nnunet_labels(stored)
        task = Task(
            channels=tuple(Channel(name, (f"_{i:04d}",)) for i, name in enumerate(names)),
            labels=found.labels,
            regions=found.regions,
            display=(names[0],),
            activation="sigmoid" if found.outputs else "softmax",
            outputs=found.outputs,
        )
    return task, str(stored.get("description") or "")


def _record(
    plans: dict[str, Any],
    settings: dict[str, Any],
    task: Task,
    description: str,
    mirror_axes: tuple[int, ...],
) -> ModelRecord:
    spacing_mm = tuple(float(edge) for edge in settings["spacing"])
    x, y, z = spacing_mm
    manager = plans.get("label_manager", "LabelManager")
    if manager != "LabelManager":
        raise ConfigError(
            f"labels are decided by {manager}, a custom label manager",
            "import models with nnU-Net's own LabelManager",
        )
    return ModelRecord(
        name=f"{plans['dataset_name']}-{settings.get('data_identifier', 'nnunet')}",
        description=description or f"nnU-Net model of {plans['dataset_name']}",
        intended_use="research use only, not for clinical use",
        task=task,
        spacing_mm=(x, y, z),
        preprocessing=Preprocessing(
            orientation=_orientation(plans),
            grid=_grid(settings, (x, y, z)),
            crop="nonzero",
            normalisation=_schemes(plans, settings, len(task.channels)),
            order=("crop", "normalise", "resample"),
            axes=_axes(plans),
        ),
        inference=Inference(
            window=shape_of(settings["patch_size"]),
            overlap=_OVERLAP,
            window_multiple=_multiple(settings),
            min_voxels=0,
            placement="even",
            weights="gaussian-nnunet",
            mirror_axes=mirror_axes,
            accumulate="half",
            empty_windows="run",
        ),
    )


def _axes(plans: dict[str, Any]) -> Shape:
    """Axis of the volume, 0 for X, of each axis of nnU-Net's arrays."""
    return shape_of([2 - int(axis) for axis in plans["transpose_forward"]])


def _multiple(settings: dict[str, Any]) -> Shape:
    """Product of the strides along each axis."""
    along = zip(*strides_of(settings), strict=True)
    return shape_of([math.prod(int(stride) for stride in own) for own in along])


def _orientation(plans: dict[str, Any]) -> str | None:
    reader = str(plans["image_reader_writer"])
    if reader not in _READERS:
        raise ConfigError(
            f"images are read by {reader}, which is not for NIfTI files",
            f"import models with {', '.join(_READERS)}",
        )
    return _READERS[reader]


def _grid(settings: dict[str, Any], spacing_mm: tuple[float, float, float]) -> Grid:
    preprocessor = settings.get("preprocessor_name", "DefaultPreprocessor")
    if preprocessor != "DefaultPreprocessor":
        raise ConfigError(
            f"images are preprocessed by {preprocessor}, a custom preprocessor",
            "import models with DefaultPreprocessor",
        )
    order, separate = _resampling(settings, "data", (0, 1, 3))
    _, separate_back = _resampling(settings, "probabilities", (1,))
    if separate != separate_back:
        raise ConfigError(
            "data and probabilities are resampled with an axis apart above different ratios "
            f"({separate} and {separate_back}; None: never)",
            "import models whose ratios are equal",
        )
    return Grid(spacing_mm=spacing_mm, order=order, separate_above=separate)


def _resampling(
    settings: dict[str, Any], what: str, orders: tuple[Order, ...]
) -> tuple[Order, float | None]:
    """Order of the interpolation, and the ratio above which an axis is apart; None for never."""
    function, key = settings[f"resampling_fn_{what}"], f"resampling_fn_{what}_kwargs"
    if function != _RESAMPLE:
        raise ConfigError(
            f"{what} are resampled by {function}, which is unknown", f"import models of {_RESAMPLE}"
        )

    def refuse(name: str, expected: str) -> NoReturn:
        raise ConfigError(
            f"{key} has {name} {options[name]!r}, which is not supported",
            f"import models with {expected}",
        )

    options = {**_RESAMPLE_DEFAULTS, **settings[key]}
    for name in options:
        if name not in _RESAMPLE_DEFAULTS:
            refuse(name, f"{', '.join(_RESAMPLE_DEFAULTS)} only")
    for name in ("is_seg", "order_z"):
        if options[name] != _RESAMPLE_DEFAULTS[name]:
            refuse(name, f"{_RESAMPLE_DEFAULTS[name]}")
    order = next((own for own in orders if own == options["order"]), None)
    if order is None:
        refuse("order", " or ".join(map(str, orders)))
    forced, ratio = options["force_separate_z"], options["separate_z_anisotropy_threshold"]
    if forced is not None and forced is not False:
        refuse("force_separate_z", "null or false")
    if type(ratio) not in (int, float) or not 1 <= ratio < math.inf:
        refuse("separate_z_anisotropy_threshold", "a number of at least 1")
    return order, None if forced is False else float(ratio)


def _schemes(plans: dict[str, Any], settings: dict[str, Any], channels: int) -> tuple[Scheme, ...]:
    names, masks = settings["normalization_schemes"], settings["use_mask_for_norm"]
    properties = plans.get("foreground_intensity_properties_per_channel") or plans.get(
        "foreground_intensity_properties_by_modality", {}
    )
    if len(names) != channels or len(masks) != channels:
        raise ConfigError(
            f"normalisation is for {len(names)} channels, dataset.json has {channels}",
            _AS_WRITTEN,
        )
    return tuple(
        _scheme(str(name), bool(mask), properties.get(str(index), {}))
        for index, (name, mask) in enumerate(zip(names, masks, strict=True))
    )


def _scheme(name: str, mask: bool, known: Mapping[str, float]) -> Scheme:
    if name == "ZScoreNormalization":
        return SingleZScore("filled" if mask else "all")
    if name == "CTNormalization":
        return ClipZScore(
            low=float(known["percentile_00_5"]),
            high=float(known["percentile_99_5"]),
            mean=float(known["mean"]),
            std=max(float(known["std"]), 1e-8),
        )
    if name == "NoNormalization":
        return Unchanged()
    if name == "RescaleTo01Normalization":
        return Range(percentiles=(0.0, 100.0))
    if name == "RGBTo01Normalization":
        return Range(source=(0.0, 255.0))
    raise ConfigError(
        f"normalisation {name} is not one of nnU-Net's own", "import models with nnU-Net's own"
    )
