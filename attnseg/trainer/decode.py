"""Decoding of configurations that are stored in checkpoints and in the metadata of weights.

Types are checked strictly: a number of channels is an `int`, and neither 1.5, true nor "4".
"""

from __future__ import annotations

import json
from typing import TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from attnseg.runtime.errors import ConfigError

Config = TypeVar("Config")

STORED = ConfigDict(extra="forbid", strict=True)
"""Configuration of pydantic for the dataclasses of a stored configuration."""
_LONGEST_VALUE = 40  # characters in a message


def decode_config(kind: type[Config], values: object, what: str) -> Config:
    """Make a configuration of plain values.

    Args:
        kind: Dataclass of the configuration.
        values: Dictionary of values by the names of the fields, tuples as lists; missing fields
            have their defaults.
        what: What is configured, for the texts of errors.

    Raises:
        ConfigError: The values are no dictionary, a field does not exist, or its value is of
            another type or breaks a rule.
    """
    try:
        # Only for JSON does pydantic take a list for a tuple and check all other types strictly.
        return TypeAdapter(kind).validate_json(json.dumps(values))
    except ValidationError as error:
        raise ConfigError(explain(error, what)) from error
    except (TypeError, ValueError, RecursionError) as error:  # of `dumps`
        raise ConfigError(f"the {what} configuration is no plain data ({error})") from error


def explain(error: ValidationError, what: str) -> str:
    """First violation of a schema: what was decoded, the field, the rule and the value."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown {what} field {where}"
    value = repr(first["input"])
    known = first["type"] != "missing" and len(value) <= _LONGEST_VALUE
    subject = f"{what} field {where}" if where else f"{what} configuration"
    return f"{subject}: {first['msg']}{f', got {value}' if known else ''}"
