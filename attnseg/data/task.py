"""Task of a labelled data set, with the conventions of its label files and scans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attnseg.runtime.errors import ConfigError
from attnseg.runtime.steps.foreground import Crop
from attnseg.runtime.task import BRATS_CHANNELS, Label, Task


@dataclass(frozen=True)
class LabelledTask:
    """A segmentation task with labelled cases.

    Attributes:
        task: Channels, labels and regions.
        aliases: Alternative values in label files, mapped to the label value they stand for.
        orientation: Directions in which X, Y and Z grow in the network's input.
        spacing_mm: Voxel size along X, Y and Z.
        min_voxels: Smallest component of a class that the clean-up keeps, in voxels.
        foreground: Voxels over which the normalisation computes its statistics.
        description: Short description of a model for the task.
        decision: What was decided about the label values of a data set; see `decide_labels`.

    Raises:
        ConfigError: An alias stands for a label that does not exist.
    """

    task: Task
    aliases: Mapping[int, int]
    orientation: str
    spacing_mm: tuple[float, float, float]
    min_voxels: int
    foreground: Crop = "nonzero"
    description: str = ""
    decision: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        unknown = sorted({*self.aliases.values()} - {*self.task.label_values})
        if unknown:
            raise ConfigError(f"aliases stand for label {unknown[0]}, which does not exist")

    @property
    def class_of_label(self) -> dict[int, int]:
        """Class index of every value that a label file may hold."""
        classes = {value: index for index, value in enumerate(self.task.label_values)}
        return {**classes, **{alias: classes[value] for alias, value in self.aliases.items()}}

    @property
    def class_regions(self) -> dict[str, tuple[int, ...]]:
        """Class indices of each region."""
        classes = self.class_of_label
        regions = self.task.regions
        return {name: tuple(classes[v] for v in values) for name, values in regions.items()}


BRATS = LabelledTask(
    task=Task(
        channels=BRATS_CHANNELS,
        labels=(
            Label("background", 0),
            Label("necrotic core", 1),
            Label("oedema", 2),
            Label("enhancing tumour", 4),
        ),
        regions={"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)},
        display=("flair", "t1ce"),
    ),
    aliases={3: 4},  # in either year's files; `decide_labels` chooses for a data set
    orientation="LPS",
    spacing_mm=(1.0, 1.0, 1.0),
    min_voxels=150,  # the paper, section 3.4
    description="BraTS brain tumours",
)
"""The task of BraTS 2018 to 2023."""
