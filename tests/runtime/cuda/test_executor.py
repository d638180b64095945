"""The whole device executor on the host, against the numpy path with the same engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from attnseg import Bundle, Segmenter, SegmentOptions, Volume
from attnseg.runtime.cuda.device import DeviceBuffer, HostDevice, _array
from attnseg.runtime.cuda.executor import DeviceExecutor, DeviceOptions, DeviceResult
from attnseg.runtime.engines.base import Engine
from attnseg.runtime.engines.cpu import open_engine
from attnseg.runtime.errors import VolumeError
from attnseg.runtime.executor import WindowOptions
from attnseg.runtime.normalise import Normalisation
from attnseg.runtime.scans import find_cases
from attnseg.runtime.tta import PASSES
from attnseg.runtime.volume import read_volume
from attnseg.synthetic import SyntheticCase
from tests.conftest import LinearEngine
from tests.runtime.cuda.host_kernels import HostKernels

MATRIX = np.random.default_rng(8).standard_normal((4, 4)).astype(np.float32)


class OnHost:
    """An engine of host arrays as one of device memory; several windows at a time."""

    def __init__(self, engine: Engine, batch: int, half: bool = False) -> None:
        self._engine, self.batch, self.half = engine, batch, half

    def enqueue(self, images: DeviceBuffer, logits: DeviceBuffer, window: Sequence[int]) -> None:
        kind = np.float16 if self.half else np.float32
        batch, result = (
            _array(buffer.pointer, buffer.size_bytes).view(kind).reshape(self.batch, 4, *window)
            for buffer in (images, logits)
        )
        for index in range(self.batch):
            part = batch[index : index + 1].astype(np.float32)
            result[index] = self._engine.infer(part)[0]


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> HostDevice:
    return HostDevice(HostKernels(tmp_path_factory.mktemp("kernels")).launch)


def options(bundle: Bundle, chosen: SegmentOptions) -> DeviceOptions:
    inference = bundle.manifest.inference
    window = None if chosen.window == "full" else inference.window
    if isinstance(chosen.window, int):
        window = (chosen.window,) * 3
    return DeviceOptions(
        WindowOptions(window, inference.overlap, inference.window_multiple),
        PASSES[chosen.tta],
        chosen.fuse,
        inference.min_voxels if chosen.min_voxels is None else chosen.min_voxels,
        bundle.manifest.normalisation,
        tuple(label.value for label in bundle.manifest.labels),
    )


def both(
    device: HostDevice, engine: Engine, volume: Volume, chosen: SegmentOptions, batch: int = 3
) -> tuple[DeviceResult, np.ndarray]:
    bundle = Bundle.default()
    executor = DeviceExecutor(device, OnHost(engine, batch), options(bundle, chosen))
    turned = volume.oriented(bundle.manifest.orientation)
    result = executor.segment(turned.channels)  # type: ignore[arg-type]
    expected = Segmenter(bundle, chosen, engine).segment(turned)
    voxels = np.bincount(expected.labels.ravel(), minlength=5)[[1, 2, 4]]
    np.testing.assert_array_equal(result.voxels[1:], voxels)
    assert result.components_removed == expected.components_removed
    return result, expected.labels


@pytest.fixture(scope="module")
def volume(small_synthetic: SyntheticCase) -> Volume:
    return Volume(small_synthetic.images, small_synthetic.affine)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    "chosen",
    [
        SegmentOptions(),
        SegmentOptions(tta="paper"),
        SegmentOptions(tta="mirror8", fuse="mean"),
        SegmentOptions(window=32, min_voxels=0),
        SegmentOptions(window="full", tta="paper"),
    ],
    ids=["default", "vote", "mean", "small windows", "one pass"],
)
def test_labels_are_the_numpy_executors(
    device: HostDevice, volume: Volume, chosen: SegmentOptions, batch: int
) -> None:
    result, expected = both(device, LinearEngine(MATRIX), volume, chosen, batch)
    assert len(np.unique(expected)) > 2
    np.testing.assert_array_equal(result.labels, expected)


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "SAL", "IPR"])
def test_any_orientation_in_memory_gives_the_same(
    device: HostDevice, volume: Volume, orientation: str
) -> None:
    expected, _ = both(device, LinearEngine(MATRIX), volume, SegmentOptions())
    turned = volume.oriented(orientation)
    copied = Volume([np.asfortranarray(c) for c in turned.channels], turned.affine)
    result, _ = both(device, LinearEngine(MATRIX), copied, SegmentOptions())
    np.testing.assert_array_equal(result.labels, expected.labels)


def test_a_slice_of_a_larger_array_is_taken(device: HostDevice, volume: Volume) -> None:
    expected, _ = both(device, LinearEngine(MATRIX), volume, SegmentOptions())
    padded = [np.pad(c, 4)[4:-4, 4:-4, 4:-4] for c in volume.channels]
    result, _ = both(device, LinearEngine(MATRIX), Volume(padded, volume.affine), SegmentOptions())
    np.testing.assert_array_equal(result.labels, expected.labels)


def test_the_same_case_gives_the_same_bytes(device: HostDevice, volume: Volume) -> None:
    chosen = SegmentOptions(tta="paper")
    first, second = (
        both(device, LinearEngine(MATRIX), volume, chosen)[0].labels.tobytes() for _ in range(2)
    )
    assert first == second


def test_the_shipped_model_finds_the_same_on_whole_cases(
    device: HostDevice, integration_data: Path
) -> None:
    engine = open_engine("openvino", Bundle.default().file("onnx"), "fp32", 2)
    case = find_cases(integration_data, Bundle.default().manifest.channels).cases[0]
    volume = read_volume(case.files)
    result, expected = both(device, engine, volume, SegmentOptions(), batch=1)
    np.testing.assert_array_equal(result.labels, expected)
    assert result.voxels[1:].sum() > 1000


@pytest.mark.parametrize(
    ("change", "message"), [(0, "channel 2 holds only zeros"), (7, "channel 2 holds no value but")]
)
def test_a_channel_without_content_is_refused(
    device: HostDevice, volume: Volume, change: int, message: str
) -> None:
    channels = [np.array(c) for c in volume.channels]
    channels[1] = (channels[1] > 0).astype(np.int16) * np.int16(change)
    executor = DeviceExecutor(
        device, OnHost(LinearEngine(MATRIX), 1), options(Bundle.default(), SegmentOptions())
    )
    with pytest.raises(VolumeError, match=message):
        executor.segment(channels)
    with pytest.raises(VolumeError, match="all voxels of all channels are zero"):
        executor.segment([c * np.int16(0) for c in channels])


def test_the_whole_volume_is_the_box_where_the_model_says_so(device: HostDevice) -> None:
    rng = np.random.default_rng(9)
    channels = [rng.integers(-500, 500, (20, 18, 16)).astype(np.int16) for _ in range(4)]
    chosen = DeviceOptions(
        WindowOptions((16, 16, 16), 0.25),
        PASSES["none"],
        "vote",
        0,
        Normalisation(foreground="all"),
        (0, 1, 2, 4),
    )
    result = DeviceExecutor(device, OnHost(LinearEngine(MATRIX), 2), chosen).segment(channels)
    z_scores = np.stack([(c - c.mean()) / c.std() for c in channels]).astype(np.float32)
    expected = np.einsum("kc,cxyz->kxyz", MATRIX, z_scores).argmax(axis=0)
    assert np.mean(result.labels == np.array([0, 1, 2, 4])[expected]) > 0.999
