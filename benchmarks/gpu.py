"""Speed of the CUDA executor: kernels, network and whole volumes, beside lower bounds and MONAI.

    python -m benchmarks.gpu [--case FOLDER] [--model BUNDLE] [--engine auto] [--repeats 20]

Without --case: the first validation case below ATTNSEG_DATA, else the synthetic demo case. Without
a CUDA device, a message says so, and only the results that need none are printed: the work of the
volume, its floors on cards with known rates, and the host's time for the same steps.

A floor is a lower bound: the time that a card needs to move the required bytes, or to perform the
network's multiplications, at the rates of its data sheet. A projection is not a measurement.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from attnseg import Bundle, Segmenter, SegmentOptions, Volume
from attnseg.runtime.case.nifti import encode_labels, read_volume
from attnseg.runtime.case.scans import Case
from attnseg.runtime.cuda.device import Device, Region, bytes_at
from attnseg.runtime.cuda.kernels import (
    GATHERED,
    SPREAD,
    BlendArgs,
    Extent,
    GatherArgs,
    OccupyArgs,
    ScanArgs,
    SumCountsArgs,
    groups_along_z,
)
from attnseg.runtime.cuda.memory import MemoryRequirements, plan_memory, smallest_plan
from attnseg.runtime.cuda.statistics import scratch_bytes, statistics_bytes
from attnseg.runtime.engines.base import EngineInfo, ModelFile
from attnseg.runtime.engines.device import DeviceEngine
from attnseg.runtime.engines.select import select_engine
from attnseg.runtime.errors import EngineError
from attnseg.runtime.options import resolve
from attnseg.runtime.steps.preprocess import preprocess
from attnseg.runtime.steps.tta import PASSES
from benchmarks.harness import print_machine
from benchmarks.pipeline import choose_case
from tests.runtime.cuda.host_device import HostDevice

TTA = "paper"  # three passes


@dataclass(frozen=True)
class Card:
    """Peak rates of a card, from its data sheet.

    Attributes:
        bytes_per_s: Bandwidth of device memory.
        flops: Dense fp16 tensor operations per second with fp32 accumulation; a multiply-add
            counts as two.
        link_bytes_per_s: Bandwidth of the PCI Express link to the host.
    """

    bytes_per_s: float
    flops: float
    link_bytes_per_s: float


# NVIDIA's data sheets: GA102 whitepaper (3090: 71 of 142 TFLOPS when summing in fp32), H200, A100,
# AD102 whitepaper. Links: PCIe 4 x16 and 5 x16, at 90 % of 32 and 64 GB/s.
CARDS = {
    "RTX 3090": Card(936e9, 71e12, 28e9),
    "RTX 4090": Card(1008e9, 165e12, 28e9),
    "A100": Card(1555e9, 312e12, 28e9),
    "H100": Card(3350e9, 989e12, 57e9),
    "H200": Card(4800e9, 989e12, 57e9),
}


@dataclass
class Work:
    """Work of a device for one volume.

    Attributes:
        windows: Number of windows that the network ran on.
        launches: Number of launches by kernel.
        moved_bytes: Bytes that must be moved by kernel, see `floor_bytes`.
        elapsed_ms: Device time by kernel; empty if it was not measured.
    """

    windows: int = 0
    launches: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    moved_bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    elapsed_ms: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def voxels_of(shape: Extent) -> int:
    """Number of voxels."""
    return int(shape.x * shape.y * shape.z)


def _cover(args: BlendArgs) -> float:
    """Mean number of windows that cover a voxel."""
    image = [getattr(args.shape, "xyz"[axis]) for axis in args.transform.axes]
    windows, window = (
        [getattr(extent, axis) for axis in "xyz"]
        for extent in (args.tiling.count, args.tiling.window)
    )
    padded = np.maximum(image, window)
    return float(np.prod(np.array(windows) * window / padded))


def windows_of(count: int, args: GatherArgs) -> int:
    """Number of windows that a launch of `gather` on so many indices copies."""
    window = [getattr(args.tiling.window, axis) for axis in "xyz"]
    return int(count // (args.channels * groups_along_z(window, GATHERED)))


def floor_bytes(name: str, count: int, args: Any) -> int:
    """Bytes that a launch must move, each counted once (`B` in kernels.cu)."""
    if name == "moment":
        return 4 * int(args.voxels)
    if name in ("scan", "scan_float"):
        return (2 if name == "scan" else 4) * voxels_of(args.shape)
    if name == "occupy":
        return 4 * voxels_of(args.shape) * int(args.channels)
    if name == "gather":
        elements = windows_of(count, args) * args.channels * voxels_of(args.tiling.window)
        return int(elements * (6 if args.half else 8))
    if name.startswith("resample"):
        return 4 * count * int(args.result.count)
    if name == "fill":
        return 5 * voxels_of(args.shape)
    if name == "average":
        sums = 4 * (args.which > 0) + 4 * (args.which < args.mirrors - 1)
        mean = (2 if args.half_mean else 4) * (args.which == args.mirrors - 1)
        return count * int(args.count * ((2 if args.half else 4) + sums + mean))
    if name.startswith("blend"):
        logits = _cover(args) * args.count * (2 if args.half else 4)
        last = args.which == args.passes - 1
        scores = 4 * args.count * ((args.which > 0) + (not last)) if args.scores else 0
        return int((logits + scores + last) * voxels_of(args.shape))
    per_index = {
        "sum_counts": 68,
        "refine": 4,
        "normalise": 6,
        "normalise_float": 8,
        "label_start": 9,
        "label_merge": 5,
        "label_flatten": 4,
        "label_count": 4,
        "label_remove": 4,
        "empty": 4,
        "open_border": 0,
        "restore": 2,
    }
    return per_index[name] * count


class Counting:
    """A device that records its launches, and times them if requested."""

    def __init__(self, device: Device, timed: bool) -> None:
        self._device, self._timed = device, timed
        self.work = Work()
        self._marks: list[tuple[str, Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def launch(self, name: str, count: int, args: ctypes.Structure) -> None:
        """See `Device.launch`."""
        before = self._device.mark() if self._timed else None
        self._device.launch(name, count, args)
        self.work.launches[name] += 1
        if isinstance(args, GatherArgs):
            self.work.windows += windows_of(count, args)
        self.work.moved_bytes[name] += floor_bytes(name, count, args)
        if before:
            self._marks.append((name, before, self._device.mark()))

    def finish(self) -> Work:
        """Return the work recorded since the last call, and start anew."""
        for name, before, after in self._marks:
            self.work.elapsed_ms[name] += after.elapsed_ms(before)
        work, self.work = self.work, Work()
        self._marks.clear()
        return work


class Idle:
    """A stand-in for a GPU engine on host memory that sets all logits to zero."""

    info = EngineInfo("none", "0", "fp16", "none")
    batches, half, memory_bytes, classes = (12, 1), True, 0, None
    recorded = "no: nothing is run"

    def __init__(self, device: Any) -> None:
        self.device = device

    def infer(self, batch: Any) -> Any:
        """Not implemented; the device pipeline calls `enqueue`."""
        raise NotImplementedError

    def enqueue(self, images: Region, logits: Region, shape: Sequence[int]) -> None:
        """See `DeviceEngine.enqueue`."""
        bytes_at(logits.pointer, logits.size_bytes)[:] = 0


class OnDevice:
    """An engine with its device replaced by another object, such as `Counting`."""

    def __init__(self, engine: Any, device: Any) -> None:
        self._engine, self.device = engine, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def _only_look(name: str, count: int, args: Any) -> None:
    """Stand-in for the kernels that finds the box and marks every window as occupied, no more."""
    if isinstance(args, ScanArgs):
        memory = bytes_at(args.volume, 2 * voxels_of(args.shape)).view(np.int16)
        values, counts = np.unique(memory[memory != 0], return_counts=True)
        spread = bytes_at(args.counts, 4 * SPREAD << 16).view(np.int32).reshape(-1, SPREAD)
        spread[values.astype(int) + 32768, 0] = counts
        shape = np.array([getattr(args.shape, axis) for axis in "xyz"])
        found = np.nonzero(memory.reshape(shape))
        box = bytes_at(args.box, 24).view(np.int32)
        box[:3] = shape - [along.min() for along in found]
        box[3:] = [along.max() + 1 for along in found]
    elif isinstance(args, SumCountsArgs):
        spread = bytes_at(args.counts, 4 * SPREAD << 16).view(np.int32)
        bytes_at(args.sums, 4 << 16).view(np.int32)[:] = spread.reshape(-1, SPREAD).sum(axis=1)
    elif isinstance(args, OccupyArgs):
        bytes_at(args.occupied, 4 * args.tiling.windows).view(np.int32)[:] = 1


def work_of(bundle: Bundle, volume: Volume) -> Work:
    """The work of a device for an int16 volume, counted without a GPU."""
    counting = Counting(HostDevice(_only_look), timed=False)
    on_device(bundle, Idle(counting)).segment(volume)
    return counting.finish()


def on_device(bundle: Bundle, engine: DeviceEngine) -> Segmenter:
    """A segmenter with three test-time passes on an engine."""
    return Segmenter(bundle, SegmentOptions(tta=TTA), engine)


def measure_kernels(
    bundle: Bundle, engine: Any, volume: Volume, repeats: int
) -> tuple[Work, dict[str, float]]:
    """The work of a volume with median milliseconds per kernel, and those per stage."""
    counting = Counting(engine.device, timed=True)
    segmenter = on_device(bundle, OnDevice(engine, counting))
    segmenter.segment(volume)
    counting.finish()
    rows: list[Work] = []
    stages: list[dict[str, float]] = []
    for _ in range(repeats):
        stages.append(segmenter.segment(volume).elapsed_ms)
        rows.append(counting.finish())
    work = rows[0]
    work.elapsed_ms = {n: statistics.median(r.elapsed_ms[n] for r in rows) for n in work.launches}
    return work, {s: statistics.median(r[s] for r in stages) for s in stages[0]}


def times_ms(run: Callable[[], object], repeats: int) -> list[float]:
    """Sorted wall-clock milliseconds of each run, after two warm-up runs."""
    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        run()
        times.append((time.perf_counter() - began) * 1000)
    return sorted(times[2:])


def percentile(times: Sequence[float], percent: int) -> float:
    """Percentile of sorted times, by the nearest-rank method."""
    return times[min(len(times) - 1, -(-percent * len(times) // 100) - 1)]


@dataclass(frozen=True)
class Layer:
    """One convolution of the network, for one window.

    Attributes:
        flops: Number of operations; a multiply-add counts as two.
        moved_bytes: Size of input, output and weights in fp16.
    """

    flops: int
    moved_bytes: int


def layers_of(model: ModelFile, window: Sequence[int]) -> list[Layer]:
    """The convolutions of an ONNX graph for one window."""
    import onnx

    graph = onnx.load_from_string(model.read_bytes())
    dims = graph.graph.input[0].type.tensor_type.shape.dim
    for dim, size in zip(dims, (1, dims[1].dim_value, *window), strict=True):
        dim.dim_value = size
    graph = onnx.shape_inference.infer_shapes(graph)
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.graph.value_info, *graph.graph.input, *graph.graph.output)
    }
    weights = {w.name: list(w.dims) for w in graph.graph.initializer}
    layers = []
    for node in graph.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose"):
            continue
        given, kernel, made = shapes[node.input[0]], weights[node.input[1]], shapes[node.output[0]]
        # A transposed convolution of stride s meets each weight once per input voxel.
        voxels = math.prod(given[2:]) if node.op_type == "ConvTranspose" else math.prod(made[2:])
        sizes = math.prod(given) + math.prod(made) + math.prod(kernel)
        layers.append(Layer(2 * math.prod(kernel) * voxels, 2 * sizes))
    return layers


def roofline_ms(layers: Sequence[Layer], windows: int, card: Card) -> float:
    """Roofline of the network: each layer at the slower of the card's tensor rate and bandwidth."""
    return (
        1000
        * windows
        * sum(
            max(layer.flops / card.flops, layer.moved_bytes / card.bytes_per_s) for layer in layers
        )
    )


