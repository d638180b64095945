"""`CudaDevice` on a driver stand-in on host memory: which calls it makes, and in what order."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda.bindings
import numpy as np
import pytest

from attnseg import Bundle, Segmenter, SegmentOptions, Volume
from attnseg.runtime.cuda import cuda_device
from attnseg.runtime.cuda.cuda_device import CudaDevice
from attnseg.runtime.cuda.gpu import Gpu
from attnseg.runtime.errors import (
    ConfigError,
    DeviceLostError,
    EngineError,
    OutOfMemoryError,
    UnavailableError,
)
from attnseg.synthetic import SyntheticCase
from tests.conftest import LinearEngine
from tests.runtime.cuda.engines import Through
from tests.runtime.cuda.host_driver import CALLERS_CONTEXT, CONTEXT, HostDriver
from tests.runtime.cuda.host_kernels import HostKernels

LINEAR = LinearEngine(np.random.default_rng(8).standard_normal((4, 4)).astype(np.float32))
Open = Callable[..., tuple[CudaDevice, HostDriver]]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    return HostKernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def opened(kernels: HostKernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Open:
    def open_it(stream: int | None = None, **driver: Any) -> tuple[CudaDevice, HostDriver]:
        stand_in = HostDriver(kernels, **driver)
        monkeypatch.setattr(cuda.bindings, "driver", stand_in)
        monkeypatch.setattr(cuda_device, "find_gpu", lambda: Gpu("RTX", "sm86", 24 << 30, "13.0"))
        return CudaDevice(stream, tmp_path / "cache"), stand_in

    return open_it


@pytest.fixture(scope="module")
def volume(small_synthetic: SyntheticCase) -> Volume:
    return Volume(small_synthetic.images, small_synthetic.affine)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise UnavailableError("no NVIDIA driver on this machine")

    monkeypatch.setattr(cuda_device, "find_gpu", none)
    with pytest.raises(UnavailableError, match="no NVIDIA driver"):
        CudaDevice()


@pytest.mark.parametrize(
    ("gpu", "message"),
    [
        (
            Gpu("GTX 1080", "sm61", 8 << 30, "13.0"),
            r"GTX 1080 has compute capability 6.1, the kernels need 7.5 \(Turing\) or newer; use",
        ),
        (
            Gpu("RTX", "sm86", 8 << 30, "11.8"),
            r"driver supports CUDA 11.8, the kernels are compiled for \d+\.\d+; update the driver",
        ),
    ],
)
def test_a_gpu_or_a_driver_that_is_too_old_is_refused(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu, message: str
) -> None:
    monkeypatch.setattr(cuda_device, "find_gpu", lambda: gpu)
    with pytest.raises(UnavailableError, match=message):
        CudaDevice()


def test_what_is_uploaded_comes_back(opened: Open) -> None:
    device, driver = opened()
    with device.active():
        for size in (1, 1000, 77):
            content = np.random.default_rng(size).integers(0, 255, size).astype(np.uint8)
            expected = content.copy()
            first = device.allocate(size)
            device.upload(content, first)
            second, _ = device.upload_ahead(content)
            content[:] = 0  # the device has its own copy
            back = np.empty(size, np.uint8)
            device.download(first, back)
            np.testing.assert_array_equal(back, expected)
            download = device.download_behind(second)
            for _ in range(2):
                np.testing.assert_array_equal(download.wait(), expected)
            device.clear(first)
            device.download(first, back)
            assert not back.any()
    assert driver.contexts == []


def test_memory_is_freed_with_its_last_reference(opened: Open) -> None:
    device, driver = opened()
    with device.active():
        buffer = device.allocate(1000)
        assert driver.used() == 1000
        del buffer
    assert driver.used() == 0


@pytest.mark.parametrize("tta", ["none", "paper"])
def test_the_whole_executor_runs_on_it(opened: Open, volume: Volume, tta: str) -> None:
    device, driver = opened()
    segmenter = Segmenter(Bundle.default(), SegmentOptions(tta=tta), Through(device, LINEAR))
    expected = Segmenter(Bundle.default(), SegmentOptions(tta=tta), LINEAR).segment(volume)
    for _ in range(2):
        result = segmenter.segment(volume)
        np.testing.assert_array_equal(result.labels, expected.labels)
    assert set(result.elapsed_ms) >= {"upload", "preprocess", "network", "blend", "download"}
    del result
    held = driver.used()
    segmenter.segment(volume)
    assert driver.used() == held  # no memory leak
    assert driver.contexts == []


def test_volumes_come_and_go_in_other_threads(opened: Open, volume: Volume) -> None:
    device, _ = opened()
    segmenter = Segmenter(Bundle.default(), SegmentOptions(), Through(device, LINEAR))
    expected = segmenter.segment(volume).labels
    found: list[Any] = []
    staged: list[Any] = []

    def stage() -> None:
        staged.append(segmenter.stage(volume))

    worker = threading.Thread(target=stage)
    worker.start()
    worker.join()
    pending = segmenter.submit(staged[0])
    worker = threading.Thread(target=lambda: found.append(pending.result().labels))
    worker.start()
    worker.join()
    np.testing.assert_array_equal(found[0], expected)


def test_the_callers_context_and_stream_are_used_and_left(opened: Open, volume: Volume) -> None:
    device, driver = opened(stream=77, current=CALLERS_CONTEXT)
    assert device.stream == 77
    assert "cuDevicePrimaryCtxRetain" not in driver.calls  # it would allocate memory
    segmenter = Segmenter(Bundle.default(), SegmentOptions(), Through(device, LINEAR))
    labels = segmenter.segment(volume, on_device=True).labels
    assert driver.contexts == [CALLERS_CONTEXT]
    interface = labels.__cuda_array_interface__
    assert interface["stream"] == 77 and interface["version"] == 3
    assert interface["shape"] == volume.shape and interface["typestr"] == "|u1"
    assert interface["strides"] == (1, volume.shape[0], volume.shape[0] * volume.shape[1])


def test_without_a_context_it_is_the_primary_one(opened: Open) -> None:
    device, driver = opened()
    with device.active():
        assert driver.contexts == [CONTEXT]


def check_recording(device: CudaDevice) -> None:
    with device.active():
        source, target = device.allocate(4), device.allocate(4)

        def work(stream: int) -> None:
            assert stream != device.stream
            device._copy("a test", source.pointer, target.pointer, 4, stream)

        repeat = device.recorded(work)
        for value in (b"abcd", b"efgh"):
            device.upload(np.frombuffer(value, np.uint8), source)
            repeat()
            back = np.empty(4, np.uint8)
            device.download(target, back)
            assert back.tobytes() == value


def test_recorded_work_is_repeated(opened: Open) -> None:
    check_recording(opened()[0])


@pytest.mark.parametrize(
    "where", ["work", "cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"]
)
def test_work_that_cannot_be_recorded_is_an_error_that_leaves_the_device_usable(
    opened: Open, where: str
) -> None:
    device, driver = opened()

    def work(stream: int) -> None:
        if where == "work":
            raise EngineError("not while a graph is taken")

    if where != "work":
        driver.fails[where] = ["CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"]
    with device.active():
        with pytest.raises(EngineError, match=r"not while a graph is taken|STREAM_CAPTURE_INVALID"):
            device.recorded(work)
        driver.fails.clear()
        device.recorded(lambda _: None)()  # later work can be recorded


def test_what_stops_a_recording_leaves_the_stream_usable(opened: Open) -> None:
    device, driver = opened()

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with device.active(), pytest.raises(KeyboardInterrupt):
        device.recorded(interrupt)
    assert "cuStreamEndCapture" in driver.calls
    driver.fails["cuGraphInstantiate"] = ["CUDA_ERROR_ILLEGAL_ADDRESS"]
    with device.active(), pytest.raises(DeviceLostError):
        device.recorded(lambda _: None)


def test_a_device_that_is_not_used_any_more_leaves_nothing(opened: Open, volume: Volume) -> None:
    device, driver = opened()
    segmenter = Segmenter(Bundle.default(), SegmentOptions(), Through(device, LINEAR))
    segmenter.segment(volume)
    assert driver.used() > 0
    del segmenter, device
    gc.collect()
    assert driver.used() == 0
    assert driver.calls.count("cuStreamDestroy") == driver.calls.count("cuStreamCreate") == 4
    assert driver.calls.count("cuMemPoolDestroy") == 1
    assert driver.contexts == []


@pytest.mark.parametrize(("current", "primary"), [(0, True), (CONTEXT, True), (12, False)])
def test_libraries_are_told_whether_it_is_the_primary_context(
    opened: Open, current: int, primary: bool
) -> None:
    assert opened(current=current)[0].primary == primary


def test_streams_that_change_with_the_thread_are_refused(opened: Open) -> None:
    assert opened(stream=0)[0].stream == 1  # CU_STREAM_LEGACY, the default stream
    with pytest.raises(ConfigError, match="per-thread default stream differs in each"):
        opened(stream=2)


def test_memory_that_is_freed_later_is_waited_for(opened: Open) -> None:
    device, driver = opened()
    driver.fails["cuMemAllocFromPoolAsync"] = ["CUDA_ERROR_OUT_OF_MEMORY"]
    with device.active():
        assert device.allocate(100).size_bytes == 100
    assert "cuMemPoolTrimTo" in driver.calls


def test_pinned_memory_is_the_hosts(opened: Open) -> None:
    device, driver = opened()
    driver.fails["cuMemHostAlloc"] = ["CUDA_ERROR_OUT_OF_MEMORY"]
    with device.active(), pytest.raises(EngineError, match="host has no 1 MB of pinned memory"):
        device.upload_ahead(np.zeros(10, np.uint8))


@pytest.mark.parametrize(
    ("function", "error", "kind", "message"),
    [
        (
            "cuMemAllocFromPoolAsync",
            "CUDA_ERROR_OUT_OF_MEMORY",
            OutOfMemoryError,
            r"a channel of the volume takes 2 MB of device memory, \d+ MB are free; close other",
        ),
        (
            "cuLaunchKernel",
            "CUDA_ERROR_INVALID_VALUE",
            EngineError,
            r"the GPU failed in kernel scan: CUDA_ERROR_INVALID_VALUE \(what it means\)$",
        ),
        (
            "cuStreamSynchronize",
            "CUDA_ERROR_ILLEGAL_ADDRESS",
            DeviceLostError,
            "failed in download: CUDA_ERROR_ILLEGAL_ADDRESS .* the CUDA context is unusable",
        ),
        (
            "cuModuleLoadData",
            "CUDA_ERROR_NO_BINARY_FOR_GPU",
            UnavailableError,
            "failed in loading kernels: .*; update the NVIDIA driver, or use device=",
        ),
    ],
)
def test_an_error_carries_its_name_its_meaning_and_the_step(
    opened: Open,
    volume: Volume,
    function: str,
    error: str,
    kind: type[Exception],
    message: str,
) -> None:
    device, driver = opened()
    segmenter = Segmenter(Bundle.default(), SegmentOptions(), Through(device, LINEAR))
    driver.fails[function] = [error] * 2  # memory is requested twice
    with pytest.raises(kind, match=message):
        segmenter.segment(volume)
    assert driver.contexts == []


def test_a_smaller_batch_is_tried_where_memory_is_short(opened: Open, volume: Volume) -> None:
    for memory, message in ((38 * 10**6, ""), (20 * 10**6, r"takes \d+ MB .* at least \d+ MB")):
        device, _ = opened(memory=memory)
        engine = Through(device, LINEAR)
        segmenter = Segmenter(Bundle.default(), SegmentOptions(window=32), engine)
        if message:
            with pytest.raises(OutOfMemoryError, match=message):
                segmenter.segment(volume)
        else:
            assert segmenter.segment(volume).memory["logits"] == "fp16"


def test_memory_of_the_first_try_is_free_for_the_second(opened: Open, volume: Volume) -> None:
    chosen = SegmentOptions(window=32)
    device, driver = opened()
    roomy = Segmenter(Bundle.default(), chosen, Through(device, LINEAR))
    roomy.segment(volume)
    needed = max(array.size for array in driver.live.values())
    device, driver = opened(memory=needed + 8 * 10**6)  # plus the volume, not a second set
    engine = Through(device, LINEAR)
    engine.failures += [OutOfMemoryError("no memory for a batch of 3")]
    segmenter = Segmenter(Bundle.default(), chosen, engine)
    assert segmenter.segment(volume).memory["batch"] == 1
    engine.failures += [OutOfMemoryError("none"), OutOfMemoryError("none at all")]
    for _ in range(2):
        with pytest.raises(OutOfMemoryError, match="none"):
            segmenter.segment(volume)
    assert segmenter.segment(volume).memory["batch"] == 1


def test_the_block_of_the_first_try_is_released_before_the_second_is_taken(
    opened: Open, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, driver = opened()
    engine = Through(device, LINEAR)
    segmenter = Segmenter(Bundle.default(), SegmentOptions(window=32), engine)
    engine.failures += [OutOfMemoryError("no memory for a batch of 3")]
    live, allocate = [], device.allocate

    def counted(size_bytes: int) -> Any:
        live.append((size_bytes, max((a.size for a in driver.live.values()), default=0)))
        return allocate(size_bytes)

    monkeypatch.setattr(device, "allocate", counted)
    gc.disable()
    try:
        segmenter.segment(volume)
    finally:
        gc.enable()
    first, second = [(size, held) for size, held in live if size > volume.channels[0].nbytes * 8]
    assert second[0] < first[0]
    assert second[1] < second[0], "the first block was alive"


def test_after_a_lost_device_nothing_is_tried_there(opened: Open, volume: Volume) -> None:
    device, driver = opened()
    segmenter = Segmenter(Bundle.default(), SegmentOptions(), Through(device, LINEAR))
    driver.fails["cuStreamSynchronize"] = ["CUDA_ERROR_LAUNCH_FAILED"] * 9
    with pytest.raises(DeviceLostError, match="CUDA_ERROR_LAUNCH_FAILED"):
        segmenter.segment(volume)
    with pytest.raises(EngineError, match=r"not tried, as the GPU failed .* with fallback="):
        segmenter.segment(volume)


def test_with_fallback_the_processor_goes_on(opened: Open, volume: Volume) -> None:
    device, driver = opened()
    chosen = SegmentOptions(fallback="cpu", threads=1)
    segmenter = Segmenter(Bundle.default(), chosen, Through(device, LINEAR))
    staged = segmenter.stage(volume)  # being copied when the device is lost
    driver.fails["cuStreamSynchronize"] = ["CUDA_ERROR_ECC_UNCORRECTABLE"]
    with pytest.raises(DeviceLostError):
        segmenter.segment(volume)
    result = segmenter.submit(staged).result()
    assert result.engine.device == "cpu" and segmenter.engine.name == "openvino"
    expected = Segmenter(Bundle.default(), SegmentOptions(device="cpu", threads=1)).segment(volume)
    np.testing.assert_array_equal(result.labels, expected.labels)
    assert not result.memory


@pytest.mark.parametrize("fallback", [None, "cpu"])
def test_a_device_that_is_lost_while_a_volume_is_uploaded_is_told(
    opened: Open, volume: Volume, fallback: Any
) -> None:
    device, driver = opened()
    chosen = SegmentOptions(fallback=fallback, threads=1)
    segmenter = Segmenter(Bundle.default(), chosen, Through(device, LINEAR))
    driver.fails["cuMemcpyAsync"] = ["CUDA_ERROR_ILLEGAL_ADDRESS"]
    if fallback is None:
        with pytest.raises(DeviceLostError, match="the GPU failed in upload"):
            segmenter.stage(volume)
        with pytest.raises(EngineError, match="not tried, as the GPU failed in upload"):
            segmenter.stage(volume)
        return
    for one in [segmenter.stage(volume) for _ in range(2)]:
        assert segmenter.submit(one).result().engine.device == "cpu"


def test_a_fault_of_an_engine_that_lost_the_device_is_told_as_that(
    opened: Open, volume: Volume
) -> None:
    device, driver = opened()
    engine = Through(device, LINEAR)
    segmenter = Segmenter(Bundle.default(), SegmentOptions(), engine)
    engine.failures.append(EngineError("tensorrt failed (no reason given)"))
    with pytest.raises(EngineError, match="tensorrt failed"):
        segmenter.segment(volume)

    def lose(*_: Any) -> None:
        driver.fails["cuStreamSynchronize"] = ["CUDA_ERROR_ILLEGAL_ADDRESS"]
        raise EngineError("tensorrt failed (no reason given)")

    engine.enqueue = lose  # type: ignore[method-assign]
    with pytest.raises(DeviceLostError, match="failed in computing: CUDA_ERROR_ILLEGAL_ADDRESS"):
        segmenter.segment(volume)
