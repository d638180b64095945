"""Exchange of device arrays with other libraries, by cuda-core."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from attnseg.runtime.cuda.device import Device, DeviceArray
from attnseg.runtime.errors import EngineError


def view_array(array: Any, device: Device) -> DeviceArray | None:
    """See `Device.view`."""
    if isinstance(array, np.ndarray):
        return None
    if not (hasattr(array, "__cuda_array_interface__") or hasattr(array, "__dlpack__")):
        return None
    from cuda.core.utils import StridedMemoryView

    try:
        found = StridedMemoryView.from_any_interface(array, stream_ptr=device.stream)
        dtype = np.dtype(found.dtype)
    except Exception as error:  # raised by the array's library or cuda-core; no common base
        raise EngineError(f"the GPU failed in importing an array: {error}") from error
    if not found.is_device_accessible:
        return None
    if found.device_id != device.ordinal:
        raise EngineError(
            f"an array is on GPU {found.device_id}, the model is on GPU {device.ordinal}",
            "copy it to the GPU of the model",
        )
    strides = found.strides or _c_strides(found.shape)
    return DeviceArray(
        pointer=int(found.ptr),
        shape=tuple(found.shape),
        strides=tuple(s * dtype.itemsize for s in strides),
        dtype=dtype,
        owner=found,
        device=device,
    )


def export_array(array: DeviceArray) -> Any:
    """See `Device.exported`."""
    from cuda.core import Buffer
    from cuda.core.utils import StridedMemoryView

    buffer = Buffer.from_handle(array.pointer, array.owner.size_bytes, owner=array)
    strides = array.layout.strides
    return StridedMemoryView.from_buffer(buffer, array.shape, strides, dtype=array.dtype)


def _c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
