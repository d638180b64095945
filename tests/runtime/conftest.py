"""The host in a device's place."""

from __future__ import annotations

import pytest

from attnseg.runtime.cuda.device import HostDevice
from tests.runtime.cuda.host_kernels import HostKernels


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> HostDevice:
    return HostDevice(HostKernels(tmp_path_factory.mktemp("kernels")).launch)
