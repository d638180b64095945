"""Channels of a volume on a device: uploaded, or used where another library put them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.case.volume import Volume
from attnseg.runtime.cuda.device import Device, DeviceArray, DeviceBuffer, Mark, Region
from attnseg.runtime.cuda.memory import explain_upload
from attnseg.runtime.errors import OutOfMemoryError, VolumeError
from attnseg.runtime.geometry import AxisTransform, Layout, Shape, shape_of
from attnseg.runtime.steps.preprocess import Preprocessed
from attnseg.runtime.threads import mapping


@dataclass(frozen=True)
class DeviceChannel:
    """One channel on a device.

    Attributes:
        buffer: Memory of the channel, C-contiguous, int16 or float32.
        memory: Shape of the memory.
        transform: Transform from the memory to the volume.
        floating: Whether the voxels are float32.
    """

    buffer: DeviceBuffer
    memory: Shape
    transform: AxisTransform
    floating: bool

    @property
    def voxels(self) -> int:
        """Number of voxels."""
        return prod(self.memory)

    @property
    def layout(self) -> Layout:
        """Layout of the volume in the memory."""
        _, y, z = self.memory
        return self.transform.layout(Layout(self.memory, (y * z, z, 1)))


@dataclass(frozen=True)
class Upload:
    """A volume that is on the device, or being uploaded.

    Attributes:
        channels: Channels of the volume, in the model's orientation.
        shape: Voxels along X, Y and Z in the model's orientation.
        marks: End of each copy; empty if nothing was copied.
        scan: Image that the host preprocessed, in place of channels; None for channels.
        image: The image on the device, `(C, X, Y, Z)` float32.
    """

    channels: tuple[DeviceChannel, ...]
    shape: Shape
    marks: tuple[Mark, ...]
    scan: Preprocessed | None = None
    image: DeviceBuffer | None = None

    @property
    def resampled(self) -> bool:
        """Whether the image was resampled, so that its outputs are resampled back."""
        return self.scan is not None and self.scan.resampled


def memory_order(layout: Layout) -> tuple[AxisTransform, Shape] | None:
    """Transform from contiguous memory to a volume, and the shape of that memory.

    None if the volume is not contiguous in any order of axes.
    """
    shape, strides = layout.shape, layout.strides
    order = sorted(range(3), key=lambda axis: (-abs(strides[axis]), -shape[axis], axis))
    step = 1
    for axis in reversed(order):
        if shape[axis] > 1 and abs(strides[axis]) != step:
            return None
        step *= shape[axis]
    source = [order.index(axis) for axis in range(3)]
    flips = tuple(axis for axis in range(3) if strides[axis] < 0 and shape[axis] > 1)
    return AxisTransform(shape_of(source), flips), shape_of([shape[axis] for axis in order])


def _array_order(array: NDArray[Any]) -> tuple[AxisTransform, Shape] | None:
    if any(stride % array.itemsize for stride in array.strides):
        return None
    strides = [stride // array.itemsize for stride in array.strides]
    return memory_order(Layout(shape_of(array.shape), shape_of(strides)))


def _in_kernel_type(channel: NDArray[Any]) -> NDArray[Any]:
    """Convert an integer channel that fits to int16, any other to float32."""
    if channel.dtype == np.int16 or channel.dtype == np.float32:
        return channel
    if channel.dtype.kind in "iu":
        limits = np.iinfo(np.int16)
        fits = channel.dtype.itemsize == 1
        if fits or (limits.min <= channel.min() and channel.max() <= limits.max):
            return channel.astype(np.int16, order="K")
    return channel.astype(np.float32, order="K")


def device_arrays(device: Device, volume: Volume) -> list[DeviceArray] | None:
    """Views of channels that another library put on the device; None for numpy arrays.

    Raises:
        VolumeError: Some channels are on the device and others are not, or their shapes differ.
    """
    if all(isinstance(channel, np.ndarray) for channel in volume.channels):
        return None
    with device.active():
        views = [device.view(channel) for channel in volume.channels]
    found: list[DeviceArray] = []
    for index, view in enumerate(views, start=1):
        if view is None:
            raise VolumeError(
                f"channel {index}: expected an array on {device.name}, as the others are, by "
                "__cuda_array_interface__ or DLPack",
                "copy it to the device",
            )
        found.append(view)
        if len(view.shape) != 3 or view.shape != found[0].shape:
            raise VolumeError(
                f"channel {index}: expected a 3-D array of the shape of channel 1, got {view.shape}"
            )
    return found


def _take(index: int, array: DeviceArray) -> DeviceChannel:
    """Channel in another library's array on the device, without a copy."""
    if array.dtype not in (np.int16, np.float32):
        raise VolumeError(
            f"channel {index + 1}: on a device, voxels must be int16 or float32, got {array.dtype}",
            "convert them",
        )
    order = memory_order(array.layout)
    if order is None:
        raise VolumeError(
            f"channel {index + 1}: on a device, voxels must be contiguous, got strides "
            f"{array.strides}",
            "make a contiguous copy",
        )
    transform, memory = order
    back = sum(array.strides[axis] * (array.shape[axis] - 1) for axis in transform.flips)
    size = prod(array.shape) * array.dtype.itemsize
    buffer = Region(array.pointer + back, size, array.owner)
    return DeviceChannel(buffer, memory, transform, array.dtype == np.float32)


def _send(device: Device, channel: NDArray[Any]) -> tuple[DeviceChannel, Mark]:
    """Start the copy of a channel to the device, in any thread."""
    channel = _in_kernel_type(channel)
    order = _array_order(channel)
    if order is None:
        channel = np.ascontiguousarray(channel)
        order = _array_order(channel)
    assert order is not None, "it was made contiguous"
    transform, memory = order
    with device.active():
        try:
            buffer, mark = device.upload_ahead(transform.invert(channel))
        except OutOfMemoryError as error:
            raise explain_upload(channel.nbytes, device.free_bytes()) from error
    return DeviceChannel(buffer, memory, transform, channel.dtype == np.float32), mark


def upload_image(device: Device, scan: Preprocessed) -> Upload:
    """Start the upload of an image that the host preprocessed."""
    with device.active():
        try:
            buffer, mark = device.upload_ahead(scan.image)
        except OutOfMemoryError as error:
            raise explain_upload(scan.image.nbytes, device.free_bytes()) from error
    return Upload((), scan.shape, (mark,), scan, buffer)


def upload(
    device: Device,
    channels: Sequence[NDArray[Any] | DeviceArray],
    transform: AxisTransform,
    threads: int = 1,
) -> Upload:
    """Start the upload of a volume; another thread may segment another volume meanwhile.

    Args:
        device: Device that segments the volume.
        channels: C arrays `(X, Y, Z)` of one shape: numpy arrays, or int16 or float32 arrays on
            this device, contiguous in any order of axes.
        transform: Transform to the model's orientation.
        threads: Number of CPU threads; one thread copies no more than about 6 GB/s.

    Raises:
        VolumeError: An array on the device has another data type, or is not contiguous.
        EngineError: The device failed.
    """

    def place(index: int, channel: NDArray[Any] | DeviceArray) -> tuple[DeviceChannel, Mark | None]:
        if isinstance(channel, DeviceArray):
            return _take(index, channel.viewed(transform.layout(channel.layout))), None
        return _send(device, transform.apply(channel))

    with mapping(min(threads, len(channels))) as each:
        placed = list(each(place, count(), channels))
    marks = tuple(mark for _, mark in placed if mark is not None)
    shape = transform.shape(channels[0].shape)
    return Upload(tuple(channel for channel, _ in placed), shape, marks)
