"""Device memory of a volume, planned for its shape before anything is allocated.

The plan assumes that the foreground box is the whole volume, so it is valid for every case of that
shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from attnseg.runtime.cuda.device import DeviceBuffer, Region
from attnseg.runtime.cuda.kernels import MOST_INDICES
from attnseg.runtime.errors import OutOfMemoryError, Setting
from attnseg.runtime.geometry import AxisTransform, Shape
from attnseg.runtime.steps.windows import WindowOptions

_ALIGNMENT = 256  # bytes, as for the driver's own allocations
_MEGABYTE = 1_000_000
_ADVICE = "close other programs on the GPU (see nvidia-smi), or use {}"
_ON_THE_CPU = Setting("device", "cpu")


@dataclass(frozen=True, kw_only=True)
class MemoryRequirements:
    """Everything that the memory requirements of a volume depend on.

    Attributes:
        shape: Voxels of the volume, or of an image that the host resampled, along X, Y and Z.
        result: Voxels of the results that this image is resampled to; None if it is not.
        channels: Number of channels.
        classes: Number of channels of the network's output.
        windows: Size and overlap of the windows.
        transforms: Transform of each test-time pass.
        statistics_bytes: Memory for the statistics of all channels.
        scratch_bytes: Memory that is needed while the statistics are computed.
        floating: Whether channels are float32 rather than int16.
        half: Whether the engine's input and output are fp16 rather than fp32.
        batches: Largest and smallest batch size of the engine, in windows.
        components: Whether components are found, of the foreground's holes or of the labels.
        probabilities: Number of regions whose probabilities are requested.
        engine_bytes: Memory that the engine itself holds.
    """

    shape: Shape
    result: Shape | None
    channels: int
    classes: int
    windows: WindowOptions
    transforms: tuple[AxisTransform, ...]
    statistics_bytes: int
    scratch_bytes: int
    floating: bool
    half: bool
    batches: tuple[int, int]
    components: bool
    probabilities: int
    engine_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """Layout of all regions in one block of device memory.

    Attributes:
        batch: Batch size of the engine, in windows. Each batch begins at a multiple of 256 bytes,
            as TensorRT requires.
        chunk: Number of windows gathered at a time.
        windows: Largest number of windows per pass, rounded up to a multiple of `batch`.
        half_logits: Whether logits are stored in fp16 until they are blended.
        places: Offset and size of each region, in bytes.
        block_bytes: Size of the block.
        volume_bytes: Size of the channels, labels and probabilities of three volumes, as the next
            volume may be uploaded while the previous one is still in memory.
        engine_bytes: Memory that the engine itself holds.
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
        """Sum of the block, the volumes and the engine."""
        return self.block_bytes + self.volume_bytes + self.engine_bytes

    def region(self, block: DeviceBuffer, name: str) -> Region:
        """Region of the block by name."""
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
    """Size rounded up to the alignment of the regions, and of the batches within them."""
    return _up(size_bytes, _ALIGNMENT)


def _laid_out(sizes: dict[str, int]) -> tuple[dict[str, tuple[int, int]], int]:
    places, offset = {}, 0
    for name, size in sizes.items():
        places[name] = (offset, size)
        offset += aligned(size)
    return places, offset


