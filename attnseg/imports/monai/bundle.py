"""Import of a MONAI bundle: its transforms and inferer as a record, and its network.

Source: MONAI 1.6.1 and the inference configs of its model zoo. `configs/inference.json` is parsed
and never evaluated. A bundle is imported if the runtime does what its sections `preprocessing`,
`inferer` and `postprocessing` say, voxel by voxel; otherwise, the error names the first step that
it does not do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnseg.imports.folder import read_json, read_weights
from attnseg.imports.monai.config import Config
from attnseg.imports.monai.evaluator import WEIGHTS, check_evaluator, weights_key
from attnseg.imports.monai.metadata import Described
from attnseg.imports.monai.networks import BuiltNetwork, build_monai
from attnseg.imports.monai.postprocessing import After
from attnseg.imports.monai.preprocessing import Before
from attnseg.imports.networks import ImportedModel
from attnseg.runtime.errors import ConfigError, ExportError
from attnseg.runtime.geometry import shape_of
from attnseg.runtime.model.manifest import Inference, ModelRecord


def read_monai(folder: Path) -> ImportedModel:
    """Read a MONAI bundle.

    Args:
        folder: The folder, with `configs/metadata.json`, `configs/inference.json` and
            `models/model.pt`.

    Raises:
        ExportError: The folder is no such bundle, or the bundle needs something that the runtime
            does not have; the cause names the step and the argument.
    """
    path = _config_file(folder)
    metadata = read_json(folder / "configs" / "metadata.json")
    try:
        return _read(folder, Config(path), metadata)
    except ConfigError as error:
        raise ExportError(f"{path}: {error}") from error


def _config_file(folder: Path) -> Path:
    if not folder.is_dir():
        raise ExportError(f"{folder}: is not a folder", "give the folder of a MONAI bundle")
    path = folder / "configs" / "inference.json"
    if path.is_file():
        return path
    if other := sorted(path.parent.glob("inference.y*ml")):
        raise ExportError(f"{other[0]}: is YAML", f"convert it to {path.name}")
    raise ExportError(
        f"{folder}: has no configs/inference.json, so it is no MONAI bundle",
        "give the folder that holds configs/ and models/",
    )


def _read(folder: Path, config: Config, metadata: dict[str, Any]) -> ImportedModel:
    check_evaluator(config)
    component = config.component("network_def", "network")
    kind = component.name
    built = build_monai(component)
    before = Before.of(config, built)
    after = After.of(config, before)
    preprocessing = before.preprocessing(after.back)
    inference = _inference(config, built)
    task = Described(folder, metadata, before.image, built).task(after)
    key, file = weights_key(config), folder.joinpath(*WEIGHTS)
    network = built.with_weights(file, _state(read_weights(file), key))
    place = folder.resolve().name
    name = str(metadata.get("name") or place)
    record = ModelRecord(
        name=_word(name) or _word(place) or "model",
        description=str(metadata.get("description") or f"MONAI bundle {name}"),
        intended_use=str(metadata.get("intended_use") or "research use only, not for clinical use"),
        task=task,
        spacing_mm=before.spacing_mm,
        preprocessing=preprocessing,
        inference=inference,
    )
    origin = {
        "framework": "MONAI",
        "bundle": name,
        "version": str(metadata.get("version", "")),
        "network": kind,
    }
    return ImportedModel(record, network, origin)


def _word(name: str) -> str:
    """Name of a model in lower case, of ASCII letters, digits and hyphens; may be empty."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


def _state(stored: Mapping[str, Any], key: str | None) -> Mapping[str, Any]:
    """Weights of a checkpoint: the entry `key` that the config names, a usual one, or all of it."""
    for name in (key or "model", "model", "state_dict"):
        if isinstance(own := stored.get(name), Mapping):
            return own
    return stored


def _inference(config: Config, built: BuiltNetwork) -> Inference:
    """Options of the inferer, which must be a `SlidingWindowInferer`."""
    step = config.component("inferer")
    if step.name != "SlidingWindowInferer":
        step.refuse("is not supported", "import bundles with SlidingWindowInferer")
    sizes = step.numbers("roi_size")
    window: Sequence[Any] = sizes * 3 if len(sizes) == 1 else sizes
    multiple = built.window_multiple
    if len(window) != 3 or any(
        not isinstance(w, int) or w < 1 or w % m for w, m in zip(window, multiple, strict=True)
    ):
        step.refuse(f"has roi_size {sizes}; the network takes three multiples of {list(multiple)}")
    overlaps = set(step.numbers("overlap", 0.25))
    if len(overlaps) > 1:
        step.refuse("has different overlaps along the axes")
    weights = str(step.take("mode", "constant"))
    if weights not in ("constant", "gaussian"):
        step.refuse(f"has mode {weights!r}, which is not supported")
    step.expect("sigma_scale", 0.125)
    step.expect("padding_mode", "constant")
    step.expect("cval", 0.0, 0)
    step.expect("with_coord", False)
    step.ignore("sw_batch_size", "sw_device", "device", "progress", "cache_roi_weight_map")
    step.ignore("cpu_thresh", "buffer_steps", "buffer_dim")
    step.done()
    return Inference(
        window=shape_of(window),
        overlap=overlaps.pop(),
        window_multiple=multiple,
        min_voxels=0,
        placement="stride",
        weights="gaussian" if weights == "gaussian" else "constant",
        accumulate="single",
        empty_windows="run",
    )
