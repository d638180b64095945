"""Test-time augmentation: transforms of the volume, their inverses, and the vote.

Source: the paper's section 3.4, a majority vote over identity, mirror and 90-degree rotation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.errors import ConfigError

Fuse = Literal["vote", "mean"]


@dataclass(frozen=True)
class Transform:
    """A flip or quarter turn of the last three axes: exact, and exactly invertible.

    Attributes:
        name: as reports give it.
        axes: which source axis each target axis reads, 0 for X.
        flips: target axes that are reversed afterwards.
    """

    name: str
    axes: tuple[int, int, int] = (0, 1, 2)
    flips: tuple[int, ...] = ()

    def apply(self, array: NDArray[Any]) -> NDArray[Any]:
        """View of `(..., X, Y, Z)`, transformed."""
        return self._reversed(_permuted(array, self.axes))

    def invert(self, array: NDArray[Any]) -> NDArray[Any]:
        """View of `(..., X, Y, Z)` with `apply` undone."""
        return _permuted(self._reversed(array), np.argsort(self.axes).tolist())

    def _reversed(self, array: NDArray[Any]) -> NDArray[Any]:
        return np.flip(array, tuple(array.ndim - 3 + f for f in self.flips))


def _permuted(array: NDArray[Any], axes: Sequence[int]) -> NDArray[Any]:
    lead = array.ndim - 3
    return array.transpose(*range(lead), *(lead + a for a in axes))


# Share of the mean probability in a vote's score: over all passes it sums to less than a vote.
_TIE_BREAK = np.float32(1 / 16)

IDENTITY = Transform("identity")
_MIRRORS = tuple(
    Transform(
        "mirror " + "".join("XYZ"[f] for f in flips) if flips else "identity",
        flips=flips,
    )
    for flips in (tuple(a for a in range(3) if c[a]) for c in product((0, 1), repeat=3))
)

PASSES: dict[str, tuple[Transform, ...]] = {
    "none": (IDENTITY,),
    # The mirror swaps left and right, the rotation is axial, in the model's orientation.
    "paper": (
        IDENTITY,
        Transform("mirror X", flips=(0,)),
        Transform("rotate XY", axes=(1, 0, 2), flips=(0,)),
    ),
    "mirror8": _MIRRORS,
}


def passes(name: str) -> tuple[Transform, ...]:
    """The transforms of a scheme. Raises `ConfigError` for a name not in `PASSES`."""
    if name not in PASSES:
        raise ConfigError(f"tta {name} does not exist; choose {', '.join(PASSES)}")
    return PASSES[name]


def _slabs(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices along X whose work stays in the processor's cache."""
    return (slice(x, x + 1) for x in range(shape[1]))


def _argmax(scores: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    """As `scores.argmax(axis=0)`, the first of equals; several times faster than numpy's."""
    best = scores[0].copy()
    out[:] = 0
    for index in range(1, len(scores)):
        better = (scores[index] > best).view(np.uint8)
        np.maximum(out, better * np.uint8(index), out=out)
        np.maximum(best, scores[index], out=best)


def argmax_classes(logits: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Most likely class per voxel: `(K, X, Y, Z)` to `(X, Y, Z)` uint8, the first of equals."""
    classes = np.empty(logits.shape[1:], np.uint8)
    for slab in _slabs(logits.shape):
        _argmax(logits[:, slab], classes[slab])
    return classes


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    exponential = np.exp(logits - logits.max(axis=0))
    return np.asarray(exponential / exponential.sum(axis=0))


class Fusion:
    """Joins the logits of several passes into classes.

    `vote`: the class that most passes chose; among classes with equally many votes, the one
    with the highest mean probability; if that is equal too, the lowest index.
    `mean`: the class with the highest mean probability.
    """

    def __init__(self, mode: Fuse) -> None:
        if mode not in ("vote", "mean"):
            raise ConfigError(f"fuse {mode} does not exist; choose vote, mean")
        self._mode = mode
        self._passes = 0
        self._scores: NDArray[np.float32] | None = None

    def add(self, logits: NDArray[np.float32]) -> None:
        """Add one pass: `(K, X, Y, Z)`, its transform undone."""
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
        self._passes += 1

    def classes(self) -> NDArray[np.uint8]:
        """Class per voxel, `(X, Y, Z)` uint8. Raises `ConfigError` before any pass."""
        if self._scores is None:
            raise ConfigError("no pass was added to the vote")
        return argmax_classes(self._scores)
