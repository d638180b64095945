from __future__ import annotations

import ctypes
import sys
from typing import Any

import cuda.core
import pytest
from cuda.bindings import driver

from attnseg.runtime.cuda.gpu import Gpu, capability, find_gpu
from attnseg.runtime.errors import EngineError


def devices(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None = None, current: int | None = None
) -> None:
    """cuda-core on a machine with an RTX 3090, or with an error."""

    class Device:
        name, arch, device_id = "NVIDIA GeForce RTX 3090", "86", 0

        def __init__(self, _: int) -> None:
            if error:
                raise error

    monkeypatch.setattr(cuda.core, "Device", Device)
    monkeypatch.setattr(driver, "cuCtxGetCurrent", lambda: (0, 0 if current is None else 77))
    monkeypatch.setattr(driver, "cuCtxGetDevice", lambda: (current is None, current))
    monkeypatch.setattr(driver, "cuDeviceTotalMem", lambda _: (0, 24 << 30))
    monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: (0, 13010))


def test_the_gpu_is_described_as_people_speak_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    devices(monkeypatch)
    gpu = find_gpu()
    assert gpu == Gpu("NVIDIA GeForce RTX 3090", "sm86", 24 << 30, "13.1")
    assert str(gpu) == (
        "NVIDIA GeForce RTX 3090, compute capability 8.6, 24 GiB, driver for CUDA 13.1"
    )


def test_the_callers_gpu_is_the_one_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    devices(monkeypatch, current=3)
    assert find_gpu().ordinal == 3


@pytest.mark.parametrize(("target", "expected"), [("sm86", "8.6"), ("sm120", "12.0")])
def test_a_target_is_a_compute_capability(target: str, expected: str) -> None:
    assert capability(target) == expected


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("Ensure the NVIDIA display driver is installed."), "no NVIDIA driver on"),
        (RuntimeError("CUDA_ERROR_NO_DEVICE: no device"), "no CUDA device .see CUDA_VISIBLE"),
        (RuntimeError("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"), "restart the machine"),
        (
            RuntimeError("CUDA_ERROR_UNKNOWN:\nwhat"),
            r"does not start \(CUDA_ERROR_UNKNOWN: what",
        ),
    ],
)
def test_what_is_missing_is_said_in_words(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    devices(monkeypatch, error)
    with pytest.raises(EngineError, match=message) as caught:
        find_gpu()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("driver_here", "message"),
    [
        (True, r"^cuda-core is not installed; pip install '\.\[gpu\]'"),
        (False, "^no NVIDIA driver on this machine$"),  # the extra would not help
    ],
)
def test_without_cuda_core_the_extra_is_named_only_where_there_is_a_driver(
    monkeypatch: pytest.MonkeyPatch, driver_here: bool, message: str
) -> None:
    def load(name: str) -> None:
        if not driver_here:
            raise OSError(f"{name}: cannot open shared object file")

    missing: Any = None
    monkeypatch.setitem(sys.modules, "cuda.core", missing)
    monkeypatch.setattr(ctypes, "CDLL", load)
    with pytest.raises(EngineError, match=message):
        find_gpu()
