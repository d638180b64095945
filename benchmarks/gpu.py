"""The CUDA executor: each kernel against its byte floor, whole volumes, the network's roofline, peers.

    python -m benchmarks.gpu [--case FOLDER] [--model BUNDLE] [--engine auto] [--repeats 20]

Without --case: the first validation case below ATTNSEG_DATA, else the synthetic demo case. Without
a CUDA device it says so, and prints what needs none: the work to be done, its floors on cards
whose rates are known, and the host's time for the same steps.

A floor is the time that a card needs to move the bytes that must be moved, or to do the network's
multiplications, at the rates of its data sheet. What is called a projection is that and no measurement.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from attnseg import Bundle, Segmenter, SegmentOptions, Volume
from attnseg.runtime.cuda.device import Device
from attnseg.runtime.cuda.kernels import Tiling
from attnseg.runtime.engines.base import DeviceEngine
from attnseg.runtime.errors import EngineError
from attnseg.runtime.scans import Case
from attnseg.runtime.volume import encode_labels, read_volume
from attnseg.runtime.windows import plan_windows
from benchmarks.harness import median_ms, print_machine
from benchmarks.pipeline import choose_case

TTA = "paper"  # three passes


@dataclass(frozen=True)
class Card:
    """Rates of a data sheet.

    Attributes:
        bytes_per_s: of device memory.
        flops: fp16 tensor operations per second, dense, summed in fp32; a multiply-add is two.
        link_bytes_per_s: from the host, of its PCI Express.
    """

    bytes_per_s: float
    flops: float
    link_bytes_per_s: float


# NVIDIA's data sheets: GA102 whitepaper (3090: 71 of 142 TFLOPS when summing in fp32), H200, A100,
# AD102 whitepaper. Links: PCIe 4 x16 and 5 x16 at nine tenths of 32 and 64 GB/s.
CARDS = {
    "RTX 3090": Card(936e9, 71e12, 28e9),
    "RTX 4090": Card(1008e9, 165e12, 28e9),
    "A100": Card(1555e9, 312e12, 28e9),
    "H100": Card(3350e9, 989e12, 57e9),
    "H200": Card(4800e9, 989e12, 57e9),
}


@dataclass
class Work:
    """What a volume gave a device to do: launches and bytes of each kernel, windows."""

    launches: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    moved_bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    elapsed_ms: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def _cover(tiling: Tiling) -> float:
    """Windows around a voxel, in the mean."""
    windows, window, last = tiling.count, tiling.window, tiling.last
    return prod(
        getattr(windows, a) * getattr(window, a) / (getattr(last, a) + getattr(window, a))
        for a in "xyz"
    )


def floor_bytes(name: str, count: int, args: Any) -> int:
    """Bytes that a launch must move, each counted once (B in kernels.cu)."""
    if name == "moment":
        return 4 * int(args.voxels)
    if name == "occupy":
        return 4 * int(args.channels) * count
    if name == "gather":
        return (4 + (2 if args.half else 4)) * count
    if name == "blend":
        logits = _cover(args.tiling) * args.count * (2 if args.half else 4)
        scores = 4 * args.count * ((not args.first) + (not args.last)) if args.scores else 0
        return round((logits + scores + int(args.last)) * count)
    per_index = {
        "scan": 2,
        "scan_float": 4,
        "refine": 4,
        "normalise": 6,
        "normalise_float": 8,
        "narrow": 6,
        "label_start": 9,
        "label_merge": 5,
        "label_count": 4,
        "label_remove": 4,
        "paste": 2,
    }
    return per_index[name] * count


class Counting:
    """A device that notes what it is given, and times it if asked."""

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
        self.work.moved_bytes[name] += floor_bytes(name, count, args)
        if before:
            self._marks.append((name, before, self._device.mark()))

    def finish(self) -> Work:
        """What was noted since the last time."""
        for name, before, after in self._marks:
            self.work.elapsed_ms[name] += after.elapsed_ms(before)
        work, self.work = self.work, Work()
        self._marks.clear()
        return work


def on_device(bundle: Bundle, engine: DeviceEngine) -> Segmenter:
    """A segmenter for three passes by an engine."""
    return Segmenter(bundle, SegmentOptions(tta=TTA), engine)


def measure_kernels(
    bundle: Bundle, engine: Any, volume: Volume, repeats: int
) -> tuple[Work, dict[str, float]]:
    """The work of a volume, median device milliseconds per kernel, and per stage, network included."""
    device = engine.device
    engine.device = counting = Counting(device, timed=True)
    try:
        segmenter = on_device(bundle, engine)
        segmenter.segment(volume)
        counting.finish()
        rows: list[Work] = []
        stages: list[dict[str, float]] = []
        for _ in range(repeats):
            stages.append(segmenter.segment(volume).elapsed_ms)
            rows.append(counting.finish())
    finally:
        engine.device = device
    work = rows[0]
    work.elapsed_ms = {n: statistics.median(r.elapsed_ms[n] for r in rows) for n in work.launches}
    return work, {s: statistics.median(r[s] for r in stages) for s in stages[0]}


def times_ms(run: Callable[[], object], repeats: int) -> list[float]:
    """Wall-clock milliseconds of each run, after two to warm up."""
    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        run()
        times.append((time.perf_counter() - began) * 1000)
    return sorted(times[2:])


def percentile(times: Sequence[float], percent: int) -> float:
    """Of sorted times, by the nearest rank."""
    return times[min(len(times) - 1, -(-percent * len(times) // 100) - 1)]


@dataclass(frozen=True)
class Layer:
    """One convolution of the network, for one window.

    Attributes:
        flops: a multiply-add is two.
        moved_bytes: of input, output and weights in fp16.
    """

    flops: int
    moved_bytes: int


def layers_of(model: Path, window: Sequence[int]) -> list[Layer]:
    """The convolutions of an ONNX graph for one window."""
    import onnx

    graph = onnx.load(model)
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
        voxels = prod(given[2:]) if node.op_type == "ConvTranspose" else prod(made[2:])
        sizes = prod(given) + prod(made) + prod(kernel)
        layers.append(Layer(2 * prod(kernel) * voxels, 2 * sizes))
    return layers


def roofline_ms(layers: Sequence[Layer], windows: int, card: Card) -> float:
    """The network's floor: each layer at the card's tensor rate or its bandwidth, the slower."""
    return 1000 * windows * sum(
        max(layer.flops / card.flops, layer.moved_bytes / card.bytes_per_s) for layer in layers
    )


def tensor_floor_ms(layers: Sequence[Layer], windows: int, card: Card) -> float:
    """The network's floor by the tensor rate alone."""
    return 1000 * windows * sum(layer.flops for layer in layers) / card.flops


