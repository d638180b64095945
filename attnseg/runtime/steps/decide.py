"""Decision: from the network's outputs to one class per voxel, and to probabilities of regions.

Source: argmax, or the paper's threshold of 0.5 on the probability of each region, in the order in
which regions are written (nnU-Net's `regions_class_order`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.errors import ConfigError, Setting
from attnseg.runtime.steps.resample import Quantity
from attnseg.runtime.task import Activation, Output, Task

Decide = Literal["argmax", "threshold"]
"""Decision of a voxel: the class of the largest output, or thresholds on regions."""
_CERTAIN_LOGIT = 16.0  # of a probability that differs from 1 by 1e-7
LARGEST_PROBABILITIES = 1 << 32
"""Largest size of the probabilities of all regions of a scan, in bytes."""


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


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Softmax over the first axis of `(K, X, Y, Z)`."""
    exponential = np.exp(logits - logits.max(axis=0))
    return np.asarray(exponential / exponential.sum(axis=0))


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logistic function of each value, float32."""
    with np.errstate(over="ignore"):  # exp of a large number is infinite, and the result 0
        return np.asarray(np.reciprocal(1 + np.exp(-logits)))


@dataclass(frozen=True)
class Decision:
    """Activation of the network's outputs, and the rule that decides a voxel's class.

    Attributes:
        activation: Function from logits to probabilities.
        outputs: Thresholds on regions in the order in which they are written; empty for argmax.
        label_values: Label value of each class index.
        channels: Number of channels of the network's output.
    """

    activation: Activation
    outputs: tuple[Output, ...]
    label_values: tuple[int, ...]
    channels: int

    @classmethod
    def of(cls, task: Task, decide: Decide | None = None) -> Decision:
        """Decision of a task, or the other one.

        Args:
            task: Channels, labels and regions of the model.
            decide: Rule; None for that of the task.

        Raises:
            ConfigError: A network with sigmoid outputs has no argmax; or the regions of the task
                do not say which label each one writes.
        """
        channels, own = task.output_channels, task.outputs
        if decide == "argmax" and own:
            raise ConfigError(
                "argmax is for networks with one output per label, and this one has one per region"
            )
        outputs = own or (nested_outputs(task) if decide == "threshold" else ())
        return cls(task.activation, outputs, task.label_values, channels)

    def background(self, quantity: Quantity = "logits") -> NDArray[np.float32]:
        """Outputs `(K,)` of a voxel that is background, since the network did not see it."""
        outputs = np.zeros(self.channels, np.float32)
        if self.activation == "softmax":
            outputs[0] = _CERTAIN_LOGIT if quantity == "logits" else 1
        elif quantity == "logits":
            outputs[:] = -_CERTAIN_LOGIT
        return outputs

    def activate(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probabilities of logits `(K, X, Y, Z)`."""
        return softmax(logits) if self.activation == "softmax" else sigmoid(logits)

    def classes(
        self, values: NDArray[np.float32], quantity: Quantity = "logits"
    ) -> NDArray[np.uint8]:
        """Class index per voxel, `(X, Y, Z)` uint8, of logits or probabilities `(K, X, Y, Z)`."""
        if not self.outputs:
            return argmax_classes(values)
        classes = np.zeros(values.shape[1:], np.uint8)
        if quantity == "logits" and self.activation == "softmax":
            values, quantity = self.activate(values), "probabilities"
        for output in self.outputs:
            index = self.label_values.index(output.label)
            classes[_summed(values, output.channels) > self.limit(output, quantity)] = index
        return classes

    def limit(self, output: Output, quantity: Quantity) -> float:
        """Threshold of a region on probabilities, or on the logits of one sigmoid output."""
        share = output.threshold
        return math.log(share / (1 - share)) if quantity == "logits" else share


def _summed(values: NDArray[np.float32], channels: Sequence[int]) -> NDArray[np.float32]:
    """Sum of some channels of `(K, X, Y, Z)`."""
    total: NDArray[np.float32] = values[channels[0]]
    for channel in channels[1:]:
        total = total + values[channel]
    return total


def region_channels(task: Task) -> dict[str, tuple[int, ...]]:
    """Channels, ascending, whose probabilities add up to that of each region, by its name."""
    if task.outputs:
        own = {output.region: output.channels for output in task.outputs}
        return {name: own[name] for name in task.regions}
    index = {value: index for index, value in enumerate(task.label_values)}
    return {name: tuple(sorted(index[v] for v in region)) for name, region in task.regions.items()}


def nested_outputs(task: Task) -> tuple[Output, ...]:
    """Thresholds of 0.5 on the regions of a task, the largest written first.

    Each region writes the label that none of the regions inside it has, as oedema for the whole
    tumour of BraTS.

    Raises:
        ConfigError: There is no region; regions overlap and none contains the other; or a region
            has no such label, or several.
    """
    if not task.regions:
        raise ConfigError("thresholds need regions, and the model has none", "decide by argmax")
    channels = region_channels(task)
    ordered = sorted(task.regions.items(), key=lambda item: -len(set(item[1])))
    outputs = []
    for name, region in ordered:
        inside = [set(other) for _, other in ordered if set(other) < set(region)]
        own = set(region).difference(*inside)
        if len(own) != 1:
            raise ConfigError(
                f"thresholds need regions that add one label each, and {name} adds {len(own)}",
                "decide by argmax",
            )
        outputs.append(Output(name, own.pop(), channels[name]))
    for (name, region), (other, second) in combinations(task.regions.items(), 2):
        first, last = set(region), set(second)
        if first & last and not (first <= last or last <= first):
            raise ConfigError(
                f"thresholds need regions that are nested or apart, and {name} and {other} overlap",
                "decide by argmax",
            )
    return tuple(outputs)


def region_probabilities(values: NDArray[np.float32], task: Task) -> NDArray[np.float32]:
    """Probability `(R, X, Y, Z)` of each region of a task, of those `(K, X, Y, Z)` of channels."""
    return np.stack([_summed(values, channels) for channels in region_channels(task).values()])


def check_probabilities(regions: int, shape: Sequence[int]) -> None:
    """Raise `ConfigError` if probabilities `(R, X, Y, Z)` would exceed `LARGEST_PROBABILITIES`."""
    size = 4 * regions * math.prod(shape)
    if size > LARGEST_PROBABILITIES:
        raise ConfigError(
            f"the probabilities of {regions} regions have {size / 2**30:.1f} GiB, more than "
            f"{LARGEST_PROBABILITIES >> 30}",
            "leave {} out",
            Setting("probabilities"),
        )
