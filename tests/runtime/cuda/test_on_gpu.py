"""Tests that require a CUDA device: `pytest -m gpu`, with the extra `gpu` installed.

The tests of the kernels and the executor then run on the GPU too, by their fixture `device`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnseg import Bundle, Segmenter, SegmentOptions, Volume
from attnseg.export.engines.tensorrt import PORTABLE_TARGET, BuildOptions
from attnseg.export.export import ExportOptions, export_bundle
from attnseg.runtime.cuda.cuda_device import CudaDevice
from attnseg.runtime.cuda.device import DeviceArray
from attnseg.runtime.cuda.gpu import Gpu, find_gpu
from attnseg.runtime.engines.tensorrt import RTX_TARGETS
from attnseg.runtime.errors import EngineError, OutOfMemoryError
from attnseg.synthetic import SyntheticCase
from tests.conftest import WEIGHTS, LinearEngine
from tests.runtime.cuda.engines import Through
from tests.runtime.cuda.host_device import HostDevice
from tests.runtime.cuda.test_cuda_device import check_recording

pytestmark = pytest.mark.gpu
LINEAR = LinearEngine(np.random.default_rng(8).standard_normal((4, 4)))


@pytest.fixture(scope="module", autouse=True)
def gpu() -> Gpu:
    try:
        return find_gpu()
    except EngineError as error:
        pytest.skip(f"no CUDA device: {error}")


@pytest.fixture(scope="module")
def volume(small_synthetic: SyntheticCase) -> Volume:
    return Volume(small_synthetic.images, small_synthetic.affine)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shipped model with an fp16 graph."""
    folder = tmp_path_factory.mktemp("graphs") / "model"
    return export_bundle(WEIGHTS, folder, ExportOptions(fp16=True)).bundle


@pytest.fixture(scope="module")
def rtx(gpu: Gpu, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shipped model with an engine of TensorRT-RTX for this GPU, or for all since Ampere."""
    known = gpu.target in RTX_TARGETS
    build = BuildOptions(
        "tensorrt-rtx",
        gpu.target if known else PORTABLE_TARGET,
        compatibility="same" if known else "ampere+",
    )
    folder = tmp_path_factory.mktemp("rtx") / "model"
    exported = export_bundle(WEIGHTS, folder, ExportOptions(fp16=True, engines=(build,)))
    for absent in exported.report.not_run:
        if absent.engine.startswith("tensorrt-rtx") and not known:
            pytest.skip(f"TensorRT-RTX does not list this GPU, and refuses it: {absent.reason}")
    return exported.bundle


@pytest.mark.parametrize("size", [1, 1000, 1 << 24])
def test_what_is_uploaded_comes_back(size: int) -> None:
    device = CudaDevice()
    content = np.random.default_rng(0).integers(0, 255, size).astype(np.uint8)
    with device.active():
        first = device.allocate(size)
        device.upload(content, first)
        second, mark = device.upload_ahead(content[::-1].copy())
        device.after(mark)
        for buffer, expected in ((first, content), (second, content[::-1])):
            back = np.empty(size, np.uint8)
            device.download(buffer, back)
            np.testing.assert_array_equal(back, expected)
            np.testing.assert_array_equal(device.download_behind(buffer).wait(), expected)


def test_more_memory_than_there_is_is_one_clear_error(gpu: Gpu) -> None:
    device = CudaDevice()
    message = r"the GPU failed in allocating memory: .*OUT_OF_MEMORY"
    with device.active(), pytest.raises(OutOfMemoryError, match=message):
        device.allocate(2 * gpu.memory_bytes)


def test_recorded_work_is_repeated() -> None:
    check_recording(CudaDevice())


def test_the_card_gives_the_labels_of_the_host(host: HostDevice, volume: Volume) -> None:
    chosen = SegmentOptions(tta="paper")
    on_host, on_card, again = (
        Segmenter(Bundle.default(), chosen, Through(device, LINEAR)).segment(volume).labels
        for device in (host, CudaDevice(), CudaDevice())
    )
    np.testing.assert_array_equal(on_card, on_host)
    assert on_card.tobytes() == again.tobytes()


ENGINES = [
    ("rtx", "tensorrt-rtx", "fp16"),
    ("graphs", "onnxruntime-cuda", "fp16"),
    ("graphs", "onnxruntime-cuda", "fp32"),
]


@pytest.mark.parametrize(("files", "engine", "precision"), ENGINES)
def test_an_engine_finds_the_same_tumour_and_the_same_bytes(
    files: str, volume: Volume, engine: str, precision: str, request: pytest.FixtureRequest
) -> None:
    bundle: Bundle = request.getfixturevalue(files)
    chosen = SegmentOptions(device="cuda", engine=engine, precision=precision, tta="paper")
    segmenter = Segmenter(bundle, chosen)  # the golden window is checked here
    on_processor = SegmentOptions(device="cpu", precision="fp32", tta="paper")
    expected = Segmenter(bundle, on_processor).segment(volume)
    first, second = (segmenter.segment(volume) for _ in range(2))
    assert first.labels.tobytes() == second.labels.tobytes()
    assert first.engine.device == find_gpu().name
    assert np.mean(first.labels != expected.labels) < 1e-3
    staged = [segmenter.stage(volume) for _ in range(3)]
    for pending in [segmenter.submit(one) for one in staged]:
        assert pending.result().labels.tobytes() == first.labels.tobytes()


@pytest.mark.parametrize(("files", "engine", "precision"), ENGINES)
def test_less_memory_changes_few_labels(
    files: str, volume: Volume, engine: str, precision: str, request: pytest.FixtureRequest
) -> None:
    """ONNX Runtime may compute otherwise for another batch size, an engine file has only one."""
    bundle: Bundle = request.getfixturevalue(files)
    chosen = SegmentOptions(device="cuda", engine=engine, precision=precision)
    expected = Segmenter(bundle, chosen).segment(volume)
    tight = replace(chosen, max_memory_bytes=4 * 10**9)
    differ = Segmenter(bundle, tight).segment(volume).labels != expected.labels
    assert np.mean(differ) < (1e-3 if engine == "onnxruntime-cuda" else 1e-12)


@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_arrays_of_other_libraries_come_and_go_on_the_card(volume: Volume, library: str) -> None:
    module = pytest.importorskip(library)
    segmenter = Segmenter(Bundle.default(), SegmentOptions(), Through(CudaDevice(), LINEAR))
    expected = segmenter.segment(volume).labels
    place: Any = module.asarray if library == "cupy" else lambda a: module.as_tensor(a).cuda()
    channels = [place(np.ascontiguousarray(c)) for c in volume.channels]
    found = segmenter.segment(Volume(channels, volume.affine), on_device=True).labels
    assert isinstance(found, DeviceArray)
    by_interface = module.asarray(found) if library == "cupy" else module.as_tensor(found)
    by_dlpack = module.from_dlpack(found)
    for theirs in (by_interface, by_dlpack):
        on_host = theirs.get() if library == "cupy" else theirs.cpu().numpy()
        np.testing.assert_array_equal(on_host, expected)


def test_kernels_are_kept_in_the_cache(tmp_path: Path) -> None:
    device = CudaDevice(cache=tmp_path)
    with device.active():
        assert device._function("scan")
    (file,) = tmp_path.iterdir()
    assert file.name.startswith(f"kernels-{find_gpu().target}")