def print_kernels(work: Work, card: Card | None, timed: bool) -> None:
    """A row per kernel: launches, bytes, floor, time, rate."""
    print(f"\n{'kernel':<18}{'launches':>9}{'MB':>9}{'floor ms':>10}{'ms':>9}{'GB/s':>8}")
    for name, launches in work.launches.items():
        moved = work.moved_bytes[name]
        floor = f"{1000 * moved / card.bytes_per_s:.3f}" if card else "?"
        took = work.elapsed_ms[name] if timed else 0.0
        rate = f"{moved / took / 1e6:.0f}" if took else ""
        shown = f"{took:.3f}" if timed else "not run"
        print(f"{name:<18}{launches:>9}{moved / 1e6:>9.1f}{floor:>10}{shown:>9}{rate:>8}")


def projected_ms(
    work_bytes: int, link_bytes: int, network_ms: float, card: Card, slack: tuple[float, float]
) -> dict[str, float]:
    """Milliseconds per part on a card: floors times how far above them the parts are taken to be."""
    kernels, network = slack
    parts = {
        "copies": 1000 * link_bytes / card.link_bytes_per_s,
        "kernels": 1000 * work_bytes / card.bytes_per_s * kernels,
        "network": network_ms * network,
    }
    return parts | {"all": sum(parts.values())}


