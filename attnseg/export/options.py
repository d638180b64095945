"""What an export makes, from the words of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from attnseg.export.export import ExportOptions
from attnseg.export.tensorrt import (
    PORTABLE_TARGET,
    BuildOptions,
    check_machine,
    check_options,
    parse_target,
)
from attnseg.runtime.bundle import Budget
from attnseg.runtime.errors import ConfigError, EngineError
from attnseg.runtime.gpu import find_gpu
from attnseg.runtime.signature import Signer

DEFAULT_TARGET = "rtx3090"


def _default_target(builder: str, compatibility: str) -> str:
    """TensorRT-RTX builds for the paper's card, TensorRT for the GPU that it needs anyway."""
    if builder != "tensorrt":
        return PORTABLE_TARGET if compatibility == "ampere+" else DEFAULT_TARGET
    try:
        return find_gpu().target
    except EngineError as error:
        raise ConfigError(
            f"tensorrt needs the GPU that it builds for: {error}; tensorrt-rtx needs none"
        ) from error


def make_budget(dice: float | None, volume_percent: float | None) -> Budget:
    """A budget; None stands for the default.

    Raises:
        ConfigError: a value is not above 0, or Dice is above 1 or volume above 100.
    """
    given = {"dice": dice, "volume_percent": volume_percent}
    try:
        return Budget(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"budget of {first['loc'][0]}: {first['msg']}") from error


def make_options(
    dice: float | None, volume_percent: float | None, settings: Mapping[str, Any]
) -> ExportOptions:
    """Options as the command line gives them.

    Args:
        dice: of the budget.
        volume_percent: of the budget.
        settings: `fp16`, `io`, `builder`, `targets`, `batch`, `workspace` in MB, `compatible`,
            `version_compatible`, `timing_cache`, `int8`, `calibrate`, `spec`, `sign`, `name`,
            `description`, `intended_use`.

    Raises:
        ConfigError: a target or a budget does not exist, or options contradict each other.
    """
    builder, targets = settings["builder"], settings["targets"]
    if targets and builder == "none":
        raise ConfigError("--target names a GPU to build for, --builder none builds nothing")
    if settings["int8"] != (settings["calibrate"] is not None):
        raise ConfigError("--int8 and --calibrate FOLDER (scans like those to come) go together")
    wanted = (
        settings["fp16"]
        or settings["int8"]
        or settings["compatible"] != "same"
        or builder == "tensorrt"
    )
    if wanted and builder != "none":
        targets = targets or (_default_target(builder, settings["compatible"]),)
    workspace = settings["workspace"]
    names = dict.fromkeys(parse_target(target, builder) for target in targets)
    engines = tuple(
        BuildOptions(
            builder,
            name,
            settings["batch"],
            None if workspace is None else workspace * 1_000_000,
            settings["compatible"],
            settings["version_compatible"],
            None if settings["timing_cache"] is None else str(settings["timing_cache"]),
        )
        for name in names
    )
    for_engines = ("workspace", "version_compatible", "timing_cache")
    unused = [name for name in for_engines if settings[name]]
    if unused and not engines:
        option = f"--{unused[0].replace('_', '-')}"
        raise ConfigError(f"{option} is for engines, and none is built; add --fp16 or --target")
    for engine in engines:
        check_options(engine)
        check_machine(engine)
    words = {key: settings[key] for key in ("name", "description", "intended_use")}
    return ExportOptions(
        settings["fp16"],
        settings["io"],
        engines,
        make_budget(dice, volume_percent),
        {key: text for key, text in words.items() if text},
        Signer(settings["sign"]) if settings["sign"] else None,
        settings["spec"],
        settings["calibrate"],
    )
