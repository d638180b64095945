from __future__ import annotations

import numpy as np
import pytest

from attnseg.runtime.cuda.device import Region
from attnseg.runtime.errors import EngineError
from tests.runtime.cuda.host_device import HostDevice


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.int16, np.uint8])
def test_what_is_uploaded_comes_back(kind: type) -> None:
    device = HostDevice()
    content = np.arange(24).reshape(2, 3, 4).astype(kind)
    buffer = device.allocate(content.nbytes + 5)
    device.upload(content, buffer)
    content[:] = 0  # the device has its own copy
    back = np.empty((4, 6), kind)
    device.download(buffer, back)
    np.testing.assert_array_equal(back, np.arange(24).reshape(4, 6).astype(kind))


def test_a_pointer_is_where_the_bytes_are() -> None:
    device = HostDevice()
    buffer = device.allocate(8)
    device.upload(np.arange(8, dtype=np.uint8), buffer)
    assert buffer.pointer == buffer.bytes.ctypes.data
    np.testing.assert_array_equal(buffer.bytes, np.arange(8))
    assert buffer.size_bytes == 8


def test_a_region_is_a_part_that_keeps_the_whole() -> None:
    device = HostDevice()
    region = Region.of(device.allocate(8), 2, 3)
    whole = region.buffer
    device.clear(whole)
    device.upload(np.array([7, 8, 9], np.uint8), region)
    back = np.empty(8, np.uint8)
    device.download(whole, back)
    assert back.tolist() == [0, 0, 7, 8, 9, 0, 0, 0]
    device.clear(region)
    np.testing.assert_array_equal(device.download_behind(whole).wait(), np.zeros(8))


def test_without_kernels_nothing_is_launched() -> None:
    with pytest.raises(EngineError, match="opened without kernels"):
        HostDevice().launch("scan", 1, None)  # type: ignore[arg-type]
