from __future__ import annotations

import numpy as np
import pytest

from attnseg.runtime.cuda.device import CudaDevice, HostDevice, _in
from attnseg.runtime.errors import EngineError


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


def test_an_error_of_cuda_names_itself_and_the_step() -> None:
    @_in("upload")
    def fails(text: str) -> None:
        raise RuntimeError(text)

    message = r"the GPU failed in upload: CUDA_ERROR_LAUNCH_FAILED: it failed$"
    with pytest.raises(EngineError, match=message):
        fails("CUDA_ERROR_LAUNCH_FAILED:\nit failed")
    with pytest.raises(EngineError, match="OUT_OF_MEMORY; free memory on the GPU"):
        fails("CUDA_ERROR_OUT_OF_MEMORY")


def test_without_a_gpu_the_cuda_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise EngineError("no NVIDIA driver on this machine")

    monkeypatch.setattr("attnseg.runtime.cuda.device.find_gpu", none)
    with pytest.raises(EngineError, match="no NVIDIA driver"):
        CudaDevice()
