"""The CUDA driver API, with its errors as exceptions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from attnseg.runtime.cuda.compiler import compiler_version
from attnseg.runtime.cuda.gpu import Gpu
from attnseg.runtime.errors import (
    DeviceLostError,
    EngineError,
    OutOfMemoryError,
    Setting,
    UnavailableError,
)

_LEAST_TARGET = 75
_ON_THE_CPU = Setting("device", "cpu")

# After these the context is unusable: every later call returns the same error.
_LOST = {
    "CUDA_ERROR_ASSERT",
    "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    "CUDA_ERROR_CONTAINED",
    "CUDA_ERROR_DEINITIALIZED",
    "CUDA_ERROR_DEVICE_UNAVAILABLE",
    "CUDA_ERROR_ECC_UNCORRECTABLE",
    "CUDA_ERROR_EXTERNAL_DEVICE",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_NVLINK_UNCORRECTABLE",
    "CUDA_ERROR_TENSOR_MEMORY_LEAK",
    "CUDA_ERROR_UNKNOWN",
}


def _raise(step: str, name: str, meaning: str) -> None:
    text = f"the GPU failed in {step}: {name} ({meaning})"
    if name == "CUDA_ERROR_OUT_OF_MEMORY":
        raise OutOfMemoryError(text, "free memory on the GPU, see nvidia-smi")
    if name in _LOST:
        raise DeviceLostError(text, "the CUDA context is unusable; restart the process")
    if name in ("CUDA_ERROR_NO_BINARY_FOR_GPU", "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"):
        raise UnavailableError(text, "update the NVIDIA driver, or use {}", _ON_THE_CPU)
    raise EngineError(text)


def check_gpu(gpu: Gpu) -> None:
    """Raise `UnavailableError` if the kernels do not run on a GPU or its driver."""
    if int(gpu.target[2:]) < _LEAST_TARGET:
        raise UnavailableError(
            f"{gpu.name} has compute capability {gpu.capability}, the kernels need 7.5 (Turing) or "
            "newer",
            "use {}",
            _ON_THE_CPU,
        )
    compiler = compiler_version()
    if int(gpu.cuda_version.split(".")[0]) < compiler[0]:
        raise UnavailableError(
            f"the NVIDIA driver supports CUDA {gpu.cuda_version}, the kernels are compiled for "
            f"{compiler[0]}.{compiler[1]}",
            "update the driver, or use {}",
            _ON_THE_CPU,
        )


class Driver:
    """Functions of the driver API, which raise `EngineError` with the error's name and meaning."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self.names = driver

    def __call__(self, step: str, name: str, *args: Any) -> Any:
        """Call a function for a step; return its result, a tuple of several, or None."""
        status, *results = getattr(self.names, name)(*args)
        if int(status):
            _, error = self.names.cuGetErrorName(status)
            _, meaning = self.names.cuGetErrorString(status)
            _raise(step, error.decode(), meaning.decode())
        return results[0] if len(results) == 1 else tuple(results) or None


class Context:
    """The CUDA context that a device works in.

    Attributes:
        driver: Functions of the driver API.
        primary: Whether it is the primary context of its GPU, which the CUDA runtime uses.
    """

    def __init__(self, driver: Driver, ordinal: int) -> None:
        """Use the context that is current in this thread, or retain the GPU's primary one.

        The primary context is retained until the process ends.
        """
        self.driver = driver
        device = driver("opening the GPU", "cuDeviceGet", ordinal)
        self._handle = driver("opening the GPU", "cuCtxGetCurrent")
        self.primary = not int(self._handle)
        if self.primary:
            self._handle = driver("opening the GPU", "cuDevicePrimaryCtxRetain", device)
            return
        _, active = driver("opening the GPU", "cuDevicePrimaryCtxGetState", device)
        if active:  # the current context may be the primary one
            primary = driver("opening the GPU", "cuDevicePrimaryCtxRetain", device)
            self.primary = int(primary) == int(self._handle)
            driver("opening the GPU", "cuDevicePrimaryCtxRelease", device)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the context current in the calling thread for the body of a `with`."""
        self.driver("making the context current", "cuCtxPushCurrent", self._handle)
        try:
            yield
        finally:
            with suppress(EngineError):  # an error of the body is the one to report
                self.driver("leaving the context", "cuCtxPopCurrent")
