"""Interface of an inference engine on device memory."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Protocol, runtime_checkable

from attnseg.runtime.cuda.device import Device, Region
from attnseg.runtime.engines.base import Engine
from attnseg.runtime.geometry import Shape

_WINDOWS, _WINDOW_VOXELS = 12, 64**3


def usual_batch(window: Shape | None) -> int:
    """Default number of windows per call: 12 of 64x64x64 voxels, or as many voxels in all.

    Fewer windows leave a GPU idle between kernels, more windows take more memory: the activations
    of the shipped model for 12 windows take about 2 GB in fp16.

    Args:
        window: Window in voxels along X, Y and Z; None for any size, and one window per call.
    """
    if window is None:
        return 1
    return min(_WINDOWS, max(1, _WINDOWS * _WINDOW_VOXELS // prod(window)))


@runtime_checkable
class DeviceEngine(Engine, Protocol):
    """Runs the network on device memory, for `attnseg.runtime.pipelines.cuda`.

    The caller owns input and output, and keeps them allocated until the device has finished. The
    engine owns its weights and activations. Every method but `infer` must be called within
    `device.active()`.
    """

    @property
    def device(self) -> Device:
        """Device that runs the engine."""

    @property
    def batches(self) -> tuple[int, int]:
        """Largest and smallest batch size of one call, in windows."""

    @property
    def classes(self) -> int | None:
        """Number of channels of the logits; None if unknown before the first run."""

    @property
    def half(self) -> bool:
        """Whether input and output are fp16 rather than fp32."""

    @property
    def memory_bytes(self) -> int:
        """Device memory that the engine itself holds, as far as known."""

    @property
    def recorded(self) -> str:
        """Whether work is replayed from a CUDA graph: `yes`, `not yet`, or `no: ` and a reason."""

    def enqueue(self, images: Region, logits: Region, shape: Sequence[int]) -> None:
        """Enqueue one batch on the device's stream; need not wait for it.

        Args:
            images: Input, `(B, C, x, y, z)` fp16 or fp32; only read.
            logits: Output, `(B, K, x, y, z)` of the same type.
            shape: Shape of the input, (B, C, x, y, z).

        Raises:
            OutOfMemoryError: The device has too little memory for a batch of this size.
            EngineError: The engine does not support the shape, or fails.
        """
