"""What is segmented: the channels, labels and regions of a task, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnseg.runtime.normalise import Foreground
from attnseg.runtime.scans import BRATS_CHANNELS, Channel


@dataclass(frozen=True)
class Task:
    """A segmentation task.

    Attributes:
        channels: inputs of the network, in order.
        labels: name and value in label files per class, background first.
        aliases: further values that label files may hold, to the value they stand for.
        regions: name to the label values that make up a region.
        orientation: directions in which X, Y and Z grow in the network's input.
        spacing_mm: voxel size along X, Y and Z.
        display: channels that a picture shows.
        min_voxels: smallest component of a class that the clean-up keeps.
        foreground: voxels that the normalisation takes its statistics from.
        description: of a model for it, in a few words.
    """

    channels: tuple[Channel, ...]
    labels: tuple[tuple[str, int], ...]
    aliases: Mapping[int, int]
    regions: Mapping[str, tuple[int, ...]]
    orientation: str
    spacing_mm: tuple[float, float, float]
    display: tuple[str, ...]
    min_voxels: int
    foreground: Foreground = "nonzero"
    description: str = ""

    @property
    def class_of_label(self) -> dict[int, int]:
        """Class index of every value that a label file may hold."""
        classes = {value: index for index, (_, value) in enumerate(self.labels)}
        return {**classes, **{alias: classes[value] for alias, value in self.aliases.items()}}

    @property
    def class_regions(self) -> dict[str, tuple[int, ...]]:
        """Regions as class indices."""
        classes = self.class_of_label
        return {name: tuple(classes[v] for v in values) for name, values in self.regions.items()}


BRATS = Task(
    channels=BRATS_CHANNELS,
    labels=(("background", 0), ("necrotic core", 1), ("oedema", 2), ("enhancing tumour", 4)),
    aliases={3: 4},  # BraTS wrote enhancing tumour as 4 until 2022 and as 3 since
    regions={"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)},
    orientation="LPS",
    spacing_mm=(1.0, 1.0, 1.0),
    display=("flair", "t1ce"),
    min_voxels=150,  # the paper, section 3.4
    description="BraTS brain tumours",
)
