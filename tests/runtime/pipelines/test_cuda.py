"""The whole device executor, compared with the numpy path and the same engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnseg import Bundle, Segmenter, SegmentOptions, Volume
from attnseg.runtime.case.nifti import read_volume
from attnseg.runtime.case.scans import find_cases
from attnseg.runtime.cuda.device import Device, DeviceArray
from attnseg.runtime.cuda.kernels import MOST_INDICES
from attnseg.runtime.cuda.memory import MemoryRequirements, plan_memory, smallest_plan
from attnseg.runtime.cuda.statistics import statistics_bytes
from attnseg.runtime.engines.base import Engine
from attnseg.runtime.engines.cpu import open_engine
from attnseg.runtime.engines.onnxruntime import OnnxSession
from attnseg.runtime.errors import (
    BundleError,
    ConfigError,
    EngineError,
    OutOfMemoryError,
    VolumeError,
)
from attnseg.runtime.geometry import Shape
from attnseg.runtime.model.manifest import Inference, ModelRecord
from attnseg.runtime.options import Plan, resolve
from attnseg.runtime.pipelines.base import Segmentation
from attnseg.runtime.pipelines.cuda import CudaPipeline
from attnseg.runtime.steps.decide import Decide
from attnseg.runtime.steps.foreground import Crop
from attnseg.runtime.steps.normalise import normalise
from attnseg.runtime.steps.preprocess import Preprocessing, preprocess
from attnseg.runtime.steps.resample import Grid, Quantity
from attnseg.runtime.steps.schemes import (
    ClipZScore,
    LandmarkMatching,
    Range,
    Scheme,
    SingleZScore,
    Unchanged,
    ZScore,
)
from attnseg.runtime.steps.tta import PASSES
from attnseg.runtime.steps.windows import Accumulate, Blending, WindowOptions, pad_image
from attnseg.runtime.task import Channel, Label, Output, Task
from attnseg.synthetic import SyntheticCase, make_case
from tests.conftest import LinearEngine
from tests.runtime.cuda.engines import Halved, OnHost, Through
from tests.runtime.cuda.host_device import HostDevice

MATRIX = np.random.default_rng(8).standard_normal((4, 4)).astype(np.float32)
LINEAR = LinearEngine(MATRIX)
BUNDLE = Bundle.default()


def both(
    engine: Through, reference: Engine, volume: Volume, chosen: SegmentOptions
) -> tuple[Segmentation, Segmentation]:
    """The same by the device executor and by numpy; all but the labels is compared here."""
    result = Segmenter(BUNDLE, chosen, engine).segment(volume)
    expected = Segmenter(BUNDLE, chosen, reference).segment(volume)
    assert result.volumes_ml == expected.volumes_ml
    assert result.components_removed == expected.components_removed
    assert result.windows == expected.windows
    assert result.memory["planned_bytes"]
    return result, expected


@pytest.fixture(scope="module")
def volume(small_synthetic: SyntheticCase) -> Volume:
    return Volume(small_synthetic.images, small_synthetic.affine)


@pytest.mark.parametrize("batches", [(1, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize(
    "chosen",
    [
        SegmentOptions(),
        SegmentOptions(tta="paper"),
        SegmentOptions(tta="mirror8", fuse="mean"),
        SegmentOptions(window=32, min_voxels=0),
        SegmentOptions(window=32, overlap=0.7, min_voxels=20),
        SegmentOptions(window="full", tta="paper"),
    ],
    ids=["default", "vote", "mean", "small windows", "overlap", "one pass"],
)
def test_labels_are_the_numpy_executors(
    device: Device, volume: Volume, chosen: SegmentOptions, batches: tuple[int, int]
) -> None:
    result, expected = both(Through(device, LINEAR, batches), LINEAR, volume, chosen)
    assert len(np.unique(expected.labels)) > 2
    np.testing.assert_array_equal(result.labels, expected.labels)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("tight", [False, True])
def test_windows_of_any_size_give_the_numpy_executors_labels(
    device: Device, volume: Volume, half: bool, tight: bool
) -> None:
    """No batch of 3 windows of 17x23x9 voxels is a multiple of 256 bytes long."""
    inference = replace(BUNDLE.manifest.inference, window=(17, 23, 9), window_multiple=1)
    bundle = replace(BUNDLE, manifest=replace(BUNDLE.manifest, inference=inference))
    chosen = SegmentOptions(tta="paper")
    engine = Through(device, LINEAR, half=half)
    if tight:
        with pytest.raises(OutOfMemoryError) as caught:
            Segmenter(bundle, replace(chosen, max_memory_bytes=1), engine).segment(volume)
        chosen = replace(chosen, max_memory_bytes=least_bytes(str(caught.value)))
    found = Segmenter(bundle, chosen, engine).segment(volume)
    reference = Halved(LINEAR) if half else LINEAR
    expected = Segmenter(bundle, replace(chosen, max_memory_bytes=None), reference).segment(volume)
    differ = np.mean(found.labels != expected.labels)
    assert differ < (1e-3 if found.memory["logits"] == "fp16" and not half else 1e-12)


def test_an_engine_of_fp16_gives_what_it_gives_to_numpy(device: Device, volume: Volume) -> None:
    chosen = SegmentOptions(tta="paper")
    engine = Through(device, LINEAR, half=True)
    result, expected = both(engine, Halved(LINEAR), volume, chosen)
    np.testing.assert_array_equal(result.labels, expected.labels)


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "SAL", "IPR"])
def test_any_orientation_in_memory_gives_the_same(
    device: Device, volume: Volume, orientation: str
) -> None:
    turned = volume.oriented(orientation)
    copied = Volume([np.asfortranarray(c) for c in turned.channels], turned.affine)
    result, expected = both(Through(device, LINEAR), LINEAR, copied, SegmentOptions())
    np.testing.assert_array_equal(result.labels, expected.labels)
    assert result.labels.flags.f_contiguous  # the memory order of NIfTI files


def test_a_slice_of_a_larger_array_is_taken(device: Device, volume: Volume) -> None:
    padded = [np.pad(c, 4)[4:-4, 4:-4, 4:-4] for c in volume.channels]
    sliced = Volume(padded, volume.affine)
    result, expected = both(Through(device, LINEAR), LINEAR, sliced, SegmentOptions())
    np.testing.assert_array_equal(result.labels, expected.labels)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.float32, np.float64])
def test_any_type_of_voxel_is_taken(device: Device, volume: Volume, kind: Any) -> None:
    top = np.iinfo(kind).max if np.issubdtype(kind, np.integer) else 1e6
    channels = []
    for channel in volume.channels:
        part = np.asarray(channel, np.float64) / np.max(channel)
        values = (part * min(top, 60_000)).astype(kind)
        values[part > 0] = np.maximum(values[part > 0], 1)
        channels.append(values)
    typed = Volume(channels, volume.affine)
    result, expected = both(Through(device, LINEAR), LINEAR, typed, SegmentOptions())
    np.testing.assert_array_equal(result.labels, expected.labels)


class Probe:
    """An engine that keeps the one window that it is given, and finds nothing."""

    batches, half, memory_bytes, classes = (1, 1), False, 0, 2
    info = LINEAR.info

    def __init__(self, device: Device) -> None:
        self.device = device
        self.seen = np.empty(0, np.float32)

    def infer(self, batch: np.ndarray) -> Any:
        raise AssertionError("the device executor does not call it")

    def enqueue(self, images: Any, logits: Any, shape: Any) -> None:
        self.seen = np.empty(tuple(shape), np.float32)
        self.device.download(images, self.seen)
        zeros = np.zeros((1, 2, *shape[2:]), np.float32)
        self.device.upload(zeros, logits)


def small_plan(schemes: Sequence[Scheme], crop: Crop | None = None) -> Plan:
    """Two channels, two classes and one window of 8^3."""
    if crop is None:
        crop = "all" if schemes[0].foreground == "all" else "nonzero"
    model = ModelRecord(
        name="two channels",
        description="",
        intended_use="",
        task=Task(
            channels=(Channel("a", ("_a",)), Channel("b", ("_b",))),
            labels=(Label("background", 0), Label("object", 1)),
            regions={},
            display=("a",),
        ),
        spacing_mm=(1.0, 1.0, 1.0),
        preprocessing=Preprocessing("LPS", None, crop, tuple(schemes)),
        inference=Inference((8, 8, 8), 0.25, 8, 0),
    )
    return resolve(SegmentOptions(), model)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([np.int16, np.float32]),
    st.sampled_from(["nonzero", "all"]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.sampled_from([3, 40, 30_000]),
)
def test_what_the_network_sees_is_normalised_as_numpy_does(
    host: HostDevice, kind: Any, foreground: Any, matched: bool, seed: int, levels: int
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(-levels, levels, (2, 8, 8, 8))
    channels = (values * (rng.random(values.shape) < 0.7)).astype(kind)
    if kind == np.float32:
        channels *= np.float32(0.37)
    channels[:, 0, 0, 0], channels[:, 7, 7, 7] = levels, 1  # the foreground box is the whole volume
    if matched:
        rows = ((-1.5, 0.1, 2.0), (-1.0, 0.5, 1.0))
        schemes: Any = [LandmarkMatching((1, 50, 90), row, foreground) for row in rows]
    else:
        schemes = [ZScore(foreground)] * 2
    probe = Probe(host)
    pipeline = CudaPipeline(probe, small_plan(schemes))
    pipeline.submit(pipeline.stage(Volume(list(channels), np.diag([-1.0, -1, 1, 1]))))
    expected = normalise(channels, schemes)
    if kind == np.int16:
        np.testing.assert_array_equal(probe.seen[0], expected)
    else:
        np.testing.assert_allclose(probe.seen[0], expected, rtol=2e-6, atol=2e-6)


SCHEMES: list[Scheme] = [
    ClipZScore(-20.0, 25.0, 3.5, 11.0),
    Range((-30.0, 30.0), target=(-1.0, 1.0)),
    Range((-10.0, 15.5), clip=True),
    Range(percentiles=(5.0, 95.0), clip=True),
    Unchanged(),
    ZScore("nonzero"),
    ZScore("all"),
    SingleZScore("nonzero"),
    SingleZScore("all"),
    ZScore("filled"),
    SingleZScore("filled"),
    LandmarkMatching((1, 50, 90), (-1.5, 0.1, 2.0), "all"),
]


@pytest.mark.parametrize("kind", [np.int16, np.float32])
@pytest.mark.parametrize("crop", ["nonzero", "all"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_scheme_gives_the_network_what_the_host_gives(
    device: Device, scheme: Scheme, crop: Crop, kind: Any
) -> None:
    """Where the foreground box is smaller than the volume, with zeros in it."""
    rng = np.random.default_rng(12)
    channels = np.zeros((2, 8, 8, 8), kind)
    channels[:, 1:7, 2:8, 0:5] = rng.integers(-40, 41, (2, 6, 6, 5)) * (rng.random((6, 6, 5)) < 0.8)
    if kind == np.float32:
        channels *= np.float32(0.37)
    volume = Volume(list(channels), np.diag([-1.0, -1, 1, 1]))
    plan, probe = small_plan([scheme] * 2, crop), Probe(device)
    pipeline = CudaPipeline(probe, plan)
    pipeline.submit(pipeline.stage(volume))
    expected = preprocess(volume, plan.preprocessing).image
    padded = pad_image(expected, plan.windows.plan(expected.shape[1:]))
    np.testing.assert_allclose(probe.seen[0], padded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_a_constant_channel_on_the_device_is_no_error_of_a_fixed_scheme(
    host: HostDevice, kind: Any
) -> None:
    elsewhere: Any = [Elsewhere(np.full((8, 8, 8), value, kind)) for value in (0, 7)]
    schemes: list[Scheme] = [SingleZScore("all"), ClipZScore(-20.0, 25.0, 3.5, 10.0)]
    probe = Probe(HostArrays(host._launcher))
    pipeline = CudaPipeline(probe, small_plan(schemes))
    pipeline.submit(pipeline.stage(Volume(elsewhere, np.diag([-1.0, -1, 1, 1]))))
    assert (probe.seen[0][0] == 0).all()
    np.testing.assert_allclose(probe.seen[0][1], 0.35, rtol=1e-6)


@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_a_filled_foreground_without_voxels_is_refused(host: HostDevice, kind: Any) -> None:
    elsewhere: Any = [Elsewhere(np.zeros((8, 8, 8), kind))] * 2
    probe = Probe(HostArrays(host._launcher))
    pipeline = CudaPipeline(probe, small_plan([SingleZScore("filled")] * 2, "all"))
    with pytest.raises(VolumeError, match="channel 1 holds only zeros"):
        pipeline.submit(pipeline.stage(Volume(elsewhere, np.diag([-1.0, -1, 1, 1]))))


def test_the_same_case_gives_the_same_bytes(device: Device, volume: Volume) -> None:
    segmenter = Segmenter(BUNDLE, SegmentOptions(tta="paper"), Through(device, LINEAR, half=True))
    first, second = (segmenter.segment(volume).labels.tobytes() for _ in range(2))
    assert first == second


def test_volumes_of_other_shapes_follow_one_another(device: Device, volume: Volume) -> None:
    engine = Through(device, LINEAR)
    segmenter = Segmenter(BUNDLE, SegmentOptions(), engine)
    small = Volume([c[5:60, 9:80, 3:] for c in volume.channels], volume.affine)
    for one in (volume, small, volume):
        expected = Segmenter(BUNDLE, SegmentOptions(), LINEAR).segment(one)
        np.testing.assert_array_equal(segmenter.segment(one).labels, expected.labels)


def test_a_volume_may_come_and_go_while_another_is_segmented(
    device: Device, volume: Volume
) -> None:
    segmenter = Segmenter(BUNDLE, SegmentOptions(), Through(device, LINEAR))
    mirrored = Volume([c[::-1].copy() for c in volume.channels], volume.affine)
    staged = [segmenter.stage(one) for one in (volume, mirrored, volume)]
    pending = [segmenter.submit(one) for one in staged]
    results = [one.result() for one in pending]
    for one, result in zip((volume, mirrored, volume), results, strict=True):
        expected = Segmenter(BUNDLE, SegmentOptions(), LINEAR).segment(one)
        np.testing.assert_array_equal(result.labels, expected.labels)


def test_windows_without_brain_are_not_run(host: HostDevice) -> None:
    rng = np.random.default_rng(2)
    channels = [np.zeros((96, 96, 96), np.int16) for _ in range(4)]
    for channel in channels:
        channel[:8, :8, :8] = rng.integers(1, 9, (8, 8, 8))
        channel[-8:, -8:, -8:] = rng.integers(1, 9, (8, 8, 8))
    engine = Through(host, LINEAR, (1, 1))
    chosen = SegmentOptions(window=32, overlap=0.0, min_voxels=0)
    result, expected = both(engine, LINEAR, Volume(channels, np.diag([-1, -1, 1, 1])), chosen)
    assert len(engine.shapes) == 2 and result.windows == 27
    np.testing.assert_array_equal(result.labels, expected.labels)


@pytest.fixture(scope="module")
def cases(integration_data: Path) -> list[Volume]:
    """Three cases, or the one that there is."""
    found = find_cases(integration_data, BUNDLE.manifest.task.channels).cases
    return [read_volume(case.files) for case in found[:: max(1, len(found) // 3)][:3]]


def test_the_shipped_model_finds_the_same_in_whole_cases(
    host: HostDevice, cases: list[Volume]
) -> None:
    engine = open_engine("openvino", BUNDLE.file("onnx"), "fp32", 2)
    for case in cases:
        chosen = SegmentOptions()
        result, expected = both(Through(host, engine, (1, 1)), engine, case, chosen)
        np.testing.assert_array_equal(result.labels, expected.labels)
        assert np.count_nonzero(result.labels) > 1000
        assert 0 < result.memory["planned_bytes"] < 2e9  # type: ignore[operator]


@pytest.mark.parametrize("kind", [np.int16, np.float32])
@pytest.mark.parametrize(
    ("change", "message"), [(0, "t1ce: holds only zeros"), (7, "t1ce: is constant .7.")]
)
def test_a_channel_without_content_is_refused(
    device: Device, volume: Volume, change: int, message: str, kind: Any
) -> None:
    channels = [np.array(c, kind) for c in volume.channels]
    channels[1] = ((channels[1] > 0) * change).astype(kind)
    segmenter = Segmenter(BUNDLE, SegmentOptions(), Through(device, LINEAR))
    with pytest.raises(VolumeError, match=message):
        segmenter.segment(Volume(channels, volume.affine))
    result, expected = both(Through(device, LINEAR), LINEAR, volume, SegmentOptions())
    np.testing.assert_array_equal(result.labels, expected.labels)  # usable after a failure


@pytest.mark.parametrize("kind", [np.int16, np.float32])
@pytest.mark.parametrize(
    ("change", "message"), [(0, "channel 2 holds only zeros"), (7, "channel 2 is constant .7.")]
)
def test_a_channel_without_content_on_the_device_is_refused(
    host: HostDevice, volume: Volume, change: int, message: str, kind: Any
) -> None:
    channels = [np.array(c, kind) for c in volume.channels]
    channels[1] = ((channels[1] > 0) * change).astype(kind)
    segmenter = Segmenter(BUNDLE, SegmentOptions(), Through(HostArrays(host._launcher), LINEAR))

    def segment(arrays: list[np.ndarray]) -> None:
        elsewhere: Any = [Elsewhere(array) for array in arrays]
        segmenter.segment(Volume(elsewhere, volume.affine))

    with pytest.raises(VolumeError, match=message):
        segment(channels)
    with pytest.raises(VolumeError, match="all voxels of all channels are zero"):
        segment([channels[1] * kind(0)] * 4)


def test_a_scan_of_another_voxel_size_is_resampled(device: Device, volume: Volume) -> None:
    thick = Volume([c[:, :, ::2] for c in volume.channels], volume.affine @ np.diag([1, 1, 2, 1]))
    engine = Through(device, LINEAR)
    result, expected = (
        Segmenter(BUNDLE, SegmentOptions(), own).segment(thick) for own in (engine, LINEAR)
    )
    np.testing.assert_array_equal(result.labels, expected.labels)
    assert result.resampled_to_mm == expected.resampled_to_mm == (1, 1, 1)
    assert result.warnings == expected.warnings and result.memory
    stays = Segmenter(BUNDLE, SegmentOptions(), engine).segment(thick, on_device=True)
    assert isinstance(stays.labels, DeviceArray) and stays.volumes_ml == expected.volumes_ml


def many_classes() -> Bundle:
    """The shipped model with 33 classes."""
    labels = tuple(Label(f"class {value}", value) for value in range(33))
    task = replace(BUNDLE.manifest.task, labels=labels)
    return replace(BUNDLE, manifest=replace(BUNDLE.manifest, task=task))


def many_regions() -> Bundle:
    """The shipped model with 33 regions."""
    task = replace(BUNDLE.manifest.task, regions={f"region {i}": (1,) for i in range(33)})
    return replace(BUNDLE, manifest=replace(BUNDLE.manifest, task=task))


def with_moments() -> Bundle:
    """The shipped model on intensities that are shifted and scaled to given moments."""
    schemes = (Range((0.0, 900.0), moments=(0.5, 0.2)),) * 4
    preprocessing = replace(BUNDLE.manifest.preprocessing, normalisation=schemes)
    return replace(BUNDLE, manifest=replace(BUNDLE.manifest, preprocessing=preprocessing))


@pytest.mark.parametrize(
    ("bundle", "chosen", "step"),
    [
        (many_classes(), SegmentOptions(), "more than 32 classes"),
        (with_moments(), SegmentOptions(), "moments of a range"),
        (
            many_regions(),
            SegmentOptions(probabilities=True),
            "probabilities of more than 32 regions",
        ),
    ],
    ids=["classes", "moments", "regions"],
)
def test_a_step_without_a_kernel_is_named_and_runs_on_the_host(
    host: HostDevice,
    volume: Volume,
    caplog: pytest.LogCaptureFixture,
    bundle: Bundle,
    chosen: SegmentOptions,
    step: str,
) -> None:
    count = len(bundle.manifest.task.labels)
    engine = LinearEngine(np.random.default_rng(8).standard_normal((count, 4)))
    with caplog.at_level("INFO", "attnseg"):
        segmenter = Segmenter(bundle, chosen, Through(host, engine, classes=count))
    (record,) = caplog.records
    assert record.getMessage() == f"only the network runs on the GPU, as no kernel supports {step}"
    result, expected = segmenter.segment(volume), Segmenter(bundle, chosen, engine).segment(volume)
    assert not result.memory
    np.testing.assert_array_equal(result.labels, expected.labels)


def on_grid(grid: Grid, **fields: Any) -> Bundle:
    """The shipped model on a grid."""
    preprocessing = replace(BUNDLE.manifest.preprocessing, grid=grid, **fields)
    return replace(BUNDLE, manifest=replace(BUNDLE.manifest, preprocessing=preprocessing))


@pytest.mark.parametrize("tta", ["none", "paper"])
@pytest.mark.parametrize("decide", ["argmax", "threshold"])
@pytest.mark.parametrize("back", ["logits", "probabilities"])
def test_a_scan_on_the_models_grid_is_segmented_on_the_device(
    device: Device, volume: Volume, back: Quantity, decide: Decide, tta: str
) -> None:
    bundle = on_grid(Grid(spacing_mm=(1.0, 1.0, 1.0), order=3, back=back))
    chosen = SegmentOptions(tta=tta, decide=decide)
    result, expected = (
        Segmenter(bundle, chosen, own).segment(volume) for own in (Through(device, LINEAR), LINEAR)
    )
    assert result.memory and len(np.unique(expected.labels)) > 2
    np.testing.assert_array_equal(result.labels, expected.labels)


@pytest.mark.parametrize("tta", ["none", "paper"])
@pytest.mark.parametrize(
    ("grid", "crop", "order"),
    [
        (Grid(shape=(80, 88, 72)), "nonzero", ("resample", "crop", "normalise")),
        (Grid(shape=(80, 88, 72)), "all", ("crop", "normalise", "resample")),
        (
            Grid(spacing_mm=(1.0, 1.0, 1.0), alignment="centres", back="probabilities"),
            "nonzero",
            ("crop", "normalise", "resample"),
        ),
    ],
    ids=["whole", "box", "monai"],
)
def test_a_scan_that_only_its_box_shows_to_be_on_the_grid_is_not_resampled(
    device: Device, volume: Volume, grid: Grid, crop: Crop, order: Any, tta: str
) -> None:
    """The host has preprocessed it all the same."""
    bundle, chosen = on_grid(grid, crop=crop, order=order), SegmentOptions(tta=tta)
    result, expected = (
        Segmenter(bundle, chosen, own).segment(volume) for own in (Through(device, LINEAR), LINEAR)
    )
    assert result.memory and len(np.unique(expected.labels)) > 2
    np.testing.assert_array_equal(result.labels, expected.labels)


NNUNET_ORDER = ("crop", "normalise", "resample")


@pytest.mark.parametrize("tta", ["none", "paper"])
@pytest.mark.parametrize("decide", ["argmax", "threshold"])
@pytest.mark.parametrize(
    ("grid", "fields", "accumulate"),
    [
        (Grid(shape=(40, 48, 44)), {}, "single"),
        (Grid(spacing_mm=(2.0, 1.5, 1.2), alignment="centres", back="probabilities"), {}, "single"),
        (
            Grid(spacing_mm=(0.9, 1.1, 3.5), order=3, separate_above=3.0),
            {"order": NNUNET_ORDER, "axes": (2, 1, 0), "orientation": None},
            "half",
        ),
    ],
    ids=["shape", "monai", "nnunet"],
)
def test_outputs_are_resampled_to_the_scans_grid_as_the_host_does(
    device: Device,
    volume: Volume,
    grid: Grid,
    fields: dict[str, Any],
    accumulate: Accumulate,
    decide: Decide,
    tta: str,
) -> None:
    near = decide == "threshold" and accumulate == "half"  # fp16 logits are often at a threshold
    manifest = replace(
        with_inference(accumulate=accumulate, min_voxels=0 if near else 5).manifest,
        preprocessing=replace(BUNDLE.manifest.preprocessing, grid=grid, **fields),
    )
    bundle, chosen = replace(BUNDLE, manifest=manifest), SegmentOptions(tta=tta, decide=decide)
    engine = Through(device, LINEAR)
    result, expected = (
        Segmenter(bundle, chosen, own).segment(volume.oriented("SAL")) for own in (engine, LINEAR)
    )
    assert result.memory and len(np.unique(expected.labels)) > 2
    assert "resample" not in result.elapsed_ms and result.elapsed_ms["preprocess"] > 0
    if near:  # equal, but for the rounding of `exp`
        differ = result.labels != expected.labels
        chosen = replace(chosen, probabilities=True)
        found = Segmenter(bundle, chosen, LINEAR).segment(volume.oriented("SAL")).probabilities
        assert found is not None and (np.abs(found[:, differ] - 0.5).min(axis=0) < 1e-6).all()
        return
    np.testing.assert_array_equal(result.labels, expected.labels)
    assert result.components_removed == expected.components_removed > 0
    assert result.volumes_ml == expected.volumes_ml


def test_arrays_on_a_device_are_not_resampled_to_a_grid(host: HostDevice, volume: Volume) -> None:
    elsewhere: Any = [Elsewhere(np.asarray(c, np.int16)) for c in volume.channels]
    engine = Through(HostArrays(host._launcher), LINEAR)
    for grid in (Grid(shape=(40, 40, 40)), Grid(spacing_mm=(2.0, 2.0, 2.0))):
        segmenter = Segmenter(on_grid(grid), SegmentOptions(), engine)
        with pytest.raises(VolumeError, match="channels on a GPU are not resampled to the grid"):
            segmenter.segment(Volume(elsewhere, volume.affine))


@pytest.mark.parametrize("orientation", [None, "LPS", "RAS"])
@pytest.mark.parametrize("axes", [(2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("tta", ["none", "paper"])
def test_axes_of_the_image_may_be_in_any_order(
    device: Device, volume: Volume, axes: Shape, orientation: str | None, tta: str
) -> None:
    """As stored, and turned; windows have another length along each axis."""
    preprocessing = replace(BUNDLE.manifest.preprocessing, axes=axes, orientation=orientation)
    bundle = with_inference(window=(16, 32, 48), mirror_axes=(0,))
    bundle = replace(bundle, manifest=replace(bundle.manifest, preprocessing=preprocessing))
    engine = RampEngine(MATRIX)
    turned = volume.oriented("SAL")
    for chosen in (SegmentOptions(tta=tta), SegmentOptions()):
        result, expected = (
            Segmenter(bundle, chosen, own).segment(turned)
            for own in (Through(device, engine), engine)
        )
        assert result.memory and len(np.unique(expected.labels)) > 2
        np.testing.assert_array_equal(result.labels, expected.labels)


def test_arrays_on_a_device_are_not_resampled(host: HostDevice, volume: Volume) -> None:
    elsewhere: Any = [Elsewhere(np.asarray(c, np.int16)) for c in volume.channels]
    segmenter = Segmenter(BUNDLE, SegmentOptions(), Through(HostArrays(host._launcher), LINEAR))
    with pytest.raises(VolumeError, match="spacing is 1 x 1 x 2 mm"):
        segmenter.segment(Volume(elsewhere, volume.affine @ np.diag([1, 1, 2, 1])))


def test_logits_that_are_not_finite_are_refused(device: Device, volume: Volume) -> None:
    broken = LinearEngine(MATRIX * np.float32(np.inf))
    segmenter = Segmenter(BUNDLE, SegmentOptions(), Through(device, broken))
    with pytest.raises(EngineError, match="logits that are not finite in fp32; try precision="):
        segmenter.segment(volume)


def least_bytes(error: str) -> int:
    return int(error.split("at least ")[1].split(" MB")[0]) * 10**6


@pytest.mark.parametrize("half", [False, True])
def test_less_memory_means_smaller_batches_and_the_same_labels(
    device: Device, volume: Volume, half: bool
) -> None:
    def segmented(most: int | None) -> Segmentation:
        engine = Through(device, LINEAR, half=half)
        chosen = SegmentOptions(tta="paper", window=32, max_memory_bytes=most)
        return Segmenter(BUNDLE, chosen, engine).segment(volume)

    with pytest.raises(OutOfMemoryError, match=r"80x88x72 takes at least .* limit is 1 MB; raise"):
        segmented(10**6)
    with pytest.raises(OutOfMemoryError) as refused:
        segmented(10**6)
    free = segmented(None)
    tight = segmented(least_bytes(str(refused.value)))
    assert int(tight.memory["batch"]) <= int(free.memory["batch"]) == 3
    assert tight.memory["logits"] == "fp16"
    assert int(tight.memory["planned_bytes"]) <= least_bytes(str(refused.value))
    assert int(tight.memory["planned_bytes"]) < int(free.memory["planned_bytes"])
    # fp32 logits are then stored in fp16: classes change where two are nearly equal.
    assert np.mean(tight.labels != free.labels) <= (0 if half else 1e-3)


def on_padded_case(engine: Engine, window: Any) -> Segmentation:
    """A brain that is smaller than the volume for which memory is planned."""
    case = make_case(5, (60, 64, 56))
    channels = [np.pad(c, ((0, 40), (3, 20), (30, 0))) for c in case.images]
    chosen = SegmentOptions(window=window, overlap=0.0)
    return Segmenter(BUNDLE, chosen, engine).segment(Volume(channels, case.affine))


@pytest.mark.parametrize(("window", "short"), [("full", False), (32, False), (32, True)])
def test_onnxruntime_fills_memory_that_is_larger_than_its_logits(
    host: HostDevice, window: Any, short: bool
) -> None:
    """In one pass the box is smaller than was planned; where memory is short, the batch is too."""
    graph = BUNDLE.file("onnx")
    session = OnnxSession(graph, {"intra_op_num_threads": 2}, ["CPUExecutionProvider"])
    failures = [OutOfMemoryError("of the engine")] * short

    class Failing(OnHost):
        def enqueue(self, images: Any, logits: Any, shape: Any) -> None:
            if failures:
                raise failures.pop()
            super().enqueue(images, logits, shape)

    found = on_padded_case(Failing(session, "fp32", host), window)
    expected = on_padded_case(open_engine("onnxruntime", graph, "fp32", 2), window)
    assert found.memory["logits"] == ("fp16" if short else "fp32")
    assert np.mean(found.labels != expected.labels) < 1e-3
    assert np.count_nonzero(expected.labels) > 100


def requirements_of(
    shape: Any, windows: WindowOptions, half: bool, classes: int = 4, tta: str = "paper"
) -> MemoryRequirements:
    return MemoryRequirements(
        shape=shape,
        result=None,
        channels=4,
        classes=classes,
        windows=windows,
        transforms=PASSES[tta],
        statistics_bytes=statistics_bytes(4),
        scratch_bytes=0,
        floating=False,
        half=half,
        batches=(4, 1),
        components=True,
        probabilities=0,
        engine_bytes=0,
    )


def test_the_least_plan_is_never_more_than_another() -> None:
    for window in (16, 64, 96, None):
        for shape in ((64, 64, 64), (240, 240, 155), (100, 30, 200)):
            for half in (False, True):
                need = requirements_of(
                    shape, WindowOptions((window,) * 3 if window else None), half
                )
                plans = [plan_memory(need, None), smallest_plan(need)]
                assert plans[1].total_bytes <= plans[0].total_bytes
                with pytest.raises(OutOfMemoryError):
                    plan_memory(need, plans[1].total_bytes - 1)
                assert plan_memory(need, None, free_bytes=0) == plans[1]


def test_one_launch_never_gathers_more_than_an_index_can_count() -> None:
    need = requirements_of(
        (512, 512, 600), WindowOptions((64, 64, 64), 0.75), True, classes=3, tta="none"
    )
    plan = plan_memory(need, None)
    assert plan.chunk * 4 * 64**3 <= MOST_INDICES < plan.windows * 4 * 64**3
    assert plan.chunk % plan.batch == 0


def test_a_network_of_other_classes_is_refused(host: HostDevice) -> None:
    with pytest.raises(BundleError, match="the network returns 3 channels, its manifest names 4"):
        Segmenter(BUNDLE, SegmentOptions(), Through(host, LINEAR, classes=3))


class Small(HostDevice):
    """A host device with little memory."""

    def __init__(self, device: HostDevice, most: int) -> None:
        super().__init__(device._launcher)
        self._most = most

    def allocate(self, size_bytes: int) -> Any:
        if size_bytes > self._most:
            raise OutOfMemoryError("the GPU failed in allocating memory: CUDA_ERROR_OUT_OF_MEMORY")
        return super().allocate(size_bytes)

    def free_bytes(self) -> int:
        return self._most


def test_a_smaller_batch_is_tried_once_where_memory_is_short(
    host: HostDevice, volume: Volume
) -> None:
    chosen = SegmentOptions(window=32)
    engine = Through(Small(host, 26 * 10**6), LINEAR)
    result = Segmenter(BUNDLE, chosen, engine).segment(volume)
    assert result.memory["batch"] == 1 and result.memory["logits"] == "fp16"
    smaller = Through(Small(host, 2 * 10**6), LINEAR)
    message = r"takes \d+ MB of device memory, and at least \d+ MB with .*; 2 MB are free; close"
    with pytest.raises(OutOfMemoryError, match=message):
        Segmenter(BUNDLE, chosen, smaller).segment(volume)
    least = Through(Small(host, 10**6), LINEAR)
    with pytest.raises(
        OutOfMemoryError, match=r"a channel of the volume takes 2 MB .*, 1 MB are free"
    ):
        Segmenter(BUNDLE, chosen, least).segment(volume)


def test_an_engine_that_runs_out_of_memory_is_given_less_once(
    host: HostDevice, volume: Volume
) -> None:
    engine = Through(host, LINEAR)
    engine.failures.append(OutOfMemoryError("no memory for a batch of 3"))
    result = Segmenter(BUNDLE, SegmentOptions(window=32), engine).segment(volume)
    assert result.memory["batch"] == 1
    engine.failures += [OutOfMemoryError("no memory"), OutOfMemoryError("none at all")]
    with pytest.raises(OutOfMemoryError, match="none at all"):
        Segmenter(BUNDLE, SegmentOptions(window=32), engine).segment(volume)


def test_labels_may_stay_on_the_device(device: Device, volume: Volume) -> None:
    segmenter = Segmenter(BUNDLE, SegmentOptions(), Through(device, LINEAR))
    expected = segmenter.segment(volume)
    found = segmenter.segment(volume, on_device=True)
    assert isinstance(found.labels, DeviceArray)
    assert found.volumes_ml == expected.volumes_ml
    copy = np.empty(volume.shape[::-1], np.uint8)
    device.download(found.labels.owner, copy)
    np.testing.assert_array_equal(copy.T, expected.labels)
    if isinstance(device, HostDevice):
        np.testing.assert_array_equal(np.from_dlpack(found.labels), expected.labels)


class HostArrays(HostDevice):
    """A host device that takes arrays by DLPack, as a card does."""

    def view(self, array: Any) -> DeviceArray | None:
        if isinstance(array, np.ndarray):
            return None
        found = np.from_dlpack(array)
        return DeviceArray(
            pointer=int(found.ctypes.data),
            shape=found.shape,
            strides=found.strides,
            dtype=found.dtype,
            owner=found,
            device=self,
        )


class Elsewhere:
    """An array of another library."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __dlpack__(self, **arguments: Any) -> Any:
        return self.array.__dlpack__(**arguments)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", [np.int16, np.float32])
