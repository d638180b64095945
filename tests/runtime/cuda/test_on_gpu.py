"""What only a machine with a CUDA device can show: `pytest -m gpu` with the extra `gpu`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from attnseg import Bundle, Segmenter, SegmentOptions, Volume
from attnseg.export.export import ExportOptions, export_bundle
from attnseg.export.tensorrt import PORTABLE_TARGET, BuildOptions
from attnseg.runtime.cuda.device import CudaDevice, DeviceBuffer, HostDevice
from attnseg.runtime.cuda.executor import DeviceExecutor
from attnseg.runtime.engines.tensorrt import RTX_TARGETS
from attnseg.runtime.errors import EngineError
from attnseg.runtime.gpu import Gpu, find_gpu
from attnseg.synthetic import SyntheticCase
from tests.conftest import LinearEngine
from tests.runtime.cuda.host_kernels import HostKernels
from tests.runtime.cuda.test_executor import OnHost, options
from tests.test_cli import WEIGHTS

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def gpu() -> Gpu:
    try:
        return find_gpu()
    except EngineError as error:
        pytest.skip(f"no CUDA device: {error}")


@pytest.mark.parametrize("size", [1, 1000, 1 << 24])
def test_what_is_uploaded_comes_back(size: int) -> None:
    device = CudaDevice()
    content = np.random.default_rng(0).integers(0, 255, size).astype(np.uint8)
    first, second = device.allocate(size), device.allocate(size)
    device.upload(content, first)
    device.upload(content[::-1].copy(), second)  # through the same pinned memory
    for buffer, expected in ((first, content), (second, content[::-1])):
        back = np.empty(size, np.uint8)
        device.download(buffer, back)
        np.testing.assert_array_equal(back, expected)


def test_more_memory_than_there_is_is_one_clear_error(gpu: Gpu) -> None:
    with pytest.raises(EngineError, match=r"the GPU failed in allocating memory: .*OUT_OF_MEMORY"):
        CudaDevice().allocate(2 * gpu.memory_bytes)


def test_an_engine_of_tensorrt_rtx_finds_the_same_tumour(
    gpu: Gpu, small_synthetic: SyntheticCase, tmp_path_factory: pytest.TempPathFactory
) -> None:
    known = gpu.target in RTX_TARGETS
    build = BuildOptions(
        "tensorrt-rtx",
        gpu.target if known else PORTABLE_TARGET,
        compatibility="same" if known else "ampere+",
    )
    folder = tmp_path_factory.mktemp("rtx") / "model"
    exported = export_bundle(WEIGHTS, folder, ExportOptions(fp16=True, engines=(build,)))
    assert any(m.engine.startswith("tensorrt-rtx") for m in exported.report.measured)
    volume = Volume(small_synthetic.images, small_synthetic.affine)
    segmenter = Segmenter(exported.bundle, SegmentOptions(engine="tensorrt-rtx"))
    expected = Segmenter(Bundle.default(), SegmentOptions(precision="fp32")).segment(volume)
    assert np.mean(segmenter.segment(volume).labels != expected.labels) < 1e-3


class OnDevice:
    """An engine of host arrays as one of device memory."""

    batch, half = 2, False

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._engine = LinearEngine(np.random.default_rng(8).standard_normal((4, 4)))

    def enqueue(self, images: DeviceBuffer, logits: DeviceBuffer, window: Sequence[int]) -> None:
        batch = np.empty((self.batch, 4, *window), np.float32)
        self._device.download(images, batch)
        self._device.upload(np.ascontiguousarray(self._engine.infer(batch)), logits)


def test_the_executor_on_the_card_is_the_one_on_the_host(
    small_synthetic: SyntheticCase, tmp_path_factory: pytest.TempPathFactory
) -> None:
    card = CudaDevice()
    host = HostDevice(HostKernels(tmp_path_factory.mktemp("kernels")).launch)
    chosen = options(Bundle.default(), SegmentOptions(tta="paper"))
    channels = [np.asarray(c, np.int16) for c in small_synthetic.images]
    on_host = DeviceExecutor(host, OnHost(OnDevice(card)._engine, 2), chosen).segment(channels)
    for _ in range(2):
        on_card = DeviceExecutor(card, OnDevice(card), chosen).segment(channels)
        np.testing.assert_array_equal(on_card.labels, on_host.labels)
        np.testing.assert_array_equal(on_card.voxels, on_host.voxels)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_onnxruntime_on_the_gpu_finds_the_same_tumour(
    precision: str, small_synthetic: SyntheticCase, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("bundle") / "model"
    bundle = export_bundle(WEIGHTS, folder, ExportOptions(fp16=True)).bundle
    volume = Volume(small_synthetic.images, small_synthetic.affine)
    options = SegmentOptions(engine="onnxruntime-cuda", precision=precision)
    segmenter = Segmenter(bundle, options)  # the golden window is checked here
    expected = Segmenter(Bundle.default(), SegmentOptions(precision="fp32")).segment(volume)
    result = segmenter.segment(volume)
    assert segmenter.engine_info.device == find_gpu().name
    assert np.mean(result.labels != expected.labels) < 1e-3
