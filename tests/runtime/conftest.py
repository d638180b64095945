"""The host in a device's place."""

from __future__ import annotations

import pytest

from attnseg.runtime.cuda.device import HostBuffer, HostDevice
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
