"""What the executor needs of a device's memory, planned for a shape before anything is allocated.

The plan is for the whole volume as box, so it holds for every case of that shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from attnseg.runtime.cuda.device import DeviceBuffer, Region
from attnseg.runtime.cuda.kernels import MOST_INDICES
from attnseg.runtime.cuda.statistics import refine_bytes, scan_bytes
from attnseg.runtime.errors import OutOfMemoryError
from attnseg.runtime.executor import WindowOptions
from attnseg.runtime.tta import Transform
from attnseg.runtime.windows import Shape

_ALIGNMENT = 256  # bytes; what the driver's own allocations have
_MEGABYTE = 1_000_000
_ADVICE = "close other programs on the GPU (see nvidia-smi), or use --device cpu"


@dataclass(frozen=True)
class Need:
    """What memory is planned for.

    Attributes:
        shape: X, Y, Z of the volume.
        channels: of the volume.
        classes: of the network, background included.
        window: how it slides.
        transforms: one pass each.
        percentiles: of the normalisation's landmarks.
        floating: whether channels are float32 rather than int16.
        half: whether the engine takes and gives fp16.
        batches: windows that the engine takes in one call, most and least.
        clean: whether components are removed.
        engine_bytes: what the engine holds itself.
    """

    shape: Shape
    channels: int
    classes: int
    window: WindowOptions
    transforms: tuple[Transform, ...]
    percentiles: int
    floating: bool
    half: bool
    batches: tuple[int, int]
    clean: bool
    engine_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """Where everything lies in one block of memory.

    Attributes:
        batch: windows that the engine takes in one call.
        chunk: windows that are gathered at a time.
        windows: most windows of a pass, a multiple of `batch`.
        half_logits: whether logits are kept in fp16 until they are blended.
        places: offset and size of each region, in bytes.
        block_bytes: of the block.
        volume_bytes: of what comes and goes with each volume, its channels and its labels; three
            times, as the next may come while the last is still there.
        engine_bytes: what the engine holds itself.
    """

    batch: int
    chunk: int
    windows: int
    half_logits: bool
    places: dict[str, tuple[int, int]]
    block_bytes: int
    volume_bytes: int
    engine_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of all that is planned."""
        return self.block_bytes + self.volume_bytes + self.engine_bytes

    def region(self, block: DeviceBuffer, name: str) -> Region:
        """A region by its name."""
        offset, size_bytes = self.places[name]
        return Region.of(block, offset, size_bytes)

    def describe(self) -> dict[str, int | str]:
        """Plain values, for reports."""
        return {
            "planned_bytes": self.total_bytes,
            "of_engine_bytes": self.engine_bytes,
            "batch": self.batch,
            "logits": "fp16" if self.half_logits else "fp32",
        }


def _in_words(size_bytes: int) -> str:
    return f"{-(-size_bytes // _MEGABYTE)} MB"


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def aligned(size_bytes: int) -> int:
    """Up to where the next region may begin."""
    return _up(size_bytes, _ALIGNMENT)


def _laid_out(sizes: dict[str, int]) -> tuple[dict[str, tuple[int, int]], int]:
    places, offset = {}, 0
    for name, size in sizes.items():
        places[name] = (offset, size)
        offset += aligned(size)
    return places, offset