def print_kernels(work: Work, card: Card | None, timed: bool) -> None:
    """Print one row per kernel: launches, bytes, floor, time and rate."""
    print(f"\n{'kernel':<18}{'launches':>9}{'MB':>9}{'floor ms':>10}{'ms':>9}{'GB/s':>8}")
    for name, launches in work.launches.items():
        moved = work.moved_bytes[name]
        floor = f"{1000 * moved / card.bytes_per_s:.3f}" if card else "?"
        took = work.elapsed_ms[name] if timed else 0.0
        rate = f"{moved / took / 1e6:.0f}" if took else ""
        shown = f"{took:.3f}" if timed else "not run"
        print(f"{name:<18}{launches:>9}{moved / 1e6:>9.1f}{floor:>10}{shown:>9}{rate:>8}")


def print_memory(bundle: Bundle, volume: Volume) -> None:
    """Print the memory planned for a volume, without the engine's own."""
    manifest = bundle.manifest
    planned = resolve(SegmentOptions(tta=TTA), manifest)
    need = MemoryRequirements(
        shape=volume.shape,
        result=None,
        channels=len(manifest.task.channels),
        classes=len(manifest.task.labels),
        windows=planned.windows,
        transforms=planned.transforms,
        statistics_bytes=statistics_bytes(len(manifest.task.channels)),
        scratch_bytes=scratch_bytes(floating=False, percentiles=0),
        floating=False,
        half=True,
        batches=Idle.batches,
        components=planned.min_voxels > 1,
        probabilities=0,
        engine_bytes=0,
    )
    print("\nplanned memory without the engine, and the minimum, in MB:")
    for name, half in (("fp16", True), ("fp32", False)):
        of_type = replace(need, half=half)
        most, least = plan_memory(of_type, None), smallest_plan(of_type)
        print(f"{name} engine {most.total_bytes / 1e6:.0f}, {least.total_bytes / 1e6:.0f}")


