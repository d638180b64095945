"""JSON of others: manifests, and the specs, splits and data sets that users write by hand."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from attnseg.runtime.errors import ConfigError


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys occur once; readers differ in which of several values they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(k for k in keys if keys.count(k) > 1)!r} occurs twice")
    return found


def _finite(text: str) -> float:
    """A number of the file; Python's parser would make infinity of one that is too large."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"a number is not finite or too large, {text[:20]}")
    return number


def parse_json(stored: bytes) -> Any:
    """Parse the bytes of a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        ConfigError: The bytes are not JSON, name a key twice, or hold a number that is not finite;
            the cause names the line and continues a file name.
    """
    try:
        return json.loads(
            stored, object_pairs_hook=_distinct, parse_float=_finite, parse_constant=_finite
        )
    except json.JSONDecodeError as error:
        # Python reports a trailing comma at the comma or at the bracket, by version.
        comma = re.search(r",\s*([}\]])\s*$", error.doc[: error.pos] + error.doc[error.pos :][:1])
        comma = comma or re.match(r",\s*([}\]])", error.doc[error.pos :])
        reason = f"a comma before the closing {comma[1]}" if comma else error.msg
        raise ConfigError(f"is not JSON: {reason} (line {error.lineno})") from error
    except (ValueError, RecursionError) as error:  # no text, a key twice, or a huge number
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"is not JSON: {reason}") from error
