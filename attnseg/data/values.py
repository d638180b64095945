"""Values of label images."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.errors import TrainingError

_ROUNDING = 1e-4
"""Largest distance from a whole number that is rounding, of a type or of a header's slope."""
_COUNTED = 1 << 16  # span of values that are counted rather than sorted


def whole_labels(path: Path, labels: NDArray[Any]) -> NDArray[np.integer[Any]]:
    """Return `labels` as integers; floats must be whole numbers within rounding.

    Raises:
        TrainingError: A value is not a whole number, as after interpolation.
    """
    integers: NDArray[np.integer[Any]] = labels
    if labels.dtype.kind not in "iu":
        whole = np.rint(labels)
        wrong = np.abs(labels - whole) > _ROUNDING
        if wrong.any():
            values = np.unique(labels[wrong]).tolist()
            raise TrainingError(
                f"{path}: holds labels that are not whole numbers, {some_values(values)}",
                "save the labels as they were drawn, neither interpolated nor scaled",
            )
        integers = np.clip(whole, -_COUNTED, _COUNTED).astype(np.int32)
    return integers


def distinct(labels: NDArray[np.integer[Any]]) -> list[int]:
    """Distinct values, in ascending order."""
    low, high = int(labels.min()), int(labels.max())
    if high - low > _COUNTED:
        return [int(value) for value in np.unique(labels)]
    counts = np.bincount(np.subtract(labels, low, dtype=np.int64).ravel(order="K"))
    return [low + int(index) for index in np.flatnonzero(counts)]


def some_values(values: Collection[float]) -> str:
    """First eight values as text: an image mistaken for labels has thousands."""
    first = [f"{value:.6g}" for value in sorted(values)[:8]]
    return f"[{', '.join(first)}{', ...' if len(values) > len(first) else ''}]"