@pytest.mark.parametrize("orientation", ["LPS", "RAS", "SAL"])
def test_arrays_of_other_libraries_are_taken_as_they_are(
    host: HostDevice, volume: Volume, kind: Any, order: Any, orientation: str
) -> None:
    turned = volume.oriented(orientation)
    arrays = [np.array(c, kind, order=order) for c in turned.channels]
    elsewhere: Any = [Elsewhere(array) for array in arrays]
    segmenter = Segmenter(BUNDLE, SegmentOptions(), Through(HostArrays(host._launcher), LINEAR))
    expected = segmenter.segment(Volume(arrays, turned.affine))
    found = segmenter.segment(Volume(elsewhere, turned.affine))
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert found.volumes_ml == expected.volumes_ml


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.astype(np.float64), "channel 2: on a device, voxels must be int16 or float32"),
        (lambda a: a[::2], "channel 2: expected a 3-D array of the shape of channel 1"),
        (lambda a: a[0], "channel 2: expected a 3-D array"),
        (
            lambda a: np.pad(a, 1)[1:-1, 1:-1, 1:-1],
            "channel 2: on a device, voxels must be contiguous, .*; make a contiguous copy",
        ),
    ],
)
def test_arrays_that_cannot_be_taken_are_named(
    host: HostDevice, volume: Volume, change: Any, message: str
) -> None:
    elsewhere: Any = [Elsewhere(np.asarray(c, np.int16)) for c in volume.channels]
    elsewhere[1] = Elsewhere(change(elsewhere[1].array))
    segmenter = Segmenter(BUNDLE, SegmentOptions(), Through(HostArrays(host._launcher), LINEAR))
    with pytest.raises(VolumeError, match=message):
        segmenter.segment(Volume(elsewhere, volume.affine))


