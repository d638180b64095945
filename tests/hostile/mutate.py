"""Changes of bytes and of JSON values."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, MutableSequence
from typing import Any

import numpy as np
from numpy.random import Generator

NAMES = (
    "",
    ".",
    "..",
    "../a",
    "/etc/hostname",
    "C:\\a",
    "a\\b",
    "a/b",
    "~",
    "-rf",
    "=1+1",
    "@SUM(A1)",
    "a\0b",
    "a\nb",
    "\x1b[2Jred",
    "\u202egnp.exe",
    "\u200b",
    "<b>&amp;",
    "|a|`b`",
    "{}",
    "%s",
    "ä" * 200,
    "a" * 5000,
    "\ud800",
    "\udcff\udcfe",  # the bytes FF FE in a file name that is not UTF-8
    "CON",
    " ",
    "nan",
    "1e999",
)
"""Names that paths, terminals, tables or formats treat in a special way."""

NUMBERS = (
    0,
    -1,
    1,
    2,
    5,
    255,
    256,
    32767,
    65536,
    2**31 - 1,
    2**31,
    2**63 - 1,
    2**64,
    10**30,
    10**400,
    -(2**63),
    1.5,
    -0.0,
    1e-320,
    1e-9,
    0.999999999,
    1e9,
    1e38,
    1e308,
    -1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
)
"""Numbers at and beyond the bounds of types and rules."""


def pick(rng: Generator, options: Any) -> Any:
    """One of `options`, unconverted."""
    return options[int(rng.integers(len(options)))]


def _flip(rng: Generator, data: bytearray) -> None:
    for _ in range(int(rng.integers(1, 5))):
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))


def _overwrite(rng: Generator, data: bytearray) -> None:
    start, size = int(rng.integers(len(data))), pick(rng, (1, 2, 4, 8, 64))
    fill = pick(rng, (b"\0", b"\xff", b"\x7f", b"\x80", rng.bytes(1)))
    data[start : start + size] = (fill * size)[: len(data) - start]


def _cut(rng: Generator, data: bytearray) -> None:
    del data[int(rng.integers(len(data))) :]


def _remove(rng: Generator, data: bytearray) -> None:
    start = int(rng.integers(len(data)))
    del data[start : start + int(rng.integers(1, 65))]


def _insert(rng: Generator, data: bytearray) -> None:
    start = int(rng.integers(len(data)))
    data[start:start] = rng.bytes(int(rng.integers(1, 65)))


def _repeat(rng: Generator, data: bytearray) -> None:
    start = int(rng.integers(len(data)))
    data[start:start] = data[start : start + int(rng.integers(1, 257))]


def _append(rng: Generator, data: bytearray) -> None:
    data += rng.bytes(int(rng.integers(1, 100))) if rng.random() < 0.5 else bytes(1000)


def _swap(rng: Generator, data: bytearray) -> None:
    size = int(rng.integers(1, 65))
    a, b = (int(v) for v in rng.integers(0, len(data), 2))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


_CHANGES = (_flip, _flip, _overwrite, _cut, _remove, _insert, _repeat, _append, _swap)


def change_bytes(rng: Generator, stored: bytes) -> bytes:
    """`stored` after one to three random changes."""
    data = bytearray(stored)
    for _ in range(int(rng.integers(1, 4))):
        if data:
            pick(rng, _CHANGES)(rng, data)
    return bytes(data)


Slot = tuple[Any, Any]
"""A container, and the key or index of one of its values."""


def _slots(value: Any) -> Iterator[Slot]:
    """Every value within `value`, at any depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, own in list(items):
        yield value, key
        if isinstance(own, (dict, list)):
            yield from _slots(own)


