"""Time per stage of one case, the network in several engines, and peak memory.

    python -m benchmarks.pipeline [--case FOLDER] [--repeats 5] [--threads 2]

Without --case: the first validation case below ATTNSEG_DATA, else the synthetic demo case.
Machines are shared, so compare ratios, which are all measured in the same run. Torch and ONNX
Runtime are included for comparison; packages that are not installed are skipped with a message.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attnseg import Bundle, Segmenter, SegmentOptions
from attnseg.demo import make_demo_scan
from attnseg.runtime.case.nifti import encode_labels, read_volume
from attnseg.runtime.case.scans import Case, find_cases
from attnseg.runtime.engines.cpu import open_engine
from attnseg.runtime.errors import EngineError
from attnseg.runtime.results.picture import render_picture
from attnseg.runtime.steps.preprocess import preprocess
from attnseg.runtime.steps.windows import plan_windows
from benchmarks.harness import median_ms, print_machine

Network = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def choose_case(folder: Path | None, scratch: Path) -> Case:
    """Choose the case to measure."""
    root = folder or (Path(os.environ["ATTNSEG_DATA"]) if "ATTNSEG_DATA" in os.environ else None)
    if root is None:
        root = make_demo_scan(scratch)
    cases = find_cases(root).cases
    training = Bundle.default().manifest.training
    held_out = [c for c in cases if training and c.name in training.validation_cases]
    return (held_out or list(cases))[0]


def measure_stages(case: Case, segmenter: Segmenter, repeats: int) -> dict[str, float]:
    """Median milliseconds per stage, from files to files, in execution order."""
    rows: list[dict[str, float]] = []
    labels: list[bytes] = []
    for _ in range(repeats + 1):  # the first is a warm-up
        row: dict[str, float] = {}
        began = time.perf_counter()
        volume = read_volume(case.files)
        row["load"] = (time.perf_counter() - began) * 1000
        result = segmenter.segment(volume)
        row.update(result.elapsed_ms)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "labels.nii.gz").write_bytes(encode_labels(result.labels, volume))
            row["save"] = (time.perf_counter() - began) * 1000
        began = time.perf_counter()
        render_picture(volume, result.labels, segmenter.bundle.manifest, case.name)
        row["picture"] = (time.perf_counter() - began) * 1000
        rows.append(row)
        labels.append(result.labels.tobytes())
    assert len(set(labels)) == 1, "the same case gave different labels"
    return {stage: statistics.median(r[stage] for r in rows[1:]) for stage in rows[0]}


def case_windows(case: Case, bundle: Bundle) -> list[NDArray[np.float32]]:
    """Windows of a case that contain brain, each a batch `(1, C, X, Y, Z)`."""
    image = preprocess(read_volume(case.files), bundle.manifest.preprocessing).image
    defaults = bundle.manifest.inference
    plan = plan_windows(image.shape[1:], defaults.window, defaults.overlap)
    assert plan.padded_shape == image.shape[1:], "choose a case whose brain is not tiny"
    windows = [np.ascontiguousarray(image[(slice(None), *w.slices())][None]) for w in plan.windows]
    return [w for w in windows if w.any()]


def torch_networks(bundle: Bundle, threads: int) -> dict[str, Network]:
    """Torch networks with the same weights: eager fp32, and bf16 with channels-last memory."""
    try:
        import torch

        from attnseg.export.source.checkpoint import load_trained
    except ImportError:
        print("torch is not installed: its rows and the ratios are left out")
        return {}
    torch.set_num_threads(threads)
    plain = load_trained(bundle.file("weights")).network
    last = load_trained(bundle.file("weights")).network
    last.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def fp32(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return np.asarray(plain(torch.from_numpy(batch)).numpy())

    def bf16(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        images = torch.from_numpy(batch).contiguous(memory_format=torch.channels_last_3d)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return np.asarray(last(images).float().numpy())

    return {"torch eager fp32": fp32, "torch bf16 channels_last_3d": bf16}


def engine_networks(bundle: Bundle, threads: int) -> dict[str, Network]:
    """Engines of the processor that run on this machine, by name and precision."""
    networks: dict[str, Network] = {}
    for name, precision in (("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")):
        try:
            engine = open_engine(name, bundle.file("onnx"), precision, threads)
        except EngineError as error:
            print(f"{name} {precision}: {error}")
        else:
            networks[f"{name} {precision}"] = engine.infer
    return networks


def measure_networks(windows: list[NDArray[np.float32]], networks: dict[str, Network]) -> None:
    """Print the time of all windows for each network, and its speed relative to the first."""
    reference: NDArray[np.uint8] | None = None
    base_ms = 0.0
    print(
        f"\n{'network':<30}{'all windows ms':>15}{'ms/window':>11}{'speed':>8}{'labels differ':>15}"
    )
    for name, network in networks.items():
        labels = np.stack([network(w)[0].argmax(axis=0).astype(np.uint8) for w in windows])
        reference = labels if reference is None else reference
        differ = float(np.mean(labels != reference))
        assert differ < 0.01, f"{name} gives other labels than {next(iter(networks))}"
        total_ms = median_ms(lambda run=network: [run(w) for w in windows], 3, warm_up=0)  # type: ignore[misc]
        base_ms = base_ms or total_ms
        window_ms, speed = total_ms / len(windows), base_ms / total_ms
        print(f"{name:<30}{total_ms:>15.0f}{window_ms:>11.1f}{speed:>7.1f}x{differ:>14.4%}")


def measure_memory(case: Case) -> float:
    """Peak resident memory, in MiB, of `attnseg run` on the case in a separate process."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "attnseg", "run", str(case.folder), "-o", out]
        subprocess.run(command, check=True, capture_output=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--case", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    print_machine("attnseg", "numpy", "openvino", "onnxruntime", "torch")
    with tempfile.TemporaryDirectory() as scratch:
        case = choose_case(options.case, Path(scratch))
        bundle = Bundle.default()
        windows = case_windows(case, bundle)
        shape = read_volume(case.files).shape
        print(f"case      {case.name}, {shape}, {len(windows)} windows")
        print(f"threads   {options.threads}")
        peak = measure_memory(case)

        segmenter = Segmenter(bundle, SegmentOptions(threads=options.threads))
        stages = measure_stages(case, segmenter, options.repeats)
        engine = segmenter.engine
        print(
            f"\nstage          ms   (median of {options.repeats}; {engine.name} {engine.precision})"
        )
        for stage, elapsed_ms in stages.items():
            print(f"{stage:<12}{elapsed_ms:>6.0f}")
        rest_ms = sum(ms for s, ms in stages.items() if s not in ("network", "picture"))
        print(f"all but network and picture: {rest_ms:.0f} ms")
        print(f"peak memory of attnseg run: {peak:.0f} MiB")

        networks = torch_networks(bundle, options.threads) | engine_networks(
            bundle, options.threads
        )
        measure_networks(windows, networks)


if __name__ == "__main__":
    main()
