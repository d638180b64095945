"""Interface between a segmenter and the pipeline of its model: stage, submit, wait for the result.

A pipeline combines an engine and a plan. `attnseg.runtime.pipelines.host` and
`attnseg.runtime.pipelines.cuda` implement the same flow:

    check -> preprocess -> windows -> network -> blend -> fuse -> clean-up -> restore
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.case.volume import Volume
from attnseg.runtime.engines.base import EngineInfo
from attnseg.runtime.errors import BundleError
from attnseg.runtime.steps.clock import StageClock
from attnseg.runtime.steps.preprocess import Preprocessing
from attnseg.runtime.task import Task

Progress = Callable[[float], None]
"""Callback that receives the completed fraction of the work, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """Result of one volume.

    Attributes:
        labels: `(X, Y, Z)` uint8 in the volume's own grid, with the bundle's label values; a
            `DeviceArray` if the labels stay on the GPU.
        volumes_ml: Volume of each region in millilitres.
        elapsed_ms: Time of each step in milliseconds.
        windows: Number of windows planned per pass; those of zeros may be skipped.
        components_removed: Number of components that the clean-up removed.
        warnings: Warnings for readers of the result.
        engine: Engine that ran.
        memory: Planned device memory: bytes, batch, type of the logits; empty on the CPU.
        resampled_to_mm: Voxel size that the volume was resampled to because it was not the model's;
            None if it was not.
        probabilities: `(R, X, Y, Z)` float32 probability of each region of the task in order, in
            the volume's own grid; None unless they were requested.
    """

    labels: Any
    volumes_ml: dict[str, float]
    elapsed_ms: dict[str, float]
    windows: int
    components_removed: int
    warnings: tuple[str, ...]
    engine: EngineInfo
    memory: dict[str, int | str] = field(default_factory=dict)
    resampled_to_mm: tuple[float, float, float] | None = None
    probabilities: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Staged:
    """A checked volume, ready for `Pipeline.submit`.

    Attributes:
        volume: The volume.
        preprocessing: Preprocessing of this volume.
        warnings: Warnings for readers of the result.
        clock: Clock with the times of the steps so far.
    """

    volume: Volume
    preprocessing: Preprocessing
    warnings: tuple[str, ...]
    clock: StageClock


class Pending(Protocol):
    """A segmentation in progress."""

    def result(self) -> Segmentation:
        """Wait for the result; may be called from another thread.

        Raises:
            EngineError: The engine or the GPU failed.
        """


@dataclass(frozen=True)
class Done:
    """A finished segmentation."""

    segmentation: Segmentation

    def result(self) -> Segmentation:
        """See `Pending.result`."""
        return self.segmentation


class Pipeline(Protocol):
    """Segments volumes. Only `stage` and `Pending.result` may run in other threads."""

    @property
    def engine(self) -> EngineInfo:
        """Engine that runs the network."""

    def stage(self, volume: Volume) -> Staged:
        """Check a volume, and start its upload if it is segmented on a GPU.

        Raises:
            ScanError: The number of channels is wrong.
            VolumeError: The volume does not meet the model's requirements.
            EngineError: The GPU failed.
        """

    def submit(
        self, staged: Staged, progress: Progress | None = None, on_device: bool = False
    ) -> Pending:
        """Segment a volume. On a GPU, the work may still be in progress on return.

        Args:
            staged: Result of `stage` of this pipeline.
            progress: Callback for the completed fraction of the work.
            on_device: Whether the labels stay on the GPU.

        Raises:
            ConfigError: `on_device` is set, and the model runs on the CPU.
            VolumeError: A channel cannot be normalised.
            BundleError: The network's classes are not those of the manifest.
            EngineError: The engine or the GPU failed.
        """


def volumes_ml(volume: Volume, task: Task, voxels: Sequence[int]) -> dict[str, float]:
    """Volume of each region in millilitres, from the number of voxels of each class index."""
    counts = dict(zip(task.label_values, voxels, strict=True))
    return {
        name: round(sum(int(counts[value]) for value in region) * volume.voxel_ml, 3)
        for name, region in task.regions.items()
    }


def resampled_to_mm(
    staged: Staged, preprocessing: Preprocessing
) -> tuple[float, float, float] | None:
    """Voxel size that a volume is resampled to although `preprocessing` of the model does not."""
    grid = staged.preprocessing.grid
    return grid.spacing_mm if grid is not None and preprocessing.grid is None else None


def check_channels(found: int, expected: int) -> None:
    """Raise `BundleError` unless a network returns the number of channels of its manifest."""
    if found != expected:
        raise BundleError(
            f"the network returns {found} channels, its manifest names {expected} outputs",
            "export the model again",
        )


def label_values(task: Task) -> NDArray[np.uint8]:
    """Label value of each class index, `(K,)` uint8."""
    return np.array(task.label_values, np.uint8)