def nested(depth: int) -> Any:
    """A list within a list, `depth` times."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def any_value(rng: Generator) -> Any:
    """A JSON value of any type, often an extreme one."""
    made: tuple[Callable[[], Any], ...] = (
        lambda: pick(rng, NUMBERS),
        lambda: pick(rng, NAMES),
        lambda: pick(rng, (None, True, False, [], {}, [[]], "1", "true", "fp32", "nonzero")),
        lambda: int(rng.integers(-10, 300)),
        lambda: [pick(rng, NUMBERS) for _ in range(int(rng.integers(0, 5)))],
        lambda: {pick(rng, NAMES): pick(rng, NUMBERS)},
        lambda: nested(pick(rng, (3, 100, 900))),
        lambda: [0] * pick(rng, (100, 10000)),
    )
    return pick(rng, made)()


def _close_value(rng: Generator, value: Any) -> Any:
    """A value of the type of `value`, near to it or extreme."""
    if isinstance(value, bool) or value is None:
        return pick(rng, (True, False, None, 0, 1))
    if isinstance(value, (int, float)):
        half = value // 2 if isinstance(value, int) else value / 2
        near = (value + 1, value - 1, -value, value * 2, half, str(value))
        return pick(rng, (*near, *NUMBERS))
    if isinstance(value, str):
        return pick(rng, (value.upper(), value[:-1], value + " ", value * 2, *NAMES))
    changed = copy.copy(value)
    if isinstance(changed, list) and changed:
        _change_list(rng, changed)
    elif isinstance(changed, dict):
        changed[pick(rng, NAMES)] = any_value(rng)
    return changed


def _change_list(rng: Generator, values: MutableSequence[Any]) -> None:
    place = int(rng.integers(len(values)))
    how = int(rng.integers(4))
    if how == 0:
        del values[place]
    elif how == 1:
        values.insert(place, copy.deepcopy(values[place]))
    elif how == 2:
        values.reverse()
    else:
        values.append(any_value(rng))


def change_json(rng: Generator, value: Any, changes: int = 3) -> Any:
    """A copy of a JSON object or list after one to `changes` changes of its structure or values."""
    changed = copy.deepcopy(value)
    for _ in range(int(rng.integers(1, changes + 1))):
        slots = list(_slots(changed))
        if not slots:
            break
        container, key = pick(rng, slots)
        how = rng.random()
        if how < 0.55:
            container[key] = _close_value(rng, container[key])
        elif how < 0.8:
            container[key] = any_value(rng)
        elif how < 0.9:
            del container[key]
        elif isinstance(container, dict):
            container[pick(rng, NAMES)] = container.pop(key)
        else:
            container[key] = copy.deepcopy(container[pick(rng, range(len(container)))])
    return changed


def encode_json(rng: Generator, value: Any) -> bytes:
    """JSON text of `value`, sometimes in an odd encoding, with a key twice, nested or damaged."""
    text = json.dumps(value, indent=pick(rng, (None, 2)), ensure_ascii=bool(rng.random() < 0.9))
    how = rng.random()
    if how < 0.03 and text.startswith("{") and len(value) > 1:
        key = pick(rng, list(value))
        text = f"{{{json.dumps(key)}: {json.dumps(value[key])}, {text[1:]}"
    elif how < 0.05:
        depth = pick(rng, (2000, 100_000))
        text = text[:-1] + ', "x": ' + "[" * depth + "]" * depth + "}"
    elif how < 0.07:
        text = text.replace("1", "1" * pick(rng, (20, 5000)), 1)
    encoding = pick(rng, ("utf-8",) * 12 + ("utf-8-sig", "utf-16", "utf-32", "utf-16-le"))
    stored = text.encode(encoding, "surrogatepass")
    return change_bytes(rng, stored) if rng.random() < 0.1 else stored


def extremes_of(dtype: np.dtype[Any]) -> tuple[Any, ...]:
    """Values at the bounds of a numeric type, or texts for a type of bytes."""
    if dtype.kind == "S":
        return (b"", b"\0\0\0n", b"\xff" * dtype.itemsize, b"n+2", b"ni1", b"\x1b[2J\n")
    if dtype.kind == "f":
        bounds = np.finfo(dtype)
        small = (bounds.tiny, -bounds.tiny, bounds.max, bounds.min, bounds.eps)
        return (*small, 0, -0.0, 1, -1, 2, 0.5, 1e-3, 353, 1e9, 1e30, np.nan, np.inf, -np.inf)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    return (low, high, 0, 1, 2, 3, 4, 5, 7, 8, high // 2, high - 1, 0 if low == 0 else -1)
