"""Task: inputs and outputs of a model, shared by manifest, spec, data set and trainer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from attnseg.runtime.errors import ConfigError


@dataclass(frozen=True)
class Channel:
    """One input channel of a model.

    Channels with the same suffixes are the volumes of one 4-D file, in order. The empty suffix
    matches every file that is not a label file.

    Attributes:
        name: Name of the channel, such as `t1`.
        suffixes: File-name suffixes before the extension, in lower case.
    """

    name: str
    suffixes: tuple[str, ...]


def distinct_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names of channels or labels, made distinct: those that repeat get their position."""
    count = Counter(names)
    if len(count) == len(names):
        return tuple(names)
    # The new name may be that of another channel, which is then numbered, too.
    numbered = [n if count[n] == 1 else f"{n} {i}" for i, n in enumerate(names)]
    return distinct_names(numbered)


@dataclass(frozen=True)
class Label:
    """One output class. Its position in the list of labels is the network's class index.

    Attributes:
        name: Name of the class.
        value: Value in label files, 0 to 255.
    """

    name: str
    value: int


Activation = Literal["softmax", "sigmoid"]
"""Function from logits to probabilities: of one label per voxel, or of regions that may overlap."""


@dataclass(frozen=True)
class Output:
    """A region that is written where its probability exceeds a threshold.

    Attributes:
        region: Name of the region.
        label: Label value that is written.
        channels: Output channels of the network whose probabilities are added.
        threshold: Probability above which the label is written.
    """

    region: str
    label: int
    channels: tuple[int, ...]
    threshold: float = 0.5


@dataclass(frozen=True)
class Task:
    """Channels, labels and regions of a segmentation task.

    Attributes:
        channels: Input channels of the network, in order.
        labels: Output classes, background first. With the activation `softmax`, the position of a
            label is the network's output channel.
        regions: Label values of each region, by name.
        display: Names of the channels shown in pictures.
        activation: Function from logits to probabilities.
        outputs: With the activation `sigmoid`, the region of each output channel, in the order in
            which their labels are written; otherwise empty.

    Raises:
        ConfigError: A field is invalid or contradicts another; the message names the field.
    """

    channels: tuple[Channel, ...]
    labels: tuple[Label, ...]
    regions: Mapping[str, tuple[int, ...]]
    display: tuple[str, ...]
    activation: Activation = "softmax"
    outputs: tuple[Output, ...] = ()

    def __post_init__(self) -> None:
        self._check_labels()
        self._check_channels()
        self._check_outputs()
        names = (*self.channel_names, *(label.name for label in self.labels), *self.regions)
        for name in names:
            if not name.isprintable():
                raise ConfigError(f"name {name!r} must be one line of printable characters")

    def _check_labels(self) -> None:
        values = self.label_values
        if len(values) < 2 or values[0] != 0 or len(set(values)) < len(values):
            raise ConfigError("labels must start with background, 0, and have distinct values")
        if not 0 <= min(values) <= max(values) <= 255:
            raise ConfigError(
                f"labels must have values from 0 to 255, so that one byte holds them, got "
                f"{len(values)} labels from {min(values)} to {max(values)}"
            )
        for name, region in self.regions.items():
            if not set(region) <= set(values):
                raise ConfigError(f"region {name} names a label that does not exist")

    def _check_channels(self) -> None:
        names = self.channel_names
        if not names or len(set(names)) < len(names):
            raise ConfigError("channels must hold at least one channel, with distinct names")
        for channel in self.channels:
            if not channel.suffixes or any(s != s.lower() for s in channel.suffixes):
                raise ConfigError(f"channel {channel.name} needs suffixes, in lower case")
        suffixes = {channel.suffixes for channel in self.channels}
        if len(suffixes) > 1 and any("" in own for own in suffixes):
            raise ConfigError(
                "an empty suffix stands for any file, so all channels must have it, or none"
            )
        if not self.display or not set(self.display) <= set(names):
            raise ConfigError(f"display names a channel that does not exist: {self.display}")

    def _check_outputs(self) -> None:
        if (self.activation == "sigmoid") != bool(self.outputs):
            raise ConfigError("outputs belong to the activation sigmoid, and to no other")
        used = sorted(channel for output in self.outputs for channel in output.channels)
        each = all(len(output.channels) == 1 for output in self.outputs)
        if not each or used != list(range(len(self.outputs))):
            raise ConfigError(f"outputs must name each channel once, got channels {used}")
        for output in self.outputs:
            if output.region not in self.regions or output.label not in self.label_values[1:]:
                raise ConfigError(f"output {output.region} names an unknown region or label")
            if not 0 < output.threshold < 1:
                raise ConfigError(
                    f"output {output.region} needs a threshold within 0 and 1, "
                    f"got {output.threshold}"
                )
        named = [output.region for output in self.outputs]
        if self.outputs and sorted(named) != sorted(self.regions):
            raise ConfigError(
                f"outputs must name each region once, got {', '.join(named)} of "
                f"{', '.join(self.regions)}"
            )

    @property
    def output_channels(self) -> int:
        """Number of channels of the network's output."""
        return len(self.outputs) or len(self.labels)

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Names of the channels, in order."""
        return tuple(channel.name for channel in self.channels)

    @property
    def label_values(self) -> tuple[int, ...]:
        """Value of each class in label files, by class index."""
        return tuple(label.value for label in self.labels)


BRATS_CHANNELS = (
    Channel("t1", ("_t1", "-t1n", "_t1n", "-t1")),
    Channel("t1ce", ("_t1ce", "-t1c", "_t1c", "-t1ce", "_t1gd")),
    Channel("t2", ("_t2", "-t2w", "_t2w", "-t2")),
    Channel("flair", ("_flair", "-t2f", "_t2f", "-flair")),
)
"""Channels and file-name suffixes of BraTS 2018 to 2023."""