def _plan(need: MemoryRequirements, batch: int, sparing: bool) -> MemoryPlan:
    """Plan with all windows at once; if `sparing`, one batch at a time, fp16 logits if smaller."""
    plans = [need.windows.plan(transform.shape(need.shape)) for transform in need.transforms]
    voxels, results = prod(need.shape), prod(need.result or need.shape)
    window = max(prod(plan.window) for plan in plans)
    most = max(len(plan.windows) for plan in plans)
    batch = max(need.batches[1], min(batch, most))
    windows = _up(most, batch)
    fitting = MOST_INDICES // (need.channels * window) // batch * batch  # in one launch
    mirrored = len(need.windows.blending.mirrors) > 1
    chunk = batch if sparing or mirrored else max(batch, min(windows, fitting))
    # Where logits are converted to fp16 or averaged, those of one batch exist twice.
    saves = sparing and 2 * windows > 4 * batch
    # Means of the logits of an fp16 engine are no fp16 numbers.
    engine_kind, half_logits = 2 if need.half else 4, saves or (need.half and not mirrored)
    kept_kind = 2 if half_logits else 4
    once = batch * need.classes * window  # logits of a batch
    network = {
        "images": chunk // batch * aligned(engine_kind * batch * need.channels * window),
        "logits": windows // batch * aligned(kept_kind * once),
        "output": engine_kind * once if mirrored or kept_kind < engine_kind else 0,
        "sums": 4 * once if mirrored and half_logits else 0,
    }
    labelling = dict.fromkeys(("parents", "sizes"), 4 * results * need.components)
    kept = {
        "statistics": need.statistics_bytes,
        "image": 0 if need.result else 4 * need.channels * voxels,  # then it is the volume
        "blended": 4 * need.classes * voxels if need.result else 0,
        "taps": 16 * sum(need.result or ()),
        "importance": 4 * window,
        "flags": 4 * sum(len(plan.windows) for plan in plans),
        "starts": 4 * sum(len(own) for plan in plans for own in plan.starts),
        "which": 4 * windows * len(plans),
        "places": 8 * sum(len(plan.windows) for plan in plans),
        "scores": 4 * need.classes * results if len(plans) > 1 else 0,
        "classes": results,
    }
    places, kept_bytes = _laid_out(kept)
    scratch_bytes = 0
    scanning = {"scan": need.scratch_bytes}
    for together in (scanning, network, labelling):  # never needed at the same time
        laid, size = _laid_out(together)
        places |= {name: (kept_bytes + at, length) for name, (at, length) in laid.items()}
        scratch_bytes = max(scratch_bytes, size)
    one = (4 if need.floating else 2) * need.channels * voxels
    one += (1 + 4 * need.probabilities) * results
    return MemoryPlan(
        batch=batch,
        chunk=chunk,
        windows=windows,
        half_logits=half_logits,
        places=places,
        block_bytes=kept_bytes + scratch_bytes,
        volume_bytes=3 * one,
        engine_bytes=need.engine_bytes,
    )


def smallest_plan(need: MemoryRequirements) -> MemoryPlan:
    """Plan of least memory, with the smallest batch, and fp16 logits if that saves memory."""
    return min(_plans(need), key=lambda plan: (plan.total_bytes, plan.batch))


def _plans(need: MemoryRequirements) -> Iterator[MemoryPlan]:
    """Plans from fastest to smallest: all windows, one batch at a time, the smallest batch."""
    yield _plan(need, need.batches[0], False)
    yield _plan(need, need.batches[0], True)
    yield _plan(need, need.batches[1], True)


def plan_memory(
    need: MemoryRequirements, max_memory_bytes: int | None, free_bytes: int | None = None
) -> MemoryPlan:
    """Select the fastest plan that fits.

    Args:
        need: Requirements of the volume.
        max_memory_bytes: Limit of the device memory; None for no limit.
        free_bytes: Free device memory with the engine and one volume loaded; None if unknown. If
            not even the smallest plan fits there, that plan is returned, to be tried all the same.

    Raises:
        OutOfMemoryError: No plan fits the limit; the error states the smallest size needed.
    """
    plans = [*_plans(need), smallest_plan(need)]
    limit = max_memory_bytes
    allowed = [p for p in plans if limit is None or p.total_bytes <= limit]
    for plan in allowed:
        to_come = plan.block_bytes + 2 * plan.volume_bytes // 3
        if free_bytes is None or to_come <= free_bytes:
            return plan
    if allowed:
        return allowed[-1]
    plan, shape = plans[-1], "x".join(map(str, need.shape))
    raise OutOfMemoryError(
        f"a volume of {shape} takes at least {_in_words(plan.total_bytes)} of device memory, "
        f"the limit is {_in_words(limit or 0)}",
        "raise {}, or use {}",
        Setting("max_memory_bytes"),
        _ON_THE_CPU,
    )


def explain_upload(volume_bytes: int, free_bytes: int) -> OutOfMemoryError:
    """Error for a device without enough memory for the volume itself."""
    return OutOfMemoryError(
        f"a channel of the volume takes {_in_words(volume_bytes)} of device memory, "
        f"{_in_words(free_bytes)} are free",
        _ADVICE,
        _ON_THE_CPU,
    )


def explain_shortage(
    need: MemoryRequirements, tried: MemoryPlan, free_bytes: int
) -> OutOfMemoryError:
    """Error for a device on which not even the smallest plan fits."""
    shape = "x".join(map(str, need.shape))
    return OutOfMemoryError(
        f"a volume of {shape} takes {_in_words(tried.total_bytes)} of device memory, and at least "
        f"{_in_words(smallest_plan(need).total_bytes)} with the smallest batch; "
        f"{_in_words(free_bytes)} are free",
        _ADVICE,
        _ON_THE_CPU,
    )
