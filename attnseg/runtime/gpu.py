"""The GPU of this machine, by cuda-core (extra `gpu`)."""

from __future__ import annotations

from dataclasses import dataclass

from attnseg.runtime.errors import NotHereError


@dataclass(frozen=True)
class Gpu:
    """A CUDA device.

    Attributes:
        name: as its maker calls it.
        target: compute capability, `sm86` for 8.6.
        memory_bytes: in all.
        driver: CUDA version of the driver, `13.0`.
        number: by which CUDA counts it.
    """

    name: str
    target: str
    memory_bytes: int
    driver: str
    number: int = 0

    @property
    def capability(self) -> str:
        """Compute capability with a dot, `8.6`."""
        return capability(self.target)

    def __str__(self) -> str:
        return (
            f"{self.name}, compute capability {self.capability}, "
            f"{self.memory_bytes / 2**30:.0f} GiB, driver for CUDA {self.driver}"
        )


def capability(target: str) -> str:
    """`8.6` for `sm86`."""
    return f"{target[2:-1]}.{target[-1]}"


def find_gpu() -> Gpu:
    """The CUDA device of the current context, or the first (see `CUDA_VISIBLE_DEVICES`).

    Raises:
        NotHereError: cuda-core is missing, or there is no driver or no device.
    """
    try:
        from cuda.bindings import driver
        from cuda.core import Device
    except ImportError as error:
        raise NotHereError("cuda-core is not installed; pip install 'attnseg[gpu]'") from error
    try:
        Device(0)  # starts CUDA
        status, current = driver.cuCtxGetDevice()
        number = 0 if int(status) else int(current)
        device = Device(number)
        _, memory_bytes = driver.cuDeviceTotalMem(device.device_id)
        _, version = driver.cuDriverGetVersion()
    except Exception as error:  # cuda-core's errors share no base but Exception
        raise NotHereError(_why(error)) from error
    cuda = f"{version // 1000}.{version % 1000 // 10}"
    return Gpu(device.name, f"sm{device.arch}", int(memory_bytes), cuda, number)


def _why(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "NVIDIA display driver" in text or "libcuda" in text or "nvcuda" in text:
        return "no NVIDIA driver on this machine"
    if "CUDA_ERROR_NO_DEVICE" in text or "CUDA_ERROR_INVALID_DEVICE" in text:
        return "no CUDA device (see CUDA_VISIBLE_DEVICES and nvidia-smi)"
    if "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" in text or "CUDA_ERROR_INVALID_IMAGE" in text:
        return f"the NVIDIA driver does not fit its libraries: restart the machine ({text})"
    return f"CUDA does not start ({text})"
