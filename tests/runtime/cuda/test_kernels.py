"""Every kernel against numpy, scipy or the numpy executor, on the host."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from attnseg.runtime.cleanup import remove_small_components
from attnseg.runtime.cuda import kernels
from attnseg.runtime.cuda.kernels import (
    ARGUMENTS,
    SOURCE,
    BlendArgs,
    DecideArgs,
    FuseArgs,
    GatherArgs,
    LabelArgs,
    NormaliseArgs,
    PasteArgs,
    ScanArgs,
    Shape,
    Strided,
    Turn,
    cached_kernels,
    compile_kernels,
)
from attnseg.runtime.errors import EngineError
from attnseg.runtime.executor import WindowOptions, pad_image, sliding_window
from attnseg.runtime.tta import PASSES, Fusion, Transform, argmax_classes
from attnseg.runtime.windows import WindowPlan, importance_map
from tests.conftest import LinearEngine
from tests.runtime.cuda.host_kernels import HostKernels, pointer

TRANSFORMS = [t for transforms in PASSES.values() for t in transforms]
TRANSFORMS.append(Transform("all axes", axes=(2, 0, 1), flips=(0, 2)))


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    return HostKernels(tmp_path_factory.mktemp("kernels"))


def layout(array: np.ndarray) -> tuple[np.ndarray, Strided]:
    """The elements of a view from its lowest address on, and how they lie."""
    steps = [s // array.itemsize for s in array.strides]
    offset = -sum(s * (n - 1) for s, n in zip(steps, array.shape, strict=True) if s < 0)
    return array, Strided(offset, *steps)


def lowest(array: np.ndarray) -> int:
    return int(np.lib.array_utils.byte_bounds(array)[0])


VIEWS = {
    "C": lambda a: np.ascontiguousarray(a),
    "F": lambda a: np.asfortranarray(a),
    "reversed": lambda a: np.ascontiguousarray(a[::-1, :, ::-1])[::-1, :, ::-1],
    "permuted": lambda a: np.ascontiguousarray(a.transpose(2, 0, 1)).transpose(1, 2, 0),
}


@pytest.mark.parametrize("view", VIEWS)
def test_values_are_counted_and_the_box_is_found(host: HostKernels, view: str) -> None:
    volume = np.zeros((9, 7, 8), np.int16)
    volume[2:7, 1:4, 3:8] = np.random.default_rng(0).integers(-32768, 32767, (5, 3, 5))
    volume[2, 1, 3] = volume[6, 3, 7] = 5  # the corners are not 0
    placed, how = layout(VIEWS[view](volume))
    counts, box = np.zeros(65536, np.int32), np.array([99, 99, 99, -1, -1, -1], np.int32)
    shape = Shape.of(volume.shape)
    args = ScanArgs(lowest(placed), pointer(counts), pointer(box), how, shape)
    host.launch("scan", volume.size, args)
    expected = np.bincount(volume.ravel().astype(np.int64) + 32768, minlength=65536)
    np.testing.assert_array_equal(counts, expected)
    assert box.tolist() == [2, 1, 3, 6, 3, 7]


@pytest.mark.parametrize("view", VIEWS)
def test_the_box_goes_through_the_table(host: HostKernels, view: str) -> None:
    rng = np.random.default_rng(1)
    volume = rng.integers(-32768, 32767, (9, 7, 8)).astype(np.int16)
    table = rng.standard_normal(65536).astype(np.float32)
    placed, how = layout(VIEWS[view](volume))
    image = np.empty((4, 3, 5), np.float32)
    origin = Shape(3, 2, 1)
    args = NormaliseArgs(
        lowest(placed), pointer(table), pointer(image), how, Shape.of(image.shape), origin
    )
    host.launch("normalise", image.size, args)
    np.testing.assert_array_equal(image, table[volume[3:7, 2:5, 1:6].astype(int) + 32768])


def starts_of(plan: WindowPlan) -> np.ndarray:
    return np.array([window.start for window in plan.windows], np.int32)


def gathered(
    host: HostKernels, image: np.ndarray, transform: Transform, plan: WindowPlan, half: bool
) -> np.ndarray:
    starts = starts_of(plan)
    kind = np.float16 if half else np.float32
    batch = np.empty((len(starts), len(image), *plan.window), kind)
    args = GatherArgs(
        pointer(image),
        pointer(batch),
        pointer(starts),
        Shape.of(image.shape[1:]),
        Shape.of(plan.pad_before),
        Shape.of(plan.window),
        Turn.of(transform),
        len(image),
        int(half),
    )
    host.launch("gather", batch.size, args)
    return batch


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: t.name)
def test_windows_of_the_turned_image_are_numpys(
    host: HostKernels, transform: Transform, half: bool
) -> None:
    image = np.random.default_rng(2).standard_normal((3, 11, 9, 5)).astype(np.float32)
    turned = transform.apply(image)
    plan = WindowOptions((8, 8, 8), 0.25).plan(turned.shape[1:])
    batch = gathered(host, image, transform, plan, half)
    padded = pad_image(np.ascontiguousarray(turned), plan)
    expected = np.stack([padded[(slice(None), *w.slices())] for w in plan.windows])
    np.testing.assert_array_equal(batch, expected.astype(batch.dtype))


def blended(
    host: HostKernels, logits: np.ndarray, plan: WindowPlan, at_once: int
) -> tuple[np.ndarray, np.ndarray]:
    total = np.zeros((logits.shape[1], *plan.padded_shape), np.float32)
    weights = np.zeros(plan.padded_shape, np.float32)
    importance, starts = importance_map(plan.window), starts_of(plan)
    for first in range(0, len(logits), at_once):
        part = np.ascontiguousarray(logits[first : first + at_once])
        some = np.ascontiguousarray(starts[first : first + at_once])
        args = BlendArgs(
            pointer(part),
            pointer(importance),
            pointer(total),
            pointer(weights),
            pointer(some),
            Shape.of(plan.padded_shape),
            Shape.of(plan.window),
            len(part),
            logits.shape[1],
            int(logits.dtype == np.float16),
        )
        host.launch("blend", weights.size, args)
    return total, weights


def fuse(
    host: HostKernels,
    total: np.ndarray,
    weights: np.ndarray,
    plan: WindowPlan,
    transform: Transform,
    shape: tuple[int, ...],
    scores: np.ndarray | None = None,
    vote: bool = True,
) -> np.ndarray:
    classes = np.empty(shape, np.uint8)
    args = FuseArgs(
        pointer(total),
        pointer(weights),
        None if scores is None else pointer(scores),
        pointer(classes) if scores is None else None,
        Shape.of(shape),
        Shape.of(plan.padded_shape),
        Shape.of(plan.pad_before),
        Turn.of(transform),
        len(total),
        int(vote),
    )
    host.launch("fuse", classes.size, args)
    return classes


ENGINE = LinearEngine(np.random.default_rng(5).standard_normal((4, 3)).astype(np.float32))


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_blending_is_the_numpy_executors_to_the_bit(host: HostKernels, at_once: int) -> None:
    image = np.random.default_rng(3).standard_normal((3, 19, 13, 6)).astype(np.float32)
    options = WindowOptions((8, 8, 8), 0.25)
    plan = options.plan(image.shape[1:])
    batch = gathered(host, image, PASSES["none"][0], plan, half=False)
    logits = np.concatenate([ENGINE.infer(window[None]) for window in batch])
    total, weights = blended(host, logits, plan, at_once)
    inner = plan.inner(image.shape[1:])
    expected = sliding_window(image, ENGINE, options)
    np.testing.assert_array_equal((total / weights)[(slice(None), *inner)], expected)
    classes = fuse(host, total, weights, plan, PASSES["none"][0], image.shape[1:])
    np.testing.assert_array_equal(classes, argmax_classes(expected))


def test_half_logits_are_blended_in_fp32(host: HostKernels) -> None:
    plan = WindowOptions((8, 8, 8), 0.25).plan((14, 8, 8))
    rng = np.random.default_rng(4)
    logits = rng.standard_normal((len(plan.windows), 2, 8, 8, 8)).astype(np.float16)
    half, exact = (blended(host, x, plan, 9)[0] for x in (logits, logits.astype(np.float32)))
    np.testing.assert_array_equal(half, exact)


@pytest.mark.parametrize("mode", ["vote", "mean"])
@pytest.mark.parametrize("scheme", ["paper", "mirror8"])
def test_passes_are_joined_as_numpy_joins_them(host: HostKernels, scheme: str, mode: str) -> None:
    image = np.random.default_rng(6).standard_normal((3, 17, 9, 10)).astype(np.float32)
    options = WindowOptions((8, 8, 8), 0.25)
    fusion, scores = Fusion(mode), np.zeros((4, *image.shape[1:]), np.float32)  # type: ignore[arg-type]
    for transform in PASSES[scheme]:
        turned = transform.apply(image)
        plan = options.plan(turned.shape[1:])
        batch = gathered(host, image, transform, plan, half=False)
        logits = np.concatenate([ENGINE.infer(window[None]) for window in batch])
        total, weights = blended(host, logits, plan, 2)
        fuse(host, total, weights, plan, transform, image.shape[1:], scores, mode == "vote")
        fusion.add(transform.invert(sliding_window(np.ascontiguousarray(turned), ENGINE, options)))
    classes = np.empty(image.shape[1:], np.uint8)
    args = DecideArgs(pointer(scores), pointer(classes), classes.size, 4)
    host.launch("decide", classes.size, args)
    np.testing.assert_array_equal(classes, fusion.classes())


def test_a_voxel_that_no_window_covers_is_background(host: HostKernels) -> None:
    plan = WindowOptions((8, 8, 8), 0.25).plan((8, 8, 8))
    total, weights = np.zeros((3, 8, 8, 8), np.float32), np.zeros((8, 8, 8), np.float32)
    assert not fuse(host, total, weights, plan, PASSES["none"][0], (8, 8, 8)).any()


def cleaned(
    host: HostKernels, classes: np.ndarray, min_voxels: int
) -> tuple[np.ndarray, int, np.ndarray]:
    result = np.ascontiguousarray(classes)
    parents, sizes = np.empty(classes.shape, np.int32), np.empty(classes.shape, np.int32)
    removed = np.zeros(1, np.int32)
    result = result.copy()
    args = LabelArgs(
        pointer(result),
        pointer(parents),
        pointer(sizes),
        pointer(removed),
        Shape.of(classes.shape),
        min_voxels,
    )
    for name in ("label_start", "label_merge", "label_count", "label_remove"):
        host.launch(name, classes.size, args)
    return result, int(removed[0]), sizes


@settings(max_examples=60)
@given(
    st.tuples(*[st.integers(1, 9)] * 3),
    st.integers(0, 2**32 - 1),
    st.floats(0.05, 0.6),
    st.integers(1, 30),
)
def test_components_are_those_of_scipy(
    host: HostKernels, shape: tuple[int, ...], seed: int, share: float, min_voxels: int
) -> None:
    rng = np.random.default_rng(seed)
    classes = (rng.integers(1, 4, shape) * (rng.random(shape) < share)).astype(np.uint8)
    result, removed, sizes = cleaned(host, classes, min_voxels)
    expected, count = remove_small_components(classes, min_voxels)
    np.testing.assert_array_equal(result, expected)
    assert removed == count
    neighbours = np.ones((3, 3, 3))
    theirs: list[int] = []
    for value in (1, 2, 3):
        components, _ = ndimage.label(classes == value, neighbours)
        theirs += np.bincount(components.ravel())[1:].tolist()
    assert sorted(sizes[sizes > 0].tolist()) == sorted(theirs)


def test_a_snake_through_the_whole_volume_is_one_component(host: HostKernels) -> None:
    classes = np.zeros((21, 21, 3), np.uint8)
    for x in range(0, 21, 2):
        classes[x, :, 1] = 1
        if x + 1 < 21:
            classes[x + 1, 0 if x % 4 else 20, 1] = 1
    assert ndimage.label(classes, np.ones((3, 3, 3)))[1] == 1
    result, removed, sizes = cleaned(host, classes, 2)
    assert removed == 0 and result.sum() == classes.sum()
    assert sizes[sizes > 0].tolist() == [classes.sum()]


@pytest.mark.parametrize("view", VIEWS)
def test_labels_are_pasted_where_the_box_was(host: HostKernels, view: str) -> None:
    classes = np.random.default_rng(7).integers(0, 4, (4, 3, 5)).astype(np.uint8)
    target = VIEWS[view](np.zeros((9, 7, 8), np.uint8))
    placed, how = layout(target)
    counts = np.zeros(32, np.int32)
    values = (ctypes.c_ubyte * 32)(0, 1, 2, 4)
    args = PasteArgs(
        pointer(classes),
        lowest(placed),
        pointer(counts),
        how,
        Shape.of(classes.shape),
        Shape(3, 2, 1),
        values,
    )
    host.launch("paste", classes.size, args)
    expected = np.zeros((9, 7, 8), np.uint8)
    expected[3:7, 2:5, 1:6] = np.array([0, 1, 2, 4])[classes]
    np.testing.assert_array_equal(target, expected)
    np.testing.assert_array_equal(counts[1:4], [(classes == k).sum() for k in (1, 2, 3)])


def test_every_kernel_has_its_arguments() -> None:
    text = SOURCE.read_text()
    names = re.findall(r"^KERNEL\((\w+),", text, re.MULTILINE)
    assert names == list(ARGUMENTS)
    for name, structure in ARGUMENTS.items():
        assert f"KERNEL({name}, {structure.__name__})" in text


@pytest.mark.parametrize("target", ["sm75", "sm86", "sm89", "sm90", "sm120"])
def test_the_kernels_compile_for_a_gpu_that_is_not_there(target: str) -> None:
    cubin = compile_kernels(target)
    assert cubin[:4] == b"\x7fELF"
    for name in ARGUMENTS:
        assert name.encode() in cubin


def test_a_gpu_that_nvrtc_does_not_know_is_refused_in_words() -> None:
    with pytest.raises(EngineError, match=r"cannot compile the kernels for sm61: .*NVRTC"):
        compile_kernels("sm61")


def test_cubins_are_kept_and_damaged_ones_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    first = cached_kernels("sm86", folder)
    (file,) = folder.iterdir()
    monkeypatch.setattr(kernels, "compile_kernels", lambda _: b"compiled again")
    assert cached_kernels("sm86", folder) == first
    for damaged in (b"", b"x" * 10, file.read_bytes()[:-1]):
        file.write_bytes(damaged)
        assert cached_kernels("sm86", folder) == b"compiled again"
        assert cached_kernels("sm86", folder) == b"compiled again"
    assert [f.name for f in folder.iterdir()] == [file.name]
    (tmp_path / "file").touch()
    assert cached_kernels("sm86", tmp_path / "file" / "cache") == b"compiled again"