@dataclass(frozen=True)
class Slack:
    """Ratio of time to floor, for the kernels and for the network."""

    kernels: float
    network: float


AIMED = Slack(4.0, 4.0)
"""Target of the project; used if nothing was measured."""


def print_projection(work: Work, layers: Sequence[Layer], voxels: int, slack: Slack) -> None:
    """Print the projected time of a volume on an RTX 3090, at the given ratios to its floors."""
    card = CARDS["RTX 3090"]
    copies = 1000 * voxels * (4 * 2 + 1) / card.link_bytes_per_s
    kernels = 1000 * sum(work.moved_bytes.values()) / card.bytes_per_s
    network = roofline_ms(layers, work.windows, card)
    whole = copies + slack.kernels * kernels + slack.network * network
    print(
        f"\nRTX 3090, a projection, not measured: {whole:.0f} ms (aim 250); copies {copies:.1f}, "
        f"kernels {slack.kernels:.1f} x {kernels:.1f}, network {slack.network:.1f} x {network:.1f}"
    )


def print_floors(work: Work, layers: Sequence[Layer]) -> None:
    """Print one row per card: the network's roofline and the kernels' floor."""
    flops = work.windows * sum(layer.flops for layer in layers)
    print(f"\n{work.windows} windows, {flops / 1e12:.2f} TFLOP; floors in ms:")
    print(f"{'card':<10}{'tensor rate':>12}{'roofline':>10}{'kernels':>9}")
    for name, card in CARDS.items():
        tensor = 1000 * flops / card.flops
        roofline = roofline_ms(layers, work.windows, card)
        kernels = 1000 * sum(work.moved_bytes.values()) / card.bytes_per_s
        print(f"{name:<10}{tensor:>12.1f}{roofline:>10.1f}{kernels:>9.2f}")


