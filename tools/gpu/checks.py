"""Checks of attnseg on a GPU, one per subcommand; each prints its results and adds them to a file.

    python checks.py machine|golden|volume|batches|full|profile|copies|host|kernels|ort|settings|rtx
        [--json FILE] [--host] [--model BUNDLE] [--engine NAME]

`--host` runs a check on the processor, with a smaller case, to test this script without a GPU.
Copies, profile, kernels and settings need a GPU; ort and rtx then only convert the graph and build
engines.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from attnseg import Bundle, Segmenter, SegmentOptions, Volume
from attnseg.runtime.cuda.device import Region
from attnseg.runtime.engines.select import select_engine
from attnseg.runtime.model.golden import read_golden
from attnseg.runtime.options import resolve
from attnseg.synthetic import BRATS_SHAPE, make_case

if TYPE_CHECKING:
    from attnseg.export.graphs.graph import Graph

PACKAGES = [
    "attnseg",
    "numpy",
    "torch",
    "cuda-core",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "nvidia-cudnn-cu13",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt-rtx-cu13-libs",
    "cupy-cuda13x",
    "nibabel",
    "isal",
    "pydantic",
    "monai",
    "pytest",
]


def median_ms(run: Callable[[], object], repeats: int = 10) -> float:
    """Median wall-clock time in milliseconds, after two warm-up runs."""
    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        run()
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times[2:])


class Check:
    """All checks of one device, and their results.

    Attributes:
        host: Whether the processor takes the place of the GPU.
        named: Name of the engine for `kernels`.
        bundle: Bundle of the model.
        found: Results by name.
    """

    def __init__(self, host: bool, model: Path | None, engine: str) -> None:
        self.host, self.named = host, engine
        self.bundle = Bundle.load(model) if model else Bundle.default()
        self.found: dict[str, Any] = {}

    def device(self) -> Any:
        """Open a device; with `--host`, its kernels are compiled by g++."""
        if not self.host:
            from attnseg.runtime.cuda.cuda_device import CudaDevice

            return CudaDevice()
        from tests.runtime.cuda.host_device import HostDevice
        from tests.runtime.cuda.host_kernels import HostKernels

        return HostDevice(HostKernels(Path(tempfile.mkdtemp())).launch)

    def engine(self, batch: int = 12, graphs: bool = False, device: Any = None) -> Any:
        """Open torch as an engine."""
        from torch_engine import TorchEngine

        device = device or self.device()
        return TorchEngine(self.bundle, device, batch, half=not self.host, graphs=graphs)

    def volume(self) -> Volume:
        """The case of the demo; with `--host`, a case of few windows."""
        case = make_case(7, (72, 64, 64) if self.host else BRATS_SHAPE)
        return Volume(case.images, case.affine)

    def note(self, name: str, value: Any) -> None:
        """Store and print a result."""
        self.found[name] = value
        print(f"{name:<44}{value}", flush=True)

    def machine(self) -> None:
        """Versions of the packages, and properties of the GPU."""
        self.note("python", platform.python_version())
        for package in PACKAGES:
            try:
                self.note(package, importlib.metadata.version(package))
            except importlib.metadata.PackageNotFoundError:
                self.note(package, "not installed")
        if self.host:
            return
        from attnseg.runtime.cuda.gpu import find_gpu

        self.note("gpu", str(find_gpu()))
        import torch

        card = torch.cuda.get_device_properties(0)
        self.note("multiprocessors", card.multi_processor_count)
        self.note("L2, MB", round(card.L2_cache_size / 1e6))
        began = time.perf_counter()
        device = self.device()
        self.note("device opened, ms", round((time.perf_counter() - began) * 1000))
        with device.active():
            began = time.perf_counter()
            device._function("blend_4")
        self.note("kernels compiled or read, ms", round((time.perf_counter() - began) * 1000))

    def golden(self) -> None:
        """Golden window with torch on the device's stream and memory, with and without graphs."""
        golden = read_golden(self.bundle)
        for graphs in (False, True):
            engine = self.engine(2, graphs)
            logits = [engine.infer(golden.image) for _ in range(3)]
            name = "with graphs" if graphs else "without graphs"
            self.note(f"golden {name}: difference", f"{golden.difference(logits[0]):.1e}")
            self.note(f"golden {name}: again the same", all((x == logits[0]).all() for x in logits))

    def once(self) -> None:
        """One volume with torch as the engine, for a profiler around this script."""
        options = SegmentOptions(tta="none" if self.host else "paper")
        Segmenter(self.bundle, options, self.engine(1 if self.host else 12)).segment(self.volume())

    def labels_of(self, volume: Volume, tta: str, **how: Any) -> bytes:
        """Labels of a volume from a newly opened engine, which must repeat them."""
        segmenter = Segmenter(self.bundle, SegmentOptions(tta=tta), self.engine(**how))
        first = segmenter.segment(volume).labels.tobytes()
        staged = [segmenter.stage(volume) for _ in range(1 if self.host else 3)]
        for pending in [segmenter.submit(one) for one in staged]:
            if pending.result().labels.tobytes() != first:
                raise SystemExit(
                    "labels of overlapping volumes differ from those of a single volume"
                )
        return first

    def volume_check(self) -> None:
        """The CUDA pipeline: equal bytes each time, and labels close to those of the processor."""
        volume, tta = self.volume(), "none" if self.host else "paper"
        most = 1 if self.host else 12
        ways = ({"batch": most}, {"batch": most}, {"batch": most, "graphs": True}, {"batch": 1})
        labels = [self.labels_of(volume, tta, **how) for how in ways]
        self.note("two engines: the same bytes", labels[0] == labels[1])
        self.note("graphs: the same bytes", labels[0] == labels[2])
        batches = np.frombuffer(labels[0], np.uint8), np.frombuffer(labels[3], np.uint8)
        self.note("batch 1 against 12: voxels that differ", int((batches[0] != batches[1]).sum()))
        chosen = SegmentOptions(device="cpu", precision="fp32", engine="onnxruntime")
        began = time.perf_counter()
        expected = Segmenter(self.bundle, chosen).segment(volume).labels
        self.note("processor, one pass, s", round(time.perf_counter() - began, 1))
        one = np.frombuffer(self.labels_of(volume, "none", batch=most), np.uint8)
        differ = one != np.frombuffer(expected.tobytes(), np.uint8)
        self.note("against the processor: share that differs", f"{differ.mean():.1e}")

    def batches(self) -> None:
        """Time per window with torch by batch size, eager and as a graph; one large window too."""
        import torch

        kind, place = (torch.float32, "cpu") if self.host else (torch.float16, "cuda")
        window = (32, 32, 32) if self.host else (64, 64, 64)
        network = self.engine()._network
        sizes: list[tuple[int, tuple[int, ...]]] = [(b, window) for b in (1, 2, 4, 6, 12, 36)]
        sizes += [(1, (144, 176, 144))] if not self.host else []
        for batch, shape in sizes[: 2 if self.host else None]:
            given = torch.randn(batch, 4, *shape, device=place, dtype=kind)
            given = given.contiguous(memory_format=torch.channels_last_3d)
            voxels = batch * int(np.prod(shape)) / 64**3
            name = f"torch, batch {batch} of {'x'.join(map(str, shape))}, ms per 64^3"
            with torch.inference_mode():
                if self.host:
                    self.note(name, round(median_ms(lambda: network(given), 1) / voxels, 3))  # noqa: B023
                    continue
                self.note(f"{name}, eager", round(_events_ms(lambda: network(given)) / voxels, 3))  # noqa: B023
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    network(given)
                self.note(f"{name}, graph", round(_events_ms(graph.replay) / voxels, 3))
                del graph
            torch.cuda.empty_cache()

    def full(self) -> None:
        """Whole volumes in one pass over the box, beside the windows of the model."""
        volume = self.volume()
        labels, tta = [], "none" if self.host else "paper"
        for window in (None, "full"):
            chosen = SegmentOptions(tta=tta, window=window)  # type: ignore[arg-type]
            engine = self.engine(1 if self.host or window else 12, graphs=True)
            segmenter = Segmenter(self.bundle, chosen, engine)
            took = median_ms(lambda s=segmenter: s.segment(volume), 1 if self.host else 10)  # type: ignore[misc]
            found = segmenter.segment(volume)
            labels.append(found.labels)
            name = f"torch engine, window {window or 'of the model'}"
            self.note(f"{name}: array to labels, ms", round(took, 1))
            self.note(f"{name}: network, ms", round(found.elapsed_ms["network"], 1))
        self.note("share of labels that differ", f"{(labels[0] != labels[1]).mean():.1e}")

    def profile(self) -> None:
        """Device time of the network's kernels, by name, in torch and in ONNX Runtime."""
        if self.host:
            print("not run: needs a GPU")
            return
        import torch

        given = torch.randn(12, 4, 64, 64, 64, device="cuda", dtype=torch.float16)
        given = given.contiguous(memory_format=torch.channels_last_3d)
        network = self.engine()._network

        def by_torch() -> None:
            with torch.inference_mode():
                network(given)

        self._print_kernels("torch", by_torch)
        try:
            from attnseg.runtime.engines.onnxruntime_cuda import open_onnxruntime_cuda

            _, file = self._half_graph()
            engine = open_onnxruntime_cuda(file, "fp16", self.device, (64, 64, 64))
        except Exception as error:  # ONNX Runtime arrives in a later call
            print(f"onnxruntime-cuda: not run ({error})")
            return
        image = given.float().cpu().numpy()
        self._print_kernels("onnxruntime-cuda", lambda: engine.infer(image))

    def _print_kernels(self, name: str, run: Callable[[], object], most: int = 14) -> None:
        import torch

        for _ in range(3):
            run()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(5):
                run()
            torch.cuda.synchronize()
        rows = [
            (event.self_device_time_total / 5000, event.count // 5, event.key)
            for event in profiler.key_averages()
        ]
        self.note(f"{name}, kernels of 12 windows, ms", round(sum(row[0] for row in rows), 2))
        for took, count, kernel in sorted(rows, reverse=True)[:most]:
            self.note(f"{name}: {kernel[:90]}", f"{took:.3f} ms in {count} launches")

    def settings(self) -> None:
        """ONNX Runtime's CUDA provider with other settings: time per window, and equal sessions."""
        if self.host:
            print("not run: needs a GPU")
            return
        from attnseg.runtime.engines import onnxruntime_cuda as module

        golden, (_, file) = read_golden(self.bundle), self._half_graph()
        session = module.OnnxSession
        variants: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
            "as shipped": ({}, {}),
            "exhaustive search": ({"cudnn_conv_algo_search": "EXHAUSTIVE"}, {}),
            "default algorithm": ({"cudnn_conv_algo_search": "DEFAULT"}, {}),
            "not deterministic": ({}, {"use_deterministic_compute": False}),
            "channels last": ({"prefer_nhwc": "1"}, {}),
            "basic graph": ({}, {"graph_optimization_level": 1}),
        }
        for name, (provider, options) in variants.items():

            def changed(
                model: Path,
                given: dict[str, Any],
                providers: list[Any],
                provider: dict[str, str] = provider,
                options: dict[str, Any] = options,
            ) -> Any:
                import onnxruntime

                levels = {1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC}
                own = {k: levels.get(v, v) if "level" in k else v for k, v in options.items()}
                return session(model, given | own, [(providers[0][0], providers[0][1] | provider)])

            module.OnnxSession = changed  # type: ignore[misc, assignment]
            try:
                logits, took = [], {}
                for _ in range(2):
                    engine = module.open_onnxruntime_cuda(file, "fp16", self.device, (64, 64, 64))
                    logits.append(engine.infer(golden.repeated(12).image))
                for batch in (4, 12):
                    took[batch] = f"{self._windows_ms(engine, batch, 5):.3f}"
                same = bool((logits[0] == logits[1]).all())
                difference = golden.repeated(12).difference(logits[0])
                shown = f"{took} ms a window, sessions equal: {same}, golden {difference:.1e}"
            except Exception as error:  # the reason is the result
                shown = f"failed: {str(error)[:200]}"
            finally:
                module.OnnxSession = session  # type: ignore[misc]
            self.note(f"ort settings, {name}", shown)

    def copies(self) -> None:
        """Rates of copies between host and GPU, pinned and pageable, and within the GPU."""
        import torch

        if self.host:
            print("not run: needs a GPU")
            return
        size = 71_424_000  # four channels of 240x240x155 int16
        pinned = torch.empty(size, dtype=torch.uint8).pin_memory()
        plain, card = (
            torch.ones(size, dtype=torch.uint8),
            torch.empty(size, dtype=torch.uint8).cuda(),
        )
        self.note(
            "pinned to card, GB/s",
            round(size / _events_ms(lambda: card.copy_(pinned, True)) / 1e6, 1),
        )
        self.note(
            "card to pinned, GB/s",
            round(size / _events_ms(lambda: pinned.copy_(card, True)) / 1e6, 1),
        )
        self.note(
            "plain to card, GB/s", round(size / median_ms(lambda: card.copy_(plain)) / 1e6, 1)
        )
        there, here = pinned.numpy(), plain.numpy()
        self.note(
            "host to pinned by one thread, GB/s",
            round(size / median_ms(lambda: np.copyto(there, here)) / 1e6, 1),
        )
        big = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
        other = torch.empty_like(big)
        self.note(
            "within the card, read and written, GB/s",
            round(2 * big.numel() / _events_ms(lambda: other.copy_(big)) / 1e6),
        )

    def host_stages(self) -> None:
        """Wall-clock time of `stage`, `submit` and `result`, and device time per stage."""
        volume = self.volume()
        chosen = SegmentOptions(tta="none" if self.host else "paper")
        segmenter = Segmenter(self.bundle, chosen, self.engine(1 if self.host else 12, graphs=True))
        segmenter.segment(volume)
        segmenter.segment(volume)
        names = ("stage", "submit", "result", "whole")
        rows: list[list[float]] = []
        for _ in range(2 if self.host else 10):
            marks = [time.perf_counter()]
            staged = segmenter.stage(volume)
            marks.append(time.perf_counter())
            pending = segmenter.submit(staged)
            marks.append(time.perf_counter())
            found = pending.result()
            marks.append(time.perf_counter())
            rows.append([*np.diff(marks), marks[-1] - marks[0]])
        for name, took in zip(names, np.median(rows, axis=0), strict=True):
            self.note(f"torch engine, batch 12, graphs: {name}, ms", round(1000 * took, 1))
        for name, took in found.elapsed_ms.items():
            self.note(f"torch engine, stage {name}, ms", round(took, 2))

    def kernels(self) -> None:
        """`measure` of benchmarks.gpu with one engine: kernels, stages, whole volumes, MONAI."""
        from benchmarks.gpu import layers_of, measure
        from benchmarks.pipeline import choose_case

        if self.host:
            print("not run: needs a GPU")
            return
        with tempfile.TemporaryDirectory() as scratch:
            case = choose_case(None, Path(scratch))
            layers = layers_of(self.bundle.file("onnx"), self.bundle.manifest.inference.window)
            if self.named == "torch":
                engine = self.engine(12)
            else:
                chosen = SegmentOptions(device="cuda", engine=self.named, tta="paper")
                request = resolve(chosen, self.bundle.manifest).engine
                engine = select_engine(self.bundle, request).engine
            measure(self.bundle, case, engine, 10, layers)

    def _half_graph(self) -> tuple[Graph, Path]:
        """The bundle's graph in fp16, and a file of it; without the parity gate of an export."""
        from attnseg.export.graphs.fp16 import convert_to_fp16
        from attnseg.export.graphs.graph import Graph

        graph = convert_to_fp16(Graph.read(self.bundle.file("onnx")))
        file = Path(tempfile.mkdtemp()) / "model-fp16.onnx"
        file.write_bytes(graph.content)
        return graph, file

    def _windows_ms(self, engine: Any, batch: int, rounds: int) -> float:
        """Time per window in milliseconds, for calls at different addresses as in the pipeline."""
        device, calls = engine.device, max(1, 36 // batch)
        kind, shape = (2 if engine.half else 4), (batch, 4, 64, 64, 64)
        size, classes = kind * int(np.prod(shape)), len(self.bundle.manifest.task.labels)
        given_size = size // 4 * classes
        with device.active():
            images, logits = device.allocate(calls * size), device.allocate(calls * given_size)
            device.clear(images)

            def once() -> None:
                for call in range(calls):
                    taken = Region.of(images, call * size, size)
                    engine.enqueue(taken, Region.of(logits, call * given_size, given_size), shape)

            times = []
            for _ in range(rounds + 3):  # the TensorRT adapter records its second run
                begin = device.mark()
                once()
                end = device.mark()
                times.append(end.elapsed_ms(begin) / (calls * batch))
            device.check()
        return statistics.median(times[3:])

    def ort(self) -> None:
        """ONNX Runtime's CUDA provider with the fp16 graph: golden window, time per batch size."""
        from attnseg.runtime.engines.onnxruntime_cuda import open_onnxruntime_cuda

        golden, (_, file) = read_golden(self.bundle), self._half_graph()
        if self.host:
            self.note("ort: fp16 graph, bytes", file.stat().st_size)
            return
        logits = []
        for number in (1, 2):
            began = time.perf_counter()
            engine = open_onnxruntime_cuda(file, "fp16", self.device)
            logits.append(engine.infer(golden.image))
            self.note(
                f"ort: session {number} and first run, s", round(time.perf_counter() - began, 1)
            )
        self.note("ort: golden difference", f"{golden.difference(logits[0]):.1e}")
        self.note(
            "ort: the same bytes again", bool((engine.infer(golden.image) == logits[1]).all())
        )
        self.note("ort: two sessions, the same bytes", bool((logits[0] == logits[1]).all()))
        for batch in (1, 4, 12):
            began = time.perf_counter()
            self.note(
                f"ort: batch {batch}, ms a window", round(self._windows_ms(engine, batch, 5), 3)
            )
            self.note(
                f"ort: batch {batch}, s with its search", round(time.perf_counter() - began, 1)
            )

    def rtx(self) -> None:
        """TensorRT-RTX: build, open, check and time engines, for this GPU or all since Ampere."""
        from attnseg.export.engines.tensorrt import PORTABLE_TARGET, BuildOptions, build_engine
        from attnseg.runtime.engines.tensorrt import RTX_TARGETS, TensorRtEngine, load_library

        golden, (graph, file) = read_golden(self.bundle), self._half_graph()
        target = PORTABLE_TARGET
        if not self.host:
            from attnseg.runtime.cuda.gpu import find_gpu

            target = find_gpu().target if find_gpu().target in RTX_TARGETS else target
        for batch in (1, 4, 12):
            portable = target == PORTABLE_TARGET
            how = "ampere+" if portable else "same"
            options = BuildOptions("tensorrt-rtx", target, batch, compatibility=how)  # type: ignore[arg-type]
            began = time.perf_counter()
            built = build_engine(graph, (64, 64, 64), options)
            self.note(f"rtx: batch {batch}, built in s", round(time.perf_counter() - began, 1))
            self.note(f"rtx: batch {batch}, bytes", len(built.content))
            if self.host:
                continue
            plan = file.with_name(f"batch-{batch}.engine")
            plan.write_bytes(built.content)
            began = time.perf_counter()
            try:
                engine = TensorRtEngine(
                    plan, built.build, "fp16", self.device(), load_library("tensorrt-rtx")
                )
            except Exception as error:  # the reason is the result
                self.note(f"rtx: batch {batch}, refused", str(error))
                continue
            golden = golden.repeated(batch)
            logits = [engine.infer(golden.image) for _ in range(3)]
            self.note(
                f"rtx: batch {batch}, opened and run in s", round(time.perf_counter() - began, 1)
            )
            self.note(
                f"rtx: batch {batch}, golden difference", f"{golden.difference(logits[0]):.1e}"
            )
            self.note(
                f"rtx: batch {batch}, recorded the same",
                all((x == logits[0]).all() for x in logits),
            )
            self.note(f"rtx: batch {batch}, recorded", engine.recorded)
            self.note(
                f"rtx: batch {batch}, ms a window", round(self._windows_ms(engine, batch, 10), 3)
            )
            self.note(f"rtx: batch {batch}, memory, MB", round(engine.memory_bytes / 1e6))


def _events_ms(run: Callable[[], object], repeats: int = 20) -> float:
    """Median device time in milliseconds, measured by CUDA events."""
    import torch

    times = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[3:])


def main() -> None:
    """Run one check and store its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    names = (
        *("machine", "golden", "volume", "batches", "full", "profile", "copies", "host"),
        *("kernels", "once", "ort", "settings", "rtx"),
    )
    parser.add_argument("check", choices=names)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--engine", default="torch", help="engine for kernels")
    options = parser.parse_args()
    check = Check(options.host, options.model, options.engine)
    special = {"volume": check.volume_check, "host": check.host_stages}
    try:
        special.get(options.check, getattr(check, options.check))()
    finally:
        if options.json:
            before = json.loads(options.json.read_text()) if options.json.exists() else {}
            before[options.check] = check.found
            options.json.write_text(json.dumps(before, indent=1) + "\n")


if __name__ == "__main__":
    main()
