"""Import of a model folder of nnU-Net 2: its steps as a record, and its folds as one network.

Source: Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image
segmentation" (Nature Methods 2021), and nnU-Net 2.8.1, whose predictor the runtime follows step by
step (docs/import.md). Arrays keep nnU-Net's order of axes (z, y, x).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from attnseg.imports.architectures import build_nnunet, strides_of
from attnseg.imports.folder import read_json, read_weights
from attnseg.imports.networks import Ensemble, ImportedModel, load_weights
from attnseg.runtime.errors import ConfigError, ExportError
from attnseg.runtime.geometry import Shape, shape_of
from attnseg.runtime.model.manifest import Inference, ModelRecord
from attnseg.runtime.steps.preprocess import Preprocessing
from attnseg.runtime.steps.resample import Grid
from attnseg.runtime.steps.schemes import ClipZScore, Range, Scheme, SingleZScore, Unchanged
from attnseg.runtime.task import Channel, Label, Output, Task, distinct_names

_OVERLAP = 0.5  # nnUNetPredictor's `tile_step_size`
_SEPARATE_ABOVE = 3.0  # nnU-Net's ANISO_THRESHOLD
_MOST_LABELS = 255
_READERS = {"SimpleITKIO": None, "NibabelIO": None, "NibabelIOWithReorient": "RAS"}
"""Readers of 3-D images, and the orientation that each turns them to."""
_TRAINERS = re.compile(
    r"nnUNetTrainer(BN|No(DA|Mirroring|DeepSupervision)|_?DA5\w*|_DASegOrd0\w*|_onlyMirror01\w*"
    r"|_?(Benchmark_)?\d+epochs?\w*|_noDummy2DDA|_warmup|_probabilisticOversampling\w*"
    r"|(Vanilla)?Ada[mn]\w*|CosAnneal|(CE|Dice|DiceCE|Topk10|DiceTopK10)Loss\w*)?"
)
"""nnU-Net's own trainers; they differ in training only, or in the plans' network."""


def read_nnunet(folder: Path, folds: Sequence[str], checkpoint: str = "final") -> ImportedModel:
    """Read a model folder, `nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION`.

    Args:
        folder: The folder, with `plans.json`, `dataset.json` and `fold_N/checkpoint_*.pth`.
        folds: Numbers of folds, or `all` for every fold that is there.
        checkpoint: `final` or `best`.

    Raises:
        ExportError: The folder is no such model, a fold is missing, or the model needs something
            that the runtime does not have; the cause names it.
    """
    plans, dataset = _read_plans(folder), read_json(folder / "dataset.json")
    files = _checkpoints(folder, folds, checkpoint)
    try:
        return _read(folder, plans, dataset, files)
    except (KeyError, TypeError, IndexError, AttributeError, ArithmeticError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ExportError(
            f"{folder}: plans.json or dataset.json are incomplete ({what})"
        ) from error
    except (ConfigError, ValueError) as error:
        raise ExportError(f"{folder}: {error}") from error


def _read(
    folder: Path, plans: dict[str, Any], dataset: dict[str, Any], files: Mapping[str, Path]
) -> ImportedModel:
    stored = {fold: read_weights(path) for fold, path in files.items()}
    first = next(iter(stored.values()))
    trainer, name = str(first["trainer_name"]), str(first["init_args"]["configuration"])
    if not _TRAINERS.fullmatch(trainer):
        raise ExportError(
            f"{folder}: was trained by {trainer}, a custom trainer, which may change any step",
            "import models of nnU-Net's own trainers",
        )
    settings = _configuration(folder, plans, name)
    task = _task(dataset)
    mirror_axes = first.get("inference_allowed_mirroring_axes") or ()
    record = _record(plans, settings, dataset, task, tuple(int(axis) for axis in mirror_axes))
    network = Ensemble(
        load_weights(
            files[fold],
            build_nnunet(folder, settings, trainer, len(task.channels), task.output_channels),
            own["network_weights"],
        )
        for fold, own in stored.items()
    )
    origin = {
        "framework": "nnU-Net 2",
        "dataset": str(plans["dataset_name"]),
        "plans": str(plans["plans_name"]),
        "trainer": trainer,
        "configuration": name,
        "folds": list(files),
        "checkpoint": next(iter(files.values())).name,
    }
    return ImportedModel(record, network.eval(), origin)


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
            f"give {inner[0]}" if inner else "give the folder TRAINER__PLANS__CONFIGURATION",
        )
    return read_json(folder / "plans.json")


def _checkpoints(folder: Path, folds: Sequence[str], checkpoint: str) -> dict[str, Path]:
    """Checkpoint of each fold."""
    name = f"checkpoint_{checkpoint}.pth"
    there = {path.parent.name.removeprefix("fold_"): path for path in folder.glob(f"fold_*/{name}")}
    if not there:
        raise ExportError(f"{folder}: has no fold_*/{name}", "choose the other checkpoint")
    if list(folds) == ["all"]:  # a fold of all cases is called `all`, too
        numbered = sorted(fold for fold in there if fold != "all")
        return {fold: there[fold] for fold in numbered or ["all"]}
    for fold in folds:
        if fold not in there:
            raise ExportError(
                f"{folder}: has no fold_{fold}/{name}", f"choose of {', '.join(sorted(there))}"
            )
    return {fold: there[fold] for fold in dict.fromkeys(folds)}


def _configuration(folder: Path, plans: dict[str, Any], name: str) -> dict[str, Any]:
    """Settings of a configuration, with those that it inherits."""
    known, settings, seen = plans["configurations"], dict[str, Any](), set[str]()
    following: str | None = name
    while following is not None:
        if following in seen or following not in known:
            raise ExportError(f"{folder}: plans.json has no configuration {following}")
        seen.add(following)
        settings = {**known[following], **settings}
        following = known[following].get("inherits_from")
    if settings.get("previous_stage"):
        raise ExportError(
            f"{folder}: {name} is the second stage of a cascade, and needs the labels of the first",
            "import 3d_fullres or 3d_lowres",
        )
    if len(settings["patch_size"]) != 3:
        raise ExportError(f"{folder}: {name} is a 2-D configuration", "import 3d_fullres")
    return settings


def _task(dataset: dict[str, Any]) -> Task:
    """Channels, labels and regions of a `dataset.json`."""
    given = dataset.get("channel_names") or dataset["modality"]
    names = distinct_names([str(given[key]) for key in sorted(given, key=int)])
    channels = tuple(Channel(name, (f"_{i:04d}",)) for i, name in enumerate(names))
    labels = {
        str(name): tuple(int(v) for v in value)
        if isinstance(value, list | tuple)
        else (int(value),)
        for name, value in dataset["labels"].items()
        if name != "ignore"
    }
    regions = {name: values for name, values in labels.items() if set(values) != {0}}
    background = next((name for name, values in labels.items() if values == (0,)), "background")
    values = sorted({value for own in regions.values() for value in own} - {0})
    if len(values) >= _MOST_LABELS:
        raise ExportError(
            f"{len(values)} labels, and at most {_MOST_LABELS - 1} fit in one byte beside 0"
        )
    single = {own[0]: name for name, own in regions.items() if len(own) == 1}
    named = (Label(single.get(value, f"label {value}"), value) for value in values)
    overlap = any(len(own) > 1 for own in regions.values())
    return Task(
        channels=channels,
        labels=(Label(background, 0), *named),
        regions=regions,
        display=(names[0],),
        activation="sigmoid" if overlap else "softmax",
        outputs=_outputs(dataset, regions) if overlap else (),
    )


def _outputs(dataset: dict[str, Any], regions: Mapping[str, tuple[int, ...]]) -> tuple[Output, ...]:
    """Label of each region, in the order of `regions_class_order`."""
    order = [int(label) for label in dataset["regions_class_order"]]
    pairs = zip(regions, order, strict=True)
    return tuple(Output(name, label, (index,)) for index, (name, label) in enumerate(pairs))


def _record(
    plans: dict[str, Any],
    settings: dict[str, Any],
    dataset: dict[str, Any],
    task: Task,
    mirror_axes: tuple[int, ...],
) -> ModelRecord:
    spacing_mm = tuple(float(edge) for edge in settings["spacing"])
    x, y, z = spacing_mm
    return ModelRecord(
        name=f"{plans['dataset_name']}-{settings.get('data_identifier', 'nnunet')}",
        description=str(dataset.get("description") or f"nnU-Net model of {plans['dataset_name']}"),
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
    return shape_of([prod(int(stride) for stride in own) for own in along])


def _orientation(plans: dict[str, Any]) -> str | None:
    reader = str(plans["image_reader_writer"])
    if reader not in _READERS:
        raise ExportError(
            f"images are read by {reader}, which is not for NIfTI files",
            f"import models with {', '.join(_READERS)}",
        )
    return _READERS[reader]


def _grid(settings: dict[str, Any], spacing_mm: tuple[float, float, float]) -> Grid:
    preprocessor = settings.get("preprocessor_name", "DefaultPreprocessor")
    if preprocessor != "DefaultPreprocessor":
        raise ExportError(f"images are preprocessed by {preprocessor}, a custom preprocessor")
    for what, order in (("data", None), ("probabilities", 1)):
        function = settings[f"resampling_fn_{what}"]
        options = settings[f"resampling_fn_{what}_kwargs"]
        known = options.get("order_z", 0) == 0 and options.get("force_separate_z") is None
        if function != "resample_data_or_seg_to_shape" or not known:
            raise ExportError(
                f"{what} are resampled by {function} with {options}, which is unknown"
            )
        if order is not None and options["order"] != order:
            raise ExportError(f"{what} are resampled with order {options['order']}, not {order}")
    order = settings["resampling_fn_data_kwargs"]["order"]
    if order not in (0, 1, 3):
        raise ExportError(f"data are resampled with order {order}, not 0, 1 or 3")
    return Grid(spacing_mm=spacing_mm, order=order, separate_above=_SEPARATE_ABOVE)


def _schemes(plans: dict[str, Any], settings: dict[str, Any], channels: int) -> tuple[Scheme, ...]:
    names, masks = settings["normalization_schemes"], settings["use_mask_for_norm"]
    properties = plans.get("foreground_intensity_properties_per_channel") or plans.get(
        "foreground_intensity_properties_by_modality", {}
    )
    if len(names) != channels or len(masks) != channels:
        raise ExportError(
            f"normalisation is for {len(names)} channels, dataset.json has {channels}"
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
    raise ExportError(f"normalisation {name} is not one of nnU-Net's own")
