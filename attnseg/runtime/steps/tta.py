"""Test-time augmentation: image transforms, and fusion of the passes.

Source: the paper's section 3.4, majority vote over identity, mirror and 90-degree rotation.
"""

from __future__ import annotations

from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.errors import ConfigError
from attnseg.runtime.geometry import AxisTransform, Shape, shape_of
from attnseg.runtime.steps.decide import Decision, argmax_classes
from attnseg.runtime.steps.resample import Quantity

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


def passes_of(name: str, axes: Shape) -> tuple[AxisTransform, ...]:
    """Image transform of each pass of a scheme, for a model whose images have these axes.

    Args:
        name: Key of `PASSES`, or `model` for a single pass.
        axes: Axis of the volume, 0 for X, of each axis of the image.
    """
    place = [axes.index(axis) for axis in range(3)]

    def moved(transform: AxisTransform) -> AxisTransform:
        source = shape_of([place[transform.axes[axis]] for axis in axes])
        return AxisTransform(source, tuple(place[axis] for axis in transform.flips))

    return tuple(moved(transform) for transform in PASSES.get(name, (IDENTITY,)))


class Fusion:
    """Fuses the outputs of several passes into one class per voxel.

    `vote`: the class with most votes; ties are broken by the highest mean probability, then by the
    lowest index. `mean`: the decision on the mean probabilities.
    """

    def __init__(self, mode: Fuse, decision: Decision) -> None:
        self._mode, self._decision, self._passes = mode, decision, 0
        self._scores: NDArray[np.float32] | None = None

    def add(self, outputs: NDArray[np.float32], quantity: Quantity = "logits") -> None:
        """Add the logits or probabilities `(K, X, Y, Z)` of one pass, turned back."""
        if self._scores is None:
            self._scores = np.zeros(outputs.shape, np.float32)
        self._passes += 1
        for x in range(outputs.shape[1]):  # a slab fits in the CPU cache
            part = outputs[:, x : x + 1]
            scores = part.copy() if quantity == "probabilities" else self._decision.activate(part)
            if self._mode == "vote":
                scores *= _TIE_BREAK
                chosen = argmax_classes(part)
                for index in range(len(part)):
                    scores[index] += chosen == index
            self._scores[:, x : x + 1] += scores

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """Mean probabilities `(K, X, Y, Z)`, if the mode is `mean`."""
        return self._sums / np.float32(self._passes)

    def classes(self) -> NDArray[np.uint8]:
        """Class per voxel, `(X, Y, Z)` uint8.

        Raises:
            ConfigError: No pass was added.
        """
        if not self._decision.outputs:
            return argmax_classes(self._sums)
        return self._decision.classes(self.probabilities, "probabilities")

    @property
    def _sums(self) -> NDArray[np.float32]:
        if self._scores is None:
            raise ConfigError("no pass was added to the vote")
        return self._scores