def peer_ms(bundle: Bundle, volume: Volume, repeats: int) -> float | None:
    """Median time of torch fp16 with MONAI's sliding window, three passes, or None if unavailable.

    It covers the steps from normalised image to classes; normalisation and clean-up are not timed.
    """
    try:
        import torch
        from monai.inferers.utils import sliding_window_inference

        from attnseg.export.source.checkpoint import load_trained
    except ImportError as error:
        print(f"peer      not run: {error}")
        return None
    if not torch.cuda.is_available():
        print("peer      not run: torch finds no CUDA device")
        return None
    manifest = bundle.manifest
    image = preprocess(volume, manifest.preprocessing).image
    network = load_trained(bundle.file("weights")).network.half().cuda().eval()
    inference = manifest.inference

    def run() -> None:
        with torch.inference_mode():
            scores: Any = 0
            for transform in PASSES[TTA]:
                turned = np.ascontiguousarray(transform.apply(image))
                given = torch.from_numpy(turned)[None].half().cuda()
                logits: Any = sliding_window_inference(
                    given, inference.window, 4, network, inference.overlap, mode="gaussian"
                )
                axes = [a + 2 for a in transform.flips]
                logits = logits.flip(axes) if axes else logits
                back = [0, 1, *(int(a) + 2 for a in np.argsort(transform.axes))]
                scores = scores + logits.permute(back).float().softmax(dim=1)
            scores.argmax(dim=1).to(torch.uint8).cpu()

    return statistics.median(times_ms(run, repeats))


