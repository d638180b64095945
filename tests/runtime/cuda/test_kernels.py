"""Every kernel compared with numpy, scipy or the numpy executor, on the host and on a GPU."""

from __future__ import annotations

import ctypes
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from cuda.bindings import nvrtc
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from attnseg.runtime.cuda import compiler, kernels
from attnseg.runtime.cuda.compiler import cached_kernels, compile_kernels
from attnseg.runtime.cuda.device import Device
from attnseg.runtime.cuda.kernels import (
    ARGUMENTS,
    GATHERED,
    SCANNED,
    SOURCE,
    SPREAD,
    BlendArgs,
    DecisionArg,
    Extent,
    LayoutArg,
    Tiling,
    TransformArg,
    blend_kernel,
    groups_along_z,
    resample_kernel,
)
from attnseg.runtime.cuda.upload import memory_order
from attnseg.runtime.errors import EngineError
from attnseg.runtime.geometry import AxisTransform, Box, Layout, Shape, shape_of
from attnseg.runtime.pipelines.sliding_window import sliding_window
from attnseg.runtime.steps.cleanup import remove_small_components
from attnseg.runtime.steps.decide import Decision, argmax_classes
from attnseg.runtime.steps.foreground import filled_foreground
from attnseg.runtime.steps.preprocess import Preprocessed
from attnseg.runtime.steps.resample import Grid, Quantity
from attnseg.runtime.steps.restore import restored
from attnseg.runtime.steps.tta import PASSES, Fusion
from attnseg.runtime.steps.windows import (
    Blending,
    Placement,
    Weights,
    WindowOptions,
    WindowPlan,
    importance_map,
    pad_image,
    plan_windows,
)
from attnseg.runtime.task import Activation, Output
from tests.conftest import LinearEngine
from tests.runtime.cuda.host_device import HostDevice

TRANSFORMS = [t for transforms in PASSES.values() for t in transforms]
TRANSFORMS.append(AxisTransform((2, 0, 1), flips=(0, 2)))
IDENTITY = PASSES["none"][0]


def run(device: Device, name: str, count: int, *values: Any) -> None:
    """Launch a kernel on arrays, which are changed as it changes them."""
    arrays = [value for value in values if isinstance(value, np.ndarray)]
    buffers = [device.allocate(array.nbytes) for array in arrays]
    for array, buffer in zip(arrays, buffers, strict=True):
        device.upload(array, buffer)
    pointers = iter(buffer.pointer for buffer in buffers)
    fields = [next(pointers) if isinstance(value, np.ndarray) else value for value in values]
    device.launch(name, count, ARGUMENTS[name](*fields))
    for array, buffer in zip(arrays, buffers, strict=True):
        device.download(buffer, array)


def tiling(device: Device, plan: WindowPlan) -> Tiling:
    """A plan as a kernel argument, which keeps the memory of its table."""
    starts = np.concatenate(plan.starts).astype(np.int32)
    buffer = device.allocate(starts.nbytes)
    device.upload(starts, buffer)
    found = Tiling.of(plan, buffer.pointer)
    found.buffer = buffer  # type: ignore[attr-defined]
    return found


VIEWS = {
    "C": lambda a: np.ascontiguousarray(a),
    "F": lambda a: np.asfortranarray(a),
    "reversed": lambda a: np.ascontiguousarray(a[::-1, :, ::-1])[::-1, :, ::-1],
    "permuted": lambda a: np.ascontiguousarray(a.transpose(2, 0, 1)).transpose(1, 2, 0),
}


