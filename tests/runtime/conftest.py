"""Devices that the tests run on: always the host, and with `-m gpu` a GPU if there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from attnseg.runtime.cuda.cuda_device import CudaDevice
from attnseg.runtime.cuda.device import Device
from attnseg.runtime.errors import UnavailableError
from tests.runtime.cuda.host_device import HostBuffer, HostDevice
from tests.runtime.cuda.host_kernels import HostKernels


class Poisoned(HostDevice):
    """Gives memory that holds what nobody expects, as a card may."""

    def allocate(self, size_bytes: int) -> HostBuffer:
        """See `HostDevice.allocate`."""
        buffer = super().allocate(size_bytes)
        buffer.bytes[:] = 0xA5
        return buffer


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> HostDevice:
    return Poisoned(HostKernels(tmp_path_factory.mktemp("kernels")).launch)


def open_card() -> CudaDevice:
    """The card; skips the test where there is none."""
    try:
        return CudaDevice()
    except UnavailableError as error:
        pytest.skip(f"no CUDA device: {error}")


@pytest.fixture(params=["host", pytest.param("card", marks=pytest.mark.gpu)], scope="session")
def device(request: pytest.FixtureRequest, host: HostDevice) -> Iterator[Device]:
    opened: Device = host if request.param == "host" else open_card()
    with opened.active():
        yield opened
