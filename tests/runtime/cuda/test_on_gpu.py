"""What only a machine with a CUDA device can show: `pytest -m gpu` with the extra `gpu`."""

from __future__ import annotations

import numpy as np
import pytest

from attnseg import Bundle, Segmenter, SegmentOptions, Volume
from attnseg.export.export import ExportOptions, export_bundle
from attnseg.runtime.cuda.device import CudaDevice
from attnseg.runtime.errors import EngineError
from attnseg.runtime.gpu import Gpu, find_gpu
from attnseg.synthetic import SyntheticCase
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