def placed(view: np.ndarray) -> tuple[np.ndarray, Extent, AxisTransform]:
    """The memory of a view as it lies, its shape, and the transform from it to the view."""
    steps = [stride // view.itemsize for stride in view.strides]
    order = memory_order(Layout(shape_of(view.shape), shape_of(steps)))
    assert order is not None
    memory = order[0].invert(view)
    assert order[1] == memory.shape and memory.flags.c_contiguous
    np.testing.assert_array_equal(order[0].apply(memory), view)
    return memory, Extent.of(order[1]), order[0]


def layout(array: np.ndarray) -> LayoutArg:
    """How the elements of a view lie from its lowest address on."""
    steps = [s // array.itemsize for s in array.strides]
    offset = -sum(s * (n - 1) for s, n in zip(steps, array.shape, strict=True) if s < 0)
    return LayoutArg(offset, *steps)


@pytest.mark.parametrize("view", VIEWS)
def test_values_are_counted_and_the_box_is_found(device: Device, view: str) -> None:
    volume = np.zeros((9, 7, 8), np.int16)
    volume[2:7, 1:4, 3:8] = np.random.default_rng(0).integers(-32768, 32767, (5, 3, 5))
    volume[2, 1, 3] = volume[6, 3, 7] = 5  # the corners are not 0
    counts, box = np.zeros((65536, SPREAD), np.int32), np.zeros(6, np.int32)
    memory, shape, turn = placed(VIEWS[view](volume))
    run(device, "scan", -(-volume.size // SCANNED), memory, counts, box, shape)
    expected = np.bincount(volume.ravel().astype(np.int64) + 32768, minlength=65536)
    expected[32768] = 0
    sums = np.full(65536, -1, np.int32)
    run(device, "sum_counts", 65536, counts, sums)
    np.testing.assert_array_equal(sums, expected)
    first = [size - far for size, far in zip(memory.shape, box[:3].tolist(), strict=True)]
    found = turn.box(Box(shape_of(first), shape_of(box[3:])), memory.shape)
    assert found == Box((2, 1, 3), (7, 4, 8))


def test_equal_neighbours_are_counted_together(device: Device) -> None:
    volume = np.array([3] * 20 + [0, 3, 4, 3] + [0] * 13 + [-1], np.int16).reshape(1, 1, -1)
    counts, box = np.zeros((65536, SPREAD), np.int32), np.zeros(6, np.int32)
    run(device, "scan", 3, volume, counts, box, Extent.of(volume.shape))
    found = {(int(v) - 32768, int(k)): int(counts[v, k]) for v, k in np.argwhere(counts)}
    # Voxels 0 to 15, 16 to 31 and 32 to 37 have counters of their own.
    assert found == {(3, 0): 16, (3, 1): 6, (4, 1): 1, (-1, 2): 1}
    assert box.tolist() == [1, 1, 38, 1, 1, 38]
    run(device, "scan", 1, np.zeros(16, np.int16), counts * 0, box * 0, Extent(4, 2, 2))


def test_keys_of_floats_are_in_their_order(device: Device) -> None:
    values = np.array([-np.inf, -3e38, -2.5, -1e-40, 1e-40, 0.5, 1.0, 3e38, np.inf], np.float32)
    upper = []
    for value in values:
        counts, box = np.zeros((65536, SPREAD), np.int32), np.zeros(6, np.int32)
        volume = np.array([0, value, -0.0], np.float32)
        run(device, "scan_float", 1, volume, counts, box, Extent(3, 1, 1))
        assert box.tolist() == [2, 1, 1, 2, 1, 1] and counts.sum() == 1
        upper.append(int(np.argmax(counts.sum(axis=1))))
    assert upper == sorted(upper)
    assert upper[0] == 0x007F and upper[-1] == 0xFF80


def test_lower_halves_are_counted_for_chosen_upper_ones(device: Device) -> None:
    volume = np.random.default_rng(1).uniform(1, 2, 500).astype(np.float32)
    volume[:3] = (0, -1.5, 1.5)
    keys = volume.view(np.uint32) | np.uint32(1 << 31)
    half = int(keys[2] >> 16)
    chosen, counts = np.full(65536, -1, np.int32), np.zeros((2, 65536), np.int32)
    chosen[half] = 1
    run(device, "refine", volume.size, volume, chosen, counts)
    mine = keys[(keys >> 16 == half) & (volume > 0)] & 65535
    np.testing.assert_array_equal(counts[1], np.bincount(mine, minlength=65536))
    assert not counts[0].any()


@pytest.mark.parametrize("squared", [0, 1])
def test_sums_of_lanes_are_the_sum(device: Device, squared: int) -> None:
    volume = np.random.default_rng(1).standard_normal(1003).astype(np.float32)
    volume[::3] = 0
    sums, mean = np.zeros(16), 0.25
    run(device, "moment", 16, volume, sums, mean, volume.size, 16, squared)
    some = volume[volume != 0].astype(np.float64)
    expected = ((some - mean) ** 2 if squared else some).sum()
    np.testing.assert_allclose(sums.sum(), expected, rtol=1e-13)


@pytest.mark.parametrize("view", VIEWS)
def test_the_box_goes_through_the_table(device: Device, view: str) -> None:
    rng = np.random.default_rng(1)
    volume = rng.integers(-32768, 32767, (9, 7, 8)).astype(np.int16)
    table = rng.standard_normal(65536).astype(np.float32)
    image = np.empty((4, 3, 5), np.float32)
    turned = VIEWS[view](volume)
    (memory, _, _), how = placed(turned), layout(turned)
    expected = table[volume[3:7, 2:5, 1:6].astype(int) + 32768]
    args = (image, how, Extent.of(image.shape), Extent(3, 2, 1))
    run(device, "normalise", image.size, memory, table, None, *args)
    np.testing.assert_array_equal(image, expected)
    mask = (rng.random(image.shape) < 0.5).astype(np.uint8)
    run(device, "normalise", image.size, memory, table, mask, *args)
    np.testing.assert_array_equal(image, expected * mask)


@pytest.mark.parametrize("keep_zero", [0, 1])
def test_floats_go_through_the_curve(device: Device, keep_zero: int) -> None:
    knots = np.array([[-1.0, 0.5, 2.0], [-3.0, 1.0, 2.0]])
    volume = np.array([-2, -1, -0.25, 0, 0.5, 1, 2, 3], np.float32)
    image = np.empty(8, np.float32)
    # Slopes are 8/3 and 2/3; beyond the ends they go on.
    expected = [-3 - 8 / 3, -3, -1, 0 if keep_zero else -1 / 3, 1, 4 / 3, 2, 2 + 2 / 3]
    args = (image, LayoutArg(0, 1, 1, 1), Extent(8, 1, 1), Extent(0, 0, 0), 3, keep_zero)
    run(device, "normalise_float", 8, volume, knots, None, *args)
    np.testing.assert_allclose(image, expected, rtol=1e-6)
    mask = np.array([1, 0, 1, 1, 0, 1, 1, 1], np.uint8)
    run(device, "normalise_float", 8, volume, knots, mask, *args)
    np.testing.assert_allclose(image, expected * mask, rtol=1e-6)


@settings(max_examples=60)
@given(
    st.tuples(*[st.integers(1, 40)] * 3),
    st.tuples(*[st.integers(1, 16)] * 3),
    st.floats(0, 0.95),
    st.sampled_from(["stride", "even"]),
)
def test_the_tiling_is_the_plan(
    host: HostDevice,
    shape: tuple[int, ...],
    window: tuple[int, ...],
    overlap: float,
    placement: Placement,
) -> None:
    """Every window of the plan, seen by the kernel that looks for windows with content."""
    if placement == "even":  # small windows at large overlaps are too many
        overlap = min(overlap, 1 - 1 / min(window))
    plan = plan_windows(shape, window, overlap, placement)
    voxel = np.array([hash((shape, overlap)) % n for n in shape])
    image = np.zeros(shape, np.float32)
    image[tuple(voxel)] = 1
    flags = np.zeros(len(plan.windows), np.int32)
    args = (image, flags, Extent.of(shape), tiling(host, plan), TransformArg.of(IDENTITY), 1)
    run(host, "occupy", len(plan.windows) * window[0] * window[1], *args)
    at = voxel + plan.pad_before
    expected = [np.all(at >= w.start) and np.all(at < w.stop) for w in plan.windows]
    np.testing.assert_array_equal(flags > 0, expected)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_windows_with_content_are_found(device: Device, transform: AxisTransform) -> None:
    image = np.zeros((2, 30, 25, 20), np.float32)
    image[1, 3:9, 20:24, 5] = 1
    turned = np.ascontiguousarray(transform.apply(image))
    plan = WindowOptions((8, 8, 8), 0.25).plan(turned.shape[1:])
    flags = np.zeros(len(plan.windows), np.int32)
    args = (
        image,
        flags,
        Extent.of(image.shape[1:]),
        tiling(device, plan),
        TransformArg.of(transform),
        2,
    )
    run(device, "occupy", len(plan.windows) * 8 * 8, *args)
    padded = pad_image(turned, plan)
    expected = [padded[(slice(None), *w.slices())].any() for w in plan.windows]
    np.testing.assert_array_equal(flags > 0, expected)
    assert 0 < sum(expected) < len(expected)


GAP = 5
"""Elements between two batches, which a kernel leaves as they are."""


def gathered(
    device: Device,
    image: np.ndarray,
    transform: AxisTransform,
    plan: WindowPlan,
    half: bool,
    mirror: tuple[int, ...] = (),
) -> np.ndarray:
    """All windows of a plan, gathered in batches of 3, the last of which may be incomplete."""
    windows, batch = np.arange(len(plan.windows), dtype=np.int32), 3
    kind, size = np.float16 if half else np.float32, len(image) * np.prod(plan.window)
    batches = np.full((-(-len(windows) // batch), batch * size + GAP), -77, kind)
    run(
        device,
        "gather",
        len(windows) * len(image) * groups_along_z(plan.window, GATHERED),
        image,
        batches,
        windows,
        batches.shape[1],
        Extent.of(image.shape[1:]),
        tiling(device, plan),
        TransformArg.of(transform),
        Extent.mirror(mirror),
        len(image),
        batch,
        int(half),
    )
    assert (batches[:, batch * size :] == -77).all()
    found = batches[:, : batch * size].reshape(-1, len(image), *plan.window)
    return np.ascontiguousarray(found[: len(windows)])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_windows_of_the_turned_image_are_numpys(
    device: Device, transform: AxisTransform, half: bool
) -> None:
    image = np.random.default_rng(2).standard_normal((3, 11, 9, 5)).astype(np.float32)
    turned = transform.apply(image)
    plan = WindowOptions((8, 8, 8), 0.25).plan(turned.shape[1:])
    batch = gathered(device, image, transform, plan, half)
    padded = pad_image(np.ascontiguousarray(turned), plan)
    expected = np.stack([padded[(slice(None), *w.slices())] for w in plan.windows])
    np.testing.assert_array_equal(batch, expected.astype(batch.dtype))


MIRRORS = Blending(mirror_axes=(0, 1, 2)).mirrors


@pytest.mark.parametrize("mirror", MIRRORS, ids=str)
@pytest.mark.parametrize("transform", [TRANSFORMS[0], TRANSFORMS[-1]], ids=str)
def test_mirror_images_of_windows_are_numpys(
    device: Device, transform: AxisTransform, mirror: tuple[int, ...]
) -> None:
    """Rows are longer than a group of 8, and longer and shorter than the image."""
    image = np.random.default_rng(2).standard_normal((2, 17, 9, 12)).astype(np.float32)
    turned = np.ascontiguousarray(transform.apply(image))
    plan = WindowOptions((6, 5, 13), 0.25).plan(turned.shape[1:])
    batch = gathered(device, image, transform, plan, False, mirror)
    padded = pad_image(turned, plan)
    windows = np.stack([padded[(slice(None), *w.slices())] for w in plan.windows])
    axes = tuple(2 + axis for axis in mirror)
    np.testing.assert_array_equal(batch, np.flip(windows, axes))


@pytest.mark.parametrize("given", [np.float16, np.float32])
@pytest.mark.parametrize("kept", [np.float16, np.float32])
@pytest.mark.parametrize("mirrors", [MIRRORS, MIRRORS[:1]], ids=len)
def test_logits_of_mirror_images_are_averaged_as_numpy_does(
    device: Device, mirrors: tuple[tuple[int, ...], ...], given: Any, kept: Any
) -> None:
    """To the bit; a single one is rounded, as numpy rounds."""
    rng, shape = np.random.default_rng(2), (2, 3, 5, 7, 9)
    sums, mean = np.full(shape, 77, np.float32), np.empty(shape, kept)
    total = np.zeros(shape, np.float32)
    for which, mirror in enumerate(mirrors):
        values = rng.standard_normal(shape) * 10.0 ** rng.integers(-8, 4, shape)
        logits = values.astype(given)
        total += np.flip(logits, tuple(2 + axis for axis in mirror)).astype(np.float32)
        run(
            device,
            "average",
            2 * 5 * 7 * 9,
            logits,
            sums,
            mean,
            Extent(5, 7, 9),
            Extent.mirror(mirror),
            3,
            int(given == np.float16),
            int(kept == np.float16),
            which,
            len(mirrors),
        )
    np.testing.assert_array_equal(mean, (total / np.float32(len(mirrors))).astype(kept))


def floats(values: np.ndarray) -> ctypes.Array[ctypes.c_float]:
    """Values of the first channels, as a kernel takes them."""
    return (ctypes.c_float * kernels.MOST_CLASSES)(*values)


class Blender:
    """Blends passes by the kernel; `scores` if there are several."""

    def __init__(
        self,
        device: Device,
        shape: tuple[int, ...],
        classes: int,
        passes: int,
        decision: Decision | None = None,
    ) -> None:
        """With a decision by the largest value unless another is given."""
        self._device, self.count, self.passes, self.done = device, classes, passes, 0
        argmax = Decision("softmax", (), tuple(range(classes)), classes)
        quantity: Quantity = "logits" if passes == 1 else "probabilities"
        self.decision = DecisionArg.of(decision or argmax, quantity)
        self.background = (decision or argmax).background()
        self.scores = np.zeros((classes, *shape), np.float32)
        self.classes = np.empty(shape, np.uint8)
        self.not_finite = np.zeros(1, np.int32)

    def add(
        self,
        logits: np.ndarray,
        plan: WindowPlan,
        turn: AxisTransform,
        vote: bool,
        places: np.ndarray | None = None,
    ) -> None:
        """`places` as in `BlendArgs`; None for one window after another."""
        if places is None:
            places = np.arange(len(plan.windows), dtype=np.int64) * logits[0].size
        kernel, voxels = blend_kernel(self.count)
        run(
            self._device,
            kernel,
            groups_along_z(turn.shape(self.classes.shape), voxels),
            logits,
            importance_map(plan.window, plan.blending.weights).copy(),
            places,
            self.scores if self.passes > 1 else None,
            self.classes,
            None,
            self.not_finite,
            Extent.of(self.classes.shape),
            tiling(self._device, plan),
            TransformArg.of(turn),
            self.decision,
            self.count,
            int(logits.dtype == np.float16),
            int(plan.blending.accumulate == "half"),
            int(vote and self.passes > 1),
            self.done,
            self.passes,
            floats(self.background),
        )
        self.done += 1


ENGINE = LinearEngine(np.random.default_rng(5).standard_normal((4, 3)).astype(np.float32))


def softmax(logits: np.ndarray) -> np.ndarray:
    exponential = np.exp(logits - logits.max(axis=0))
    return exponential / exponential.sum(axis=0)


@pytest.mark.parametrize("placement", ["stride", "even"])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8, 0.9])
def test_blending_is_the_numpy_pipelines(
    device: Device, overlap: float, placement: Placement
) -> None:
    """Classes to the bit; of the blended logits the first of two passes shows the softmax."""
    image = np.random.default_rng(3).standard_normal((3, 19, 13, 6)).astype(np.float32)
    plan = WindowOptions((8, 8, 8), overlap, placement=placement).plan(image.shape[1:])
    batch = gathered(device, image, IDENTITY, plan, half=False)
    logits = np.concatenate([ENGINE.infer(window[None]) for window in batch])
    expected = sliding_window(image, ENGINE, plan, np.zeros(4))
    single, first = (Blender(device, image.shape[1:], 4, passes) for passes in (1, 2))
    single.add(logits, plan, IDENTITY, vote=True)
    np.testing.assert_array_equal(single.classes, argmax_classes(expected))
    first.add(logits, plan, IDENTITY, vote=False)
    np.testing.assert_allclose(first.scores, softmax(expected), rtol=1e-6, atol=1e-7)
    assert not single.not_finite[0] and not first.not_finite[0]


@pytest.mark.parametrize("weights", ["gaussian", "gaussian-nnunet", "constant"])
def test_sums_in_fp16_are_rounded_where_numpy_rounds_them(device: Device, weights: Weights) -> None:
    """Classes to the bit, of logits that fp16 cannot tell apart everywhere."""
    image = np.random.default_rng(3).standard_normal((3, 19, 13, 6)).astype(np.float32)
    close = LinearEngine(1 + ENGINE.matrix / 500)
    found = {}
    for accumulate in ("single", "half"):
        blending = Blending(weights, accumulate=accumulate)  # type: ignore[arg-type]
        plan = WindowOptions((8, 8, 8), 0.5, blending=blending).plan(image.shape[1:])
        batch = gathered(device, image, IDENTITY, plan, half=False)
        logits = np.concatenate([close.infer(window[None]) for window in batch])
        blender = Blender(device, image.shape[1:], 4, 1)
        blender.add(logits, plan, IDENTITY, vote=False)
        expected = argmax_classes(sliding_window(image, close, plan, np.zeros(4)))
        np.testing.assert_array_equal(blender.classes, expected)
        found[accumulate] = expected
    assert np.mean(found["single"] != found["half"]) > 0.02


def regions_of(channels: int, activation: Activation) -> Decision:
    """Nested regions of sigmoid outputs, or of sums of softmax probabilities."""
    sums = [(k,) if activation == "sigmoid" else tuple(range(k, channels)) for k in range(channels)]
    outputs = [Output(str(k), 10 + k, own, 0.3 + 0.1 * k) for k, own in enumerate(sums)]
    return Decision(activation, tuple(outputs), (0, *range(10, 10 + channels)), channels)


@pytest.mark.parametrize(
    ("activation", "channels"),
    [("sigmoid", 1), *((name, k) for name in ("sigmoid", "softmax") for k in (2, 3, 5))],
)
@pytest.mark.parametrize("passes", [1, 3])
def test_regions_are_decided_as_numpy_decides_them(
    device: Device, passes: int, channels: int, activation: Activation
) -> None:
    """After one pass and after the mean of several, where the last region in order counts."""
    image = np.random.default_rng(9).standard_normal((3, 9, 8, 11)).astype(np.float32)
    matrix = 0.7 * np.random.default_rng(channels).standard_normal((channels, 3))
    engine, decision = LinearEngine(matrix), regions_of(channels, activation)
    blender = Blender(device, image.shape[1:], channels, passes, decision)
    fusion, values = Fusion("mean", decision), np.empty(0, np.float32)
    for transform in PASSES["paper"][:passes]:
        turned = np.ascontiguousarray(transform.apply(image))
        plan = WindowOptions((8, 8, 8), 0.25).plan(turned.shape[1:])
        batch = gathered(device, image, transform, plan, half=False)
        logits = np.concatenate([engine.infer(window[None]) for window in batch])
        blender.add(logits, plan, transform, vote=False)
        values = transform.invert(sliding_window(turned, engine, plan, np.zeros(channels)))
        fusion.add(values)
    expected = decision.classes(values) if passes == 1 else fusion.classes()
    assert len(np.unique(expected)) > (channels + 1) // 2
    np.testing.assert_array_equal(blender.classes, expected)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_thresholds_are_on_probabilities_where_these_are_decided_on(
    host: HostDevice, activation: Activation
) -> None:
    decision = regions_of(2, activation)
    limits = [output.threshold for output in decision.outputs]
    on_logits = DecisionArg.of(decision)
    assert on_logits.activation == (0 if activation == "sigmoid" else 1)
    if activation == "sigmoid":
        logits = [np.log(p / (1 - p)) for p in limits]
        np.testing.assert_allclose(on_logits.thresholds[:2], logits, rtol=1e-6)
    on_probabilities = DecisionArg.of(decision, "probabilities")
    assert on_probabilities.activation == (2 if activation == "sigmoid" else 1)
    np.testing.assert_allclose(on_probabilities.thresholds[:2], limits, rtol=1e-6)


@settings(max_examples=40)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    grid=st.tuples(*[st.integers(2, 9)] * 3),
    seed=st.integers(0, 2**32 - 1),
    channels=st.sampled_from([1, 3, 8, 9]),
    half=st.booleans(),
)
def test_values_are_resampled_as_numpy_resamples_them(
    host: HostDevice, shape: Shape, grid: Shape, seed: int, channels: int, half: bool
) -> None:
    """To the bit, from a part of a grid, with other values around it."""
    rng = np.random.default_rng(seed)
    start = shape_of([int(rng.integers(0, size)) for size in grid])
    box = Box(
        start, shape_of([int(rng.integers(a + 1, n + 1)) for a, n in zip(start, grid, strict=True)])
    )
    values = rng.standard_normal((channels, *box.shape)).astype(np.float32)
    sampling = Grid(shape=grid).sampling(shape, (1.0, 1.0, 1.0))
    scan = Preprocessed(values, box, True, grid, shape, sampling, "logits")
    around = rng.standard_normal(channels).astype(np.float32)
    expected = np.concatenate(list(restored([values], scan, around, half)), axis=1)
    taps = [sampling.inverse().taps(axis) for axis in range(3)]
    first, second, share = (np.concatenate(own) for own in zip(*taps, strict=True))
    scores, finite = np.zeros((channels, *shape), np.float32), np.zeros(1, np.int32)
    arrays = [values, first.astype(np.int32), second.astype(np.int32), share, scores, finite]
    buffers = [host.allocate(array.nbytes) for array in arrays]
    for array, buffer in zip(arrays, buffers, strict=True):
        host.upload(array, buffer)
    pointers = [buffer.pointer for buffer in buffers]
    result = BlendArgs(  # the first of two passes writes the values as scores
        scores=pointers[4],
        not_finite=pointers[5],
        shape=Extent.of(shape),
        count=channels,
        which=0,
        passes=2,
        background=floats(around),
    )
    args = kernels.ResampleArgs(
        *pointers[:4], Extent.of(box.shape), Extent.of(start), int(half), result
    )
    host.launch(resample_kernel(channels), int(np.prod(shape)), args)
    host.download(buffers[4], scores)
    np.testing.assert_array_equal(scores, expected)


def test_half_logits_are_blended_in_fp32(device: Device) -> None:
    plan = WindowOptions((8, 8, 8), 0.25).plan((14, 8, 8))
    rng = np.random.default_rng(4)
    logits = rng.standard_normal((len(plan.windows), 2, 8, 8, 8)).astype(np.float32)
    found = {}
    for name, kept in (
        ("fp32", logits),
        ("fp16", logits.astype(np.float16)),
        ("rounded", logits.astype(np.float16).astype(np.float32)),
    ):
        blender = Blender(device, (14, 8, 8), 2, 2)
        blender.add(kept, plan, IDENTITY, vote=False)
        found[name] = blender.scores
    np.testing.assert_array_equal(found["fp16"], found["rounded"])
    assert np.abs(found["fp16"] - found["fp32"]).max() < 1e-3


@pytest.mark.parametrize("classes", [1, 2, 4, 5, 8, 9, 32])
def test_any_number_of_classes_is_argmaxed(device: Device, classes: int) -> None:
    plan = WindowOptions((8, 8, 8), 0.25).plan((8, 8, 8))
    logits = np.random.default_rng(6).standard_normal((1, classes, 8, 8, 8)).astype(np.float32)
    logits[0, :, 0, 0, 0] = 7  # a tie goes to the first class
    blender = Blender(device, (8, 8, 8), classes, 1)
    blender.add(logits, plan, IDENTITY, vote=True)
    np.testing.assert_array_equal(blender.classes, logits[0].argmax(axis=0))


@pytest.mark.parametrize("mode", ["vote", "mean"])
@pytest.mark.parametrize("scheme", ["paper", "mirror8"])
def test_passes_are_joined_as_numpy_joins_them(device: Device, scheme: str, mode: str) -> None:
    image = np.random.default_rng(6).standard_normal((3, 17, 9, 10)).astype(np.float32)
    options = WindowOptions((8, 8, 8), 0.25)
    fusion = Fusion(mode, Decision("softmax", (), (0, 1, 2, 3), 4))  # type: ignore[arg-type]
    blender = Blender(device, image.shape[1:], 4, len(PASSES[scheme]))
    for transform in PASSES[scheme]:
        turned = transform.apply(image)
        plan = options.plan(turned.shape[1:])
        batch = gathered(device, image, transform, plan, half=False)
        logits = np.concatenate([ENGINE.infer(window[None]) for window in batch])
        blender.add(logits, plan, transform, mode == "vote")
        blended = sliding_window(np.ascontiguousarray(turned), ENGINE, plan, np.zeros(4))
        fusion.add(transform.invert(blended))
    np.testing.assert_array_equal(blender.classes, fusion.classes())


@pytest.mark.parametrize("activation", [None, "softmax", "sigmoid"])
def test_a_voxel_that_no_window_covers_is_background(
    device: Device, activation: Activation | None
) -> None:
    """By argmax, and by thresholds, which a probability of 1/3 or 1/2 would exceed."""
    plan = WindowOptions((8, 8, 8), 0.25).plan((8, 8, 8))
    logits = np.ones((1, 3, 8, 8, 8), np.float32) * np.array([0, 1, 2]).reshape(1, 3, 1, 1, 1)
    outputs = (Output("all", 1, (1, 2), 0.3),)
    decision = Decision(activation, outputs, (0, 1, 2), 3) if activation else None
    blender = Blender(device, (8, 8, 8), 3, 1, decision)
    nowhere = np.array([-1], np.int64)
    blender.add(logits.astype(np.float32), plan, IDENTITY, vote=True, places=nowhere)
    assert not blender.classes.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_seen(device: Device, value: float) -> None:
    plan = WindowOptions((8, 8, 8), 0.25).plan((8, 8, 8))
    logits = np.zeros((1, 2, 8, 8, 8), np.float16)
    logits[0, 1, 2, 3, 4] = value
    blender = Blender(device, (8, 8, 8), 2, 1)
    blender.add(logits, plan, IDENTITY, vote=True)
    assert blender.not_finite[0] == 1


def cleaned(
    device: Device, classes: np.ndarray, min_voxels: int
) -> tuple[np.ndarray, int, np.ndarray]:
    result = np.ascontiguousarray(classes).copy()
    parents, sizes = np.empty(classes.shape, np.int32), np.empty(classes.shape, np.int32)
    removed = np.zeros(1, np.int32)
    buffers = [device.allocate(a.nbytes) for a in (result, parents, sizes, removed)]
    for array, buffer in zip((result, parents, sizes, removed), buffers, strict=True):
        device.upload(array, buffer)
    pointers = [buffer.pointer for buffer in buffers]
    args = kernels.LabelArgs(*pointers, Extent.of(classes.shape), min_voxels, 0)
    for name in kernels.LABELLING:
        device.launch(name, classes.size, args)
    for array, buffer in zip((result, parents, sizes, removed), buffers, strict=True):
        device.download(buffer, array)
    return result, int(removed[0]), sizes


def random_classes(seed: int, shape: tuple[int, ...], share: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.integers(1, 4, shape) * (rng.random(shape) < share)).astype(np.uint8)


def check_components(device: Device, classes: np.ndarray, min_voxels: int) -> None:
    result, removed, sizes = cleaned(device, classes, min_voxels)
    expected, count = remove_small_components(classes, min_voxels)
    np.testing.assert_array_equal(result, expected)
    assert removed == count
    neighbours = np.ones((3, 3, 3))
    theirs: list[int] = []
    for value in (1, 2, 3):
        components, _ = ndimage.label(classes == value, neighbours)
        theirs += np.bincount(components.ravel())[1:].tolist()
    assert sorted(sizes[sizes > 0].tolist()) == sorted(theirs)


@settings(max_examples=60)
@given(
    st.tuples(*[st.integers(1, 9)] * 3),
    st.integers(0, 2**32 - 1),
    st.floats(0.05, 0.6),
    st.integers(1, 30),
)
def test_components_are_those_of_scipy(
    host: HostDevice, shape: tuple[int, ...], seed: int, share: float, min_voxels: int
) -> None:
    check_components(host, random_classes(seed, shape, share), min_voxels)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.9])
def test_components_of_larger_volumes_are_those_of_scipy(device: Device, share: float) -> None:
    """Where many threads merge the same trees at the same time."""
    check_components(device, random_classes(11, (70, 60, 50), share), 12)


@settings(max_examples=60)
@given(
    st.tuples(*[st.integers(1, 9)] * 3),
    st.integers(0, 2**32 - 1),
    st.floats(0.3, 0.95),
    st.sampled_from([np.int16, np.float32]),
    st.sampled_from(sorted(VIEWS)),
)
def test_the_filled_foreground_is_that_of_scipy(
    host: HostDevice, shape: tuple[int, ...], seed: int, share: float, kind: Any, view: str
) -> None:
    check_filled(host, shape, seed, share, kind, view)


def test_the_filled_foreground_of_a_larger_volume_is_that_of_scipy(device: Device) -> None:
    """Where many threads merge the same trees, and holes are enclosed by faces alone."""
    check_filled(device, (40, 50, 60), 5, 0.6, np.int16, "F")


def check_filled(
    device: Device, shape: tuple[int, ...], seed: int, share: float, kind: Any, view: str
) -> None:
    """A box of two channels, neither of which is 0 in most voxels."""
    rng = np.random.default_rng(seed)
    larger, box = [s + 3 for s in shape], tuple(slice(2, 2 + s) for s in shape)
    first, second = (
        (rng.integers(-3, 4, larger) * (rng.random(larger) < share)).astype(kind) for _ in range(2)
    )
    second[1:-1:2] = 0
    voxels = int(np.prod(shape))
    arrays = [VIEWS[view](channel) for channel in (first, second)]
    mask, parents, sizes = (np.full(shape, 77, d) for d in (np.uint8, np.int32, np.int32))
    for index, array in enumerate(arrays):
        where = (layout(array), Extent.of(shape), Extent(2, 2, 2))
        floating = int(kind == np.float32)
        run(device, "empty", voxels, placed(array)[0], mask, *where, floating, int(index == 0))
    removed, found = np.zeros(1, np.int32), np.zeros(1, np.int32)
    for name in kernels.LABELLING[:3]:
        run(device, name, voxels, mask, parents, sizes, removed, Extent.of(shape), 0, 1)
    for name, count in (("open_border", voxels), ("fill", voxels // shape[2])):
        run(device, name, count, parents, sizes, mask, found, Extent.of(shape))
    expected = filled_foreground([first[box], second[box]])
    np.testing.assert_array_equal(mask, expected)
    assert found[0] == expected.sum()


def test_a_snake_through_the_whole_volume_is_one_component(device: Device) -> None:
    classes = np.zeros((21, 21, 3), np.uint8)
    for x in range(0, 21, 2):
        classes[x, :, 1] = 1
        if x + 1 < 21:
            classes[x + 1, 0 if x % 4 else 20, 1] = 1
    assert ndimage.label(classes, np.ones((3, 3, 3)))[1] == 1
    result, removed, sizes = cleaned(device, classes, 2)
    assert removed == 0 and result.sum() == classes.sum()
    assert sizes[sizes > 0].tolist() == [classes.sum()]


@pytest.mark.parametrize("view", VIEWS)
def test_labels_are_restored_where_the_box_was(device: Device, view: str) -> None:
    classes = np.random.default_rng(7).integers(0, 4, (4, 3, 5)).astype(np.uint8)
    how = layout(VIEWS[view](np.zeros((9, 7, 8), np.uint8)))
    memory, counts = np.zeros(9 * 7 * 8, np.uint8), np.zeros(32, np.int32)
    values = (ctypes.c_ubyte * 32)(0, 1, 2, 4)
    box, origin = Extent.of(classes.shape), Extent(3, 2, 1)
    run(device, "restore", classes.size, classes, memory, counts, how, box, origin, values)
    x, y, z = np.ogrid[:9, :7, :8]
    found = memory[how.offset + x * how.x + y * how.y + z * how.z]
    expected = np.zeros((9, 7, 8), np.uint8)
    expected[3:7, 2:5, 1:6] = np.array([0, 1, 2, 4])[classes]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(counts[1:4], [(classes == k).sum() for k in (1, 2, 3)])


def test_every_kernel_has_its_arguments_a_reference_and_its_bytes() -> None:
    text = SOURCE.read_text()
    names = re.findall(r"^KERNEL\((\w+),", text, re.MULTILINE)
    assert names == list(ARGUMENTS)
    for name, structure in ARGUMENTS.items():
        assert f"KERNEL({name}, {structure.__name__})" in text
    one_comment = {re.sub(r"^(blend|resample)_\d+$", r"\1", name) for name in names}
    assert text.count(" B: ") == len(one_comment)


def test_no_kernel_keeps_values_in_memory_that_fit_in_registers() -> None:
    source, options = SOURCE.read_bytes(), [b"--gpu-architecture=compute_86", b"-std=c++17"]
    _, program = nvrtc.nvrtcCreateProgram(source, b"kernels.cu", 0, [], [])
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    assert not int(status)
    _, size = nvrtc.nvrtcGetPTXSize(program)
    ptx = bytes(size)
    nvrtc.nvrtcGetPTX(program, ptx)
    assert b".entry blend" in ptx and b".local" not in ptx


@pytest.mark.parametrize("target", ["sm75", "sm86", "sm89", "sm90", "sm120"])
def test_the_kernels_compile_for_a_gpu_that_is_not_there(target: str) -> None:
    cubin = compile_kernels(target)
    assert cubin[:4] == b"\x7fELF"
    for name in ARGUMENTS:
        assert name.encode() in cubin


def test_a_gpu_that_nvrtc_no_longer_knows_is_refused_in_words() -> None:
    message = r"cannot compile the kernels for sm61: nvrtc: error: invalid value for --gpu-arch"
    with pytest.raises(EngineError, match=message):
        compile_kernels("sm61")


def test_a_gpu_that_is_newer_than_nvrtc_gets_code_that_its_driver_compiles() -> None:
    _, known = nvrtc.nvrtcGetSupportedArchs()
    code = compile_kernels("sm990")
    assert f".target sm_{max(known)}\n".encode() in code
    assert code.endswith(b"\0")  # the driver reads PTX up to a null character
    for name in ARGUMENTS:
        assert f".entry {name}(".encode() in code


def test_an_error_in_the_source_is_reported_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "SOURCE", tmp_path / "broken.cu")
    compiler.SOURCE.write_text("struct A {};\nstruct A {};\n")
    with pytest.raises(EngineError, match=r"for sm86: broken.cu\(2\): error: .*\"A\""):
        compile_kernels("sm86")


def test_cubins_are_kept_and_damaged_ones_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    first = cached_kernels("sm86", folder)
    (file,) = folder.iterdir()
    monkeypatch.setattr(compiler, "compile_kernels", lambda _: b"compiled again")
    assert cached_kernels("sm86", folder) == first
    for damaged in (b"", b"x" * 10, file.read_bytes()[:-1]):
        file.write_bytes(damaged)
        assert cached_kernels("sm86", folder) == b"compiled again"
        assert cached_kernels("sm86", folder) == b"compiled again"
    assert [f.name for f in folder.iterdir()] == [file.name]
    (tmp_path / "file").touch()
    assert cached_kernels("sm86", tmp_path / "file" / "cache") == b"compiled again"


def test_several_processes_may_fill_the_cache_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting = Barrier(4, timeout=60)

    def compile_together(_: str) -> bytes:
        meeting.wait()  # no thread finds the file of another
        return bytes(100_000)

    monkeypatch.setattr(compiler, "compile_kernels", compile_together)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: cached_kernels("sm86", tmp_path), range(4)))
    assert found == [bytes(100_000)] * 4
    assert len(list(tmp_path.iterdir())) == 1
    assert cached_kernels("sm86", tmp_path) == bytes(100_000)  # from the cache