def _plan(need: Need, batch: int, sparing: bool) -> MemoryPlan:
    """A plan with all windows at once, or one that takes as little as can be."""
    plans = [need.window.plan([need.shape[a] for a in t.axes]) for t in need.transforms]
    voxels, window = prod(need.shape), max(prod(plan.window) for plan in plans)
    most = max(len(plan.windows) for plan in plans)
    batch = max(need.batches[1], min(batch, most))
    windows = _up(most, batch)
    fitting = MOST_INDICES // (need.channels * window) // batch * batch  # of one launch
    chunk = batch if sparing else max(batch, min(windows, fitting))
    # The logits of one batch are there in both types where they are narrowed.
    saves = sparing and 2 * windows > 4 * batch
    engine_kind, half_logits = 2 if need.half else 4, need.half or saves
    network = {
        "images": engine_kind * chunk * need.channels * window,
        "logits": (2 if half_logits else 4) * windows * need.classes * window,
        "wide": 4 * batch * need.classes * window if half_logits and not need.half else 0,
    }
    cleaning = {"parents": 4 * voxels * need.clean, "sizes": 4 * voxels * need.clean}
    kept = {
        "scan": scan_bytes(need.channels),
        "image": 4 * need.channels * voxels,
        "importance": 4 * window,
        "flags": 4 * sum(len(plan.windows) for plan in plans),
        "which": 4 * windows * len(plans),
        "places": 4 * sum(len(plan.windows) for plan in plans),
        "scores": 4 * need.classes * voxels if len(plans) > 1 else 0,
        "classes": voxels,
    }
    places, kept_bytes = _laid_out(kept)
    scratch_bytes = 0
    refining = {"refine": refine_bytes(need.percentiles) if need.floating else 0}
    for together in (refining, network, cleaning):  # never needed at the same time
        laid, size = _laid_out(together)
        places |= {name: (kept_bytes + at, length) for name, (at, length) in laid.items()}
        scratch_bytes = max(scratch_bytes, size)
    one = ((4 if need.floating else 2) * need.channels + 1) * voxels
    return MemoryPlan(
        batch,
        chunk,
        windows,
        half_logits,
        places,
        kept_bytes + scratch_bytes,
        3 * one,
        need.engine_bytes,
    )


def least_plan(need: Need) -> MemoryPlan:
    """The plan that takes least, with the smallest batch; logits in fp16 if that saves anything."""
    return min(_plans(need), key=lambda plan: (plan.total_bytes, plan.batch))


def _plans(need: Need) -> Iterator[MemoryPlan]:
    """The fastest, the same with fewer windows gathered at a time, and the one that takes least."""
    yield _plan(need, need.batches[0], False)
    yield _plan(need, need.batches[0], True)
    yield _plan(need, need.batches[1], True)


def plan_memory(need: Need, most_bytes: int | None, free_bytes: int | None = None) -> MemoryPlan:
    """The fastest plan that fits.

    Args:
        need: what is to be planned.
        most_bytes: that it may take, or None.
        free_bytes: of the device, with the engine and one volume on it; None if it is not known. If
            not even the least plan fits there, it is given all the same, to be tried.

    Raises:
        OutOfMemoryError: none does; it says the least that would do.
    """
    plans = [*_plans(need), least_plan(need)]
    allowed = [p for p in plans if most_bytes is None or p.total_bytes <= most_bytes]
    for plan in allowed:
        to_come = plan.block_bytes + 2 * plan.volume_bytes // 3
        if free_bytes is None or to_come <= free_bytes:
            return plan
    if allowed:
        return allowed[-1]
    plan, shape = plans[-1], "x".join(map(str, need.shape))
    raise OutOfMemoryError(
        f"a volume of {shape} takes at least {_in_words(plan.total_bytes)} of device memory, "
        f"max-memory allows {_in_words(most_bytes or 0)}; raise it, or use --device cpu"
    )


def explain_upload(volume_bytes: int, free_bytes: int) -> OutOfMemoryError:
    """The error of a device that does not even hold the volume."""
    return OutOfMemoryError(
        f"a channel of the volume takes {_in_words(volume_bytes)} of device memory, "
        f"{_in_words(free_bytes)} are free: {_ADVICE}"
    )


def explain_shortage(need: Need, tried: MemoryPlan, free_bytes: int) -> OutOfMemoryError:
    """The error of a device on which even the least plan did not fit."""
    shape = "x".join(map(str, need.shape))
    return OutOfMemoryError(
        f"a volume of {shape} takes {_in_words(tried.total_bytes)} of device memory, and at least "
        f"{_in_words(least_plan(need).total_bytes)} with the smallest batch; "
        f"{_in_words(free_bytes)} are free: {_ADVICE}"
    )