def host_ms(bundle: Bundle, volume: Volume) -> dict[str, float]:
    """Milliseconds per stage of the numpy pipeline on the processor, three passes."""
    segmenter = Segmenter(bundle, SegmentOptions(tta=TTA, device="cpu"))
    segmenter.segment(volume)
    return segmenter.segment(volume).elapsed_ms


def print_whole(segmenter: Segmenter, case: Case, volume: Volume, repeats: int) -> float:
    """Time whole volumes and print the results; return the median from array to labels."""
    labels = {segmenter.segment(volume).labels.tobytes() for _ in range(3)}
    assert len(labels) == 1, "the same case gave different labels"
    whole = times_ms(lambda: segmenter.segment(volume), repeats)
    with tempfile.TemporaryDirectory() as folder:

        def files() -> None:
            read = read_volume(case.files)
            found = segmenter.segment(read)
            Path(folder, "labels.nii.gz").write_bytes(encode_labels(found.labels, read))

        disk = times_ms(files, repeats)
    for name, times, aim in (("array to labels", whole, 60), ("NIfTI to NIfTI", disk, 150)):
        p50, p95 = percentile(times, 50), percentile(times, 95)
        print(f"{name:<18}p50 {p50:.1f}, p95 {p95:.1f} ms (aim {aim})")
    print(f"memory            {segmenter.segment(volume).memory}")
    return percentile(whole, 50)


def measure(bundle: Bundle, case: Case, engine: Any, repeats: int, layers: list[Layer]) -> None:
    """Time kernels, network and whole volumes on the engine's device, and print the results."""
    volume, name = read_volume(case.files), engine.device.name
    work, stages = measure_kernels(bundle, engine, volume, repeats)
    card = next((card for model, card in CARDS.items() if model in name), None)
    print_kernels(work, card, timed=True)
    kernels_ms = sum(work.elapsed_ms.values())
    print(f"all kernels {kernels_ms:.2f} ms (aim 5); stages of the device, gaps included:")
    print(", ".join(f"{stage} {ms:.2f}" for stage, ms in stages.items()))
    if card:
        floor = roofline_ms(layers, work.windows, card)
        # The stage includes the gather kernel.
        network_ms = stages["network"] - work.elapsed_ms["gather"]
        print(f"network {network_ms:.2f} ms, {network_ms / floor:.1f} times its roofline (aim 4)")
        moved_ms = 1000 * sum(work.moved_bytes.values()) / card.bytes_per_s
        slack = Slack(kernels_ms / moved_ms, network_ms / floor)
        print_projection(work, layers, math.prod(volume.shape), slack)
    whole_ms = print_whole(on_device(bundle, engine), case, volume, repeats)
    peer = peer_ms(bundle, volume, repeats)
    if peer:
        print(f"torch fp16, MONAI {peer:.1f} ms, {peer / whole_ms:.1f} times ours (aim 5)")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--case", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()

    print_machine("attnseg", "numpy", "cuda-core", "onnxruntime-gpu", "torch", "monai")
    bundle = Bundle.load(options.model) if options.model else Bundle.default()
    with tempfile.TemporaryDirectory() as scratch:
        case = choose_case(options.case, Path(scratch))
        volume = read_volume(case.files)
        layers = layers_of(bundle.file("onnx"), bundle.manifest.inference.window)
        print(f"case      {case.name}, {volume.shape}, tta {TTA}")
        work = work_of(bundle, volume)
        print_floors(work, layers)
        print_memory(bundle, volume)
        try:
            chosen = SegmentOptions(device="cuda", engine=options.engine, tta=TTA)
            engine: Any = select_engine(bundle, resolve(chosen, bundle.manifest).engine).engine
        except EngineError as error:
            print(f"\nnothing was run on a GPU: {error}")
            print_kernels(work, CARDS["RTX 3090"], timed=False)
            print_projection(work, layers, math.prod(volume.shape), AIMED)
        else:
            print(f"\n{engine.device.gpu}; {engine.info.name} {engine.info.version}")
            measure(bundle, case, engine, options.repeats, layers)
        host = host_ms(bundle, volume)
        rest_ms = sum(ms for stage, ms in host.items() if stage != "network")
        print(f"\nall stages on the host except the network: {rest_ms:.0f} ms")


if __name__ == "__main__":
    main()
