"""What an export makes, from the words of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from attnseg.export.export import ExportOptions
from attnseg.export.tensorrt import BuildOptions, check_options, parse_target
from attnseg.runtime.bundle import Budget
from attnseg.runtime.errors import ConfigError
from attnseg.runtime.signature import Signer

DEFAULT_TARGET = "rtx3090"


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
            `version_compatible`, `sign`, `name`, `description`,
            `intended_use`.

    Raises:
        ConfigError: a target or a budget does not exist, or options contradict each other.
    """
    builder, targets = settings["builder"], settings["targets"]
    if targets and builder == "none":
        raise ConfigError("--target names a GPU to build for, --builder none builds nothing")
    if settings["fp16"] and builder != "none":
        targets = targets or (DEFAULT_TARGET,)
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
        )
        for name in names
    )
    for engine in engines:
        check_options(engine)
    words = {key: settings[key] for key in ("name", "description", "intended_use")}
    return ExportOptions(
        settings["fp16"],
        settings["io"],
        engines,
        make_budget(dice, volume_percent),
        {key: text for key, text in words.items() if text},
        Signer(settings["sign"]) if settings["sign"] else None,
    )