def test_an_affine_beside_arrays_of_a_device_is_checked(host: HostDevice, volume: Volume) -> None:
    elsewhere: Any = [Elsewhere(np.asarray(c, np.int16)) for c in volume.channels]
    segmenter = Segmenter(BUNDLE, SegmentOptions(), Through(HostArrays(host._launcher), LINEAR))
    for affine in (np.eye(3), np.zeros((4, 4)), np.full((4, 4), np.nan)):
        with pytest.raises(VolumeError, match="volume: its affine"):
            segmenter.segment(Volume(elsewhere, affine))


def test_arrays_of_host_and_device_are_not_mixed(host: HostDevice, volume: Volume) -> None:
    mixed: Any = [Elsewhere(np.asarray(c, np.int16)) for c in volume.channels]
    mixed[3] = mixed[3].array
    segmenter = Segmenter(BUNDLE, SegmentOptions(), Through(HostArrays(host._launcher), LINEAR))
    with pytest.raises(VolumeError, match="channel 4: expected an array on host, as the others"):
        segmenter.segment(Volume(mixed, volume.affine))


def with_inference(**fields: Any) -> Bundle:
    """The shipped model with other defaults of the inference."""
    inference = replace(BUNDLE.manifest.inference, **fields)
    return replace(BUNDLE, manifest=replace(BUNDLE.manifest, inference=inference))


