"""Test-time augmentation: image transforms, and fusion of the passes.

Source: the paper's section 3.4, majority vote over identity, mirror and 90-degree rotation.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.errors import ConfigError
from attnseg.runtime.geometry import AxisTransform

Fuse = Literal["vote", "mean"]
"""Fusion mode of the passes; see `Fusion`."""


# Weight of the probability in the score of a vote: summed over all passes, less than one vote.
_TIE_BREAK = np.float32(1 / 16)

IDENTITY = AxisTransform()

PASSES: dict[str, tuple[AxisTransform, ...]] = {
    "none": (IDENTITY,),
    # In the model's orientation the mirror swaps left and right, and the rotation is axial.
    "paper": (IDENTITY, AxisTransform(flips=(0,)), AxisTransform((1, 0, 2), flips=(0,))),
    "mirror8": tuple(
        AxisTransform(flips=tuple(axis for axis in range(3) if mirrored[axis]))
        for mirrored in product((0, 1), repeat=3)
    ),
}
"""Test-time augmentation schemes: image transforms of the passes, by name."""


def _slabs(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices along X that fit in the CPU cache."""
    return (slice(x, x + 1) for x in range(shape[1]))


def _argmax(scores: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    """Write `scores.argmax(axis=0)` to `out`; several times faster than NumPy."""
    best = scores[0].copy()
    out[:] = 0
    for index in range(1, len(scores)):
        better = (scores[index] > best).view(np.uint8)
        np.maximum(out, better * np.uint8(index), out=out)
        np.maximum(best, scores[index], out=best)


def argmax_classes(logits: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Most likely class per voxel, `(X, Y, Z)` uint8; the lowest index on ties."""
    classes = np.empty(logits.shape[1:], np.uint8)
    for slab in _slabs(logits.shape):
        _argmax(logits[:, slab], classes[slab])
    return classes


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    exponential = np.exp(logits - logits.max(axis=0))
    return np.asarray(exponential / exponential.sum(axis=0))


class Fusion:
    """Fuses the logits of several passes into one class per voxel.

    `vote`: the class with most votes; ties are broken by the highest mean probability, then by the
    lowest index. `mean`: the class with the highest mean probability.
    """

    def __init__(self, mode: Fuse) -> None:
        self._mode = mode
        self._scores: NDArray[np.float32] | None = None

    def add(self, logits: NDArray[np.float32]) -> None:
        """Add the logits `(K, X, Y, Z)` of one pass, after the inverse transform."""
        if self._scores is None:
            self._scores = np.zeros(logits.shape, np.float32)
        for slab in _slabs(logits.shape):
            part = logits[:, slab]
            scores = _softmax(part)
            if self._mode == "vote":
                scores *= _TIE_BREAK
                chosen = argmax_classes(part)
                for index in range(len(part)):
                    scores[index] += chosen == index
            self._scores[:, slab] += scores

    def classes(self) -> NDArray[np.uint8]:
        """Class per voxel, `(X, Y, Z)` uint8.

        Raises:
            ConfigError: No pass was added.
        """
        if self._scores is None:
            raise ConfigError("no pass was added to the vote")
        return argmax_classes(self._scores)
