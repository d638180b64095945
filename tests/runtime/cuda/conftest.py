"""Devices that the tests run on: the host always, the card with `-m gpu` where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from attnseg.runtime.cuda.cuda_device import CudaDevice
from attnseg.runtime.cuda.device import Device, HostDevice
from attnseg.runtime.errors import NotHereError


def open_card() -> CudaDevice:
    """The card; skips the test where there is none."""
    try:
        return CudaDevice()
    except NotHereError as error:
        pytest.skip(f"no CUDA device: {error}")


@pytest.fixture(params=["host", pytest.param("card", marks=pytest.mark.gpu)], scope="session")
def device(request: pytest.FixtureRequest, host: HostDevice) -> Iterator[Device]:
    opened: Device = host if request.param == "host" else open_card()
    with opened.active():
        yield opened