def peer_ms(bundle: Bundle, volume: Volume, repeats: int) -> float | None:
    """Torch fp16 with MONAI's sliding window and three passes, from the normalised image on the card.

    Its normalisation, its clean-up and its copies are left out, in its favour.
    """
    try:
        import torch
        from monai.inferers import sliding_window_inference

        from attnseg.export.checkpoint import load_trained
    except ImportError as error:
        print(f"peer      not run: {error}")
        return None
    if not torch.cuda.is_available():
        print("peer      not run: torch finds no CUDA device")
        return None
    from attnseg.runtime.prepare import prepare
    from attnseg.runtime.tta import PASSES

    manifest = bundle.manifest
    image = prepare(volume.oriented(manifest.orientation), None, manifest.normalisation).image
    network = load_trained(bundle.file("weights")).network.half().cuda().eval()
    inference = manifest.inference

    def run() -> None:
        with torch.inference_mode():
            scores: Any = 0
            for transform in PASSES[TTA]:
                turned = np.ascontiguousarray(transform.apply(image))
                given = torch.from_numpy(turned)[None].half().cuda()
                logits = sliding_window_inference(
                    given, inference.window, 4, network, inference.overlap, mode="gaussian"
                )
                axes = [a + 2 for a in transform.flips]
                logits = logits.flip(axes) if axes else logits
                back = [0, 1, *(int(a) + 2 for a in np.argsort(transform.axes))]
                scores = scores + logits.permute(back).float().softmax(dim=1)
            scores.argmax(dim=1).to(torch.uint8).cpu()

    return statistics.median(times_ms(run, repeats))


def host_ms(bundle: Bundle, volume: Volume) -> dict[str, float]:
    """Milliseconds per stage of the numpy path with the processor's engine, three passes."""
    segmenter = Segmenter(bundle, SegmentOptions(tta=TTA, device="cpu"))
    segmenter.segment(volume)
    return segmenter.segment(volume).elapsed_ms


def measure_card(bundle: Bundle, case: Case, engine: Any, options: argparse.Namespace) -> Work:
    """Time kernels, stages and whole volumes on the card, and print them."""
    volume = read_volume(case.files)
    work, stages = measure_kernels(bundle, engine, volume, options.repeats)
    card = next((c for name, c in CARDS.items() if name in engine.device.name), None)
    print_kernels(work, card, timed=True)
    rest = sum(work.elapsed_ms.values())
    print(f"device time but for the network: {rest:.2f} ms (aim 5)")
    print("stages    " + ", ".join(f"{name} {ms:.2f}" for name, ms in stages.items()))

    segmenter = on_device(bundle, engine)
    labels = {segmenter.segment(volume).labels.tobytes() for _ in range(3)}
    assert len(labels) == 1, "the same case gave different labels"
    whole = times_ms(lambda: segmenter.segment(volume), options.repeats)
    print(f"array to labels    p50 {percentile(whole, 50):.1f}, p95 {percentile(whole, 95):.1f} ms")
    print(f"memory    {segmenter.segment(volume).memory}")
    with tempfile.TemporaryDirectory() as folder:

        def files() -> None:
            read = read_volume(case.files)
            found = segmenter.segment(read)
            Path(folder, "labels.nii.gz").write_bytes(encode_labels(found.labels, read))

        disk = times_ms(files, options.repeats)
    print(f"NIfTI to NIfTI     p50 {percentile(disk, 50):.1f}, p95 {percentile(disk, 95):.1f} ms")
    host = host_ms(bundle, volume)
    rest_host = sum(ms for stage, ms in host.items() if stage != "network")
    print(f"the host's time for all but the network: {rest_host:.0f} ms")
    peer = peer_ms(bundle, volume, options.repeats)
    if peer:
        ratio = peer / percentile(whole, 50)
        print(f"torch fp16 and MONAI: {peer:.1f} ms, {ratio:.1f} times ours (aim 5)")
    windows = sum(1 for _ in range(1)) and stages.get("network", 0.0)
    if card:
        layers = layers_of(bundle.file("onnx"), bundle.manifest.inference.window)
        run_windows = windows_of(volume, bundle)
        floor = roofline_ms(layers, run_windows, card)
        print(f"network   {windows:.2f} ms, roofline {floor:.2f} ms, {windows / floor:.1f} times")
    return work
