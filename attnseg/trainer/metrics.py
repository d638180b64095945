"""Dice per region, as the BraTS evaluation counts it (Menze 2015; Bakas 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def dice(prediction: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Dice of two masks of equal shape: 1 when both are empty, 0 when one is."""
    size = int(np.count_nonzero(prediction)) + int(np.count_nonzero(truth))
    return 2 * int(np.count_nonzero(prediction & truth)) / size if size else 1.0


def region_dice(
    prediction: NDArray[Any], truth: NDArray[Any], regions: Mapping[str, Sequence[int]]
) -> dict[str, float]:
    """Dice per region.

    Args:
        prediction: `(X, Y, Z)` labels.
        truth: the same shape and labels.
        regions: name to the labels that make it up, such as `{"WT": [1, 2, 4]}`.
    """
    return {
        name: dice(np.isin(prediction, labels), np.isin(truth, labels))
        for name, labels in regions.items()
    }