REGIONS = Task(
    channels=BUNDLE.manifest.task.channels,
    labels=BUNDLE.manifest.task.labels,
    regions={"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)},
    display=("flair",),
    activation="sigmoid",
    outputs=(
        Output("WT", 2, (0,), 0.4),
        Output("TC", 1, (1,), 0.55),
        Output("ET", 4, (2,), 0.5),
    ),
)


@pytest.mark.parametrize("tta", ["none", "mirror8"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_regions_with_thresholds_give_the_hosts_labels(
    device: Device, volume: Volume, activation: str, tta: str
) -> None:
    if activation == "sigmoid":
        bundle = replace(BUNDLE, manifest=replace(BUNDLE.manifest, task=REGIONS))
        matrix, chosen = MATRIX[:3] / 4, SegmentOptions(tta=tta)
    else:
        bundle, matrix, chosen = BUNDLE, MATRIX / 4, SegmentOptions(tta=tta, decide="threshold")
    engine = LinearEngine(matrix)
    on_device = Through(device, engine, classes=len(matrix))
    result = Segmenter(bundle, chosen, on_device).segment(volume)
    expected = Segmenter(bundle, chosen, engine).segment(volume)
    assert result.memory and result.volumes_ml == expected.volumes_ml
    assert set(np.unique(expected.labels)) == {0, 1, 2, 4}
    np.testing.assert_array_equal(result.labels, expected.labels)


@pytest.mark.parametrize("tta", ["none", "mirror8"])
@pytest.mark.parametrize(
    "kind", ["argmax", "threshold", "sigmoid", "logits resampled", "probabilities resampled"]
)
def test_probabilities_are_the_hosts(device: Device, volume: Volume, kind: str, tta: str) -> None:
    manifest, matrix = BUNDLE.manifest, MATRIX / 4
    chosen = SegmentOptions(probabilities=True, tta=tta)
    if kind == "threshold":
        chosen = replace(chosen, decide="threshold")
    elif kind == "sigmoid":
        manifest, matrix = replace(manifest, task=REGIONS), matrix[:3]
    elif kind != "argmax":
        back: Any = kind.split()[0]
        grid = Grid(spacing_mm=(2.0, 1.5, 1.2), back=back)
        steps = replace(manifest.preprocessing, grid=grid)
        manifest = replace(manifest, preprocessing=steps)
    bundle, engine = replace(BUNDLE, manifest=manifest), LinearEngine(matrix)
    on_device = Through(device, engine, classes=len(matrix))
    turned = volume.oriented("SAL")
    result = Segmenter(bundle, chosen, on_device).segment(turned)
    expected = Segmenter(bundle, chosen, engine).segment(turned)
    assert result.memory and result.probabilities is not None
    assert expected.probabilities is not None and expected.probabilities.max() > 0.6
    assert result.probabilities.dtype == np.float32
    np.testing.assert_allclose(result.probabilities, expected.probabilities, atol=2e-6)
    np.testing.assert_array_equal(result.labels, expected.labels)


def test_probabilities_on_a_device_have_a_bound(
    host: HostDevice, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnseg.runtime.steps.decide.LARGEST_PROBABILITIES", 1 << 20)
    segmenter = Segmenter(BUNDLE, SegmentOptions(probabilities=True), Through(host, LINEAR))
    with pytest.raises(ConfigError, match="the probabilities of 3 regions have"):
        segmenter.segment(volume)


def test_all_of_nnunets_windows_give_the_hosts_labels(device: Device, volume: Volume) -> None:
    """Evenly spread, run if empty, mirrored, and added in fp16 with nnU-Net's weights."""
    bundle = with_inference(
        placement="even",
        overlap=0.5,
        weights="gaussian-nnunet",
        mirror_axes=(0, 1, 2),
        accumulate="half",
        empty_windows="run",
        window=(32, 48, 32),
    )
    engine = RampEngine(MATRIX)
    result = Segmenter(bundle, SegmentOptions(), Through(device, engine)).segment(volume)
    expected = Segmenter(bundle, SegmentOptions(), engine).segment(volume)
    assert result.memory and len(np.unique(expected.labels)) > 2
    np.testing.assert_array_equal(result.labels, expected.labels)


class RampEngine(LinearEngine):
    """Adds a ramp along each axis to the logits: mirrored back, each mirror image gives others."""

    def infer(self, batch: np.ndarray) -> np.ndarray:
        x, y, z = np.indices(batch.shape[2:], np.float32)
        ramp = np.stack([x, y, z, x - y])[None] / np.float32(7)
        return np.asarray(super().infer(batch) + ramp)


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2,), (1, 0)], ids=str)
def test_mirrored_windows_give_the_hosts_labels(
    device: Device, volume: Volume, axes: tuple[int, ...], half: bool, tight: bool
) -> None:
    engine = RampEngine(MATRIX)
    bundle, chosen = with_inference(mirror_axes=axes, window=(32, 48, 16)), SegmentOptions()
    on_device = Through(device, engine, half=half)
    if tight:
        with pytest.raises(OutOfMemoryError) as caught:
            Segmenter(bundle, SegmentOptions(max_memory_bytes=1), on_device).segment(volume)
        chosen = SegmentOptions(max_memory_bytes=least_bytes(str(caught.value)))
    result = Segmenter(bundle, chosen, on_device).segment(volume)
    reference = Halved(engine) if half else engine
    expected = Segmenter(bundle, SegmentOptions(), reference).segment(volume)
    once = Segmenter(bundle, SegmentOptions(tta="none"), reference).segment(volume)
    assert np.mean(expected.labels != once.labels) > 0.01
    assert result.memory["logits"] == ("fp16" if tight else "fp32")
    assert np.mean(result.labels != expected.labels) <= (1e-3 if tight else 0)


def test_mirrored_windows_take_memory_for_one_more_batch(host: HostDevice) -> None:
    need = requirements_of((64, 64, 64), WindowOptions((32, 32, 32)), False)
    axes = (0, 1, 2)
    mirrored = replace(
        need, windows=WindowOptions((32, 32, 32), blending=Blending("gaussian", axes))
    )
    plain, more = plan_memory(need, None), plan_memory(mirrored, None)
    batch_bytes = 4 * 4 * 4 * 32**3  # of fp32, 4 windows, 4 channels or classes
    assert plain.windows == 28 and more.chunk == 4
    assert plain.places["images"][1] == 7 * batch_bytes and more.places["images"][1] == batch_bytes
    assert more.places["logits"][1] == plain.places["logits"][1]
    assert (plain.places["output"][1], more.places["output"][1]) == (0, batch_bytes)


@pytest.mark.parametrize("tta", ["none", "paper"])
@pytest.mark.parametrize(
    "fields",
    [
        {"placement": "even"},
        {"placement": "even", "overlap": 0.8, "window": (32, 48, 32)},
        {"weights": "constant"},
        {"placement": "even", "overlap": 0.5, "weights": "gaussian-nnunet"},
        {"empty_windows": "run", "window": (16, 16, 16), "overlap": 0.0},
    ],
    ids=str,
)
def test_window_rules_of_others_give_the_hosts_labels(
    device: Device, volume: Volume, fields: dict[str, Any], tta: str
) -> None:
    bundle, chosen = with_inference(**fields), SegmentOptions(tta=tta)
    engine = Through(device, LINEAR)
    result = Segmenter(bundle, chosen, engine).segment(volume)
    reference = LinearEngine(MATRIX)
    expected = Segmenter(bundle, chosen, reference).segment(volume)
    assert result.memory and result.windows == expected.windows
    np.testing.assert_array_equal(result.labels, expected.labels)
    if "empty_windows" in fields:  # in batches of 3, the last of each pass filled up
        runs = result.windows * len(PASSES[tta])
        assert reference.calls == runs and runs <= 3 * len(engine.shapes) < runs + 9
