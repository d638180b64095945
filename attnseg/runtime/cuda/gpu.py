"""The GPU of this machine, found by cuda-core (extra `gpu`)."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

from attnseg.runtime.errors import UnavailableError
from attnseg.runtime.extras import install

_NO_DRIVER = "no NVIDIA driver on this machine"


@dataclass(frozen=True)
class Gpu:
    """A CUDA device.

    Attributes:
        name: Name of the product.
        target: Compute capability, `sm86` for 8.6.
        memory_bytes: Total device memory.
        cuda_version: CUDA version that the driver supports, such as `13.0`.
        ordinal: CUDA device ordinal.
    """

    name: str
    target: str
    memory_bytes: int
    cuda_version: str
    ordinal: int = 0

    @property
    def capability(self) -> str:
        """Compute capability with a dot, `8.6`."""
        return capability(self.target)

    def __str__(self) -> str:
        return (
            f"{self.name}, compute capability {self.capability}, "
            f"{self.memory_bytes / 2**30:.0f} GiB, driver for CUDA {self.cuda_version}"
        )


def capability(target: str) -> str:
    """Compute capability with a dot: `8.6` for `sm86`."""
    return f"{target[2:-1]}.{target[-1]}"


def find_gpu() -> Gpu:
    """Find the CUDA device of the current context, or the first (see `CUDA_VISIBLE_DEVICES`).

    Raises:
        UnavailableError: cuda-core is missing, or there is no driver or no device.
    """
    try:
        from cuda.bindings import driver
        from cuda.core import Device
    except ImportError as error:
        if not _has_driver():  # which no package would bring
            raise UnavailableError(_NO_DRIVER) from error
        raise UnavailableError("cuda-core is not installed", install("gpu")) from error
    try:
        Device(0)  # starts CUDA
        _, context = driver.cuCtxGetCurrent()
        ordinal = int(driver.cuCtxGetDevice()[1]) if int(context) else 0
        device = Device(ordinal)
        _, memory_bytes = driver.cuDeviceTotalMem(device.device_id)
        _, version = driver.cuDriverGetVersion()
    except Exception as error:  # cuda-core's errors share no base but Exception
        raise UnavailableError(_why(error)) from error
    cuda = f"{version // 1000}.{version % 1000 // 10}"
    return Gpu(device.name, f"sm{device.arch}", int(memory_bytes), cuda, ordinal)


def _has_driver() -> bool:
    """Whether the library of the NVIDIA driver can be loaded."""
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _why(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "NVIDIA display driver" in text or "libcuda" in text or "nvcuda" in text:
        return _NO_DRIVER
    if "CUDA_ERROR_NO_DEVICE" in text or "CUDA_ERROR_INVALID_DEVICE" in text:
        return "no CUDA device (see CUDA_VISIBLE_DEVICES and nvidia-smi)"
    if "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" in text or "CUDA_ERROR_INVALID_IMAGE" in text:
        return f"the NVIDIA driver does not fit its libraries: restart the machine ({text})"
    return f"CUDA does not start ({text})"
