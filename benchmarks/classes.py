"""Many classes on a large scan: resampling of logits and decision, beside nnU-Net's own function.

    python -m benchmarks.classes [--classes 60] [--shape 512 512 600] [--grid 240 240 400]
        [--peer-shape 192 192 224]

The logits of the grid come plane by plane, as from the sliding window. nnU-Net's function holds all
of them and needs tens of GB at full size, so it is measured on `--peer-shape`, at which the results
of both are compared; each is a process of its own. Prints seconds, peak memory and the bound.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.geometry import Box, shape_of
from attnseg.runtime.steps.decide import argmax_classes
from attnseg.runtime.steps.preprocess import Preprocessed
from attnseg.runtime.steps.resample import Grid
from attnseg.runtime.steps.restore import restored
from benchmarks.harness import print_machine

KINDS = ("theirs", "ours at the peer's size", "ours")
SLAB = 8  # planes per part
SPACING = (1.5, 1.5, 1.5)
_MODULES = 32 << 20  # bytes of what is imported on the way


def planes(classes: int, grid: tuple[int, ...]) -> Iterator[NDArray[np.float32]]:
    """Smooth logits `(K, x, Y, Z)`, part by part, representable in float16."""
    _, y, z = np.meshgrid(
        *(np.arange(n, dtype=np.float32) for n in grid[:1] + grid[1:]), indexing="ij", sparse=True
    )
    phase = np.arange(classes, dtype=np.float32)[:, None, None, None]
    for start in range(0, grid[0], SLAB):
        x = np.arange(start, min(start + SLAB, grid[0]), dtype=np.float32)[None, :, None, None]
        values = 8 * np.sin(0.05 * x + phase) + 4 * np.cos(
            0.07 * y[None] + 2 * phase + 0.03 * z[None]
        )
        yield values.astype(np.float16).astype(np.float32)


def ours(classes: int, grid: tuple[int, ...], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Classes of a scan of `shape`, plane by plane."""
    spacing = tuple(s * n / m for s, n, m in zip(SPACING, grid, shape, strict=True))
    sampling = Grid(spacing_mm=SPACING, order=3, separate_above=3.0).sampling(shape, spacing)
    assert sampling.target == tuple(grid), sampling.target
    scan = Preprocessed(
        image=np.empty((0, *grid), np.float32),
        box=Box.whole(shape),
        box_on_grid=False,
        grid_shape=shape_of(grid),
        shape=shape_of(shape),
        sampling=sampling,
        back="logits",
    )
    found = np.empty(shape, np.uint8)
    for index, part in enumerate(
        restored(planes(classes, grid), scan, np.zeros(classes, np.float32), half=True)
    ):
        found[index : index + 1] = argmax_classes(part)
    return found


def theirs(classes: int, grid: tuple[int, ...], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The same by `convert_predicted_logits_to_segmentation_with_correct_shape`."""
    for name in ("raw", "preprocessed", "results"):
        os.environ.setdefault(f"nnUNet_{name}", os.curdir)
    import torch
    from nnunetv2.inference import export_prediction
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    logits = np.concatenate(list(planes(classes, grid)), axis=1).astype(np.float16)
    spacing = [s * n / m for s, n, m in zip(SPACING, grid, shape, strict=True)]

    def resample(data: Any, target: Any, current: Any, wanted: Any) -> Any:
        return resample_data_or_seg_to_shape(
            data, target, current, wanted, order=1, order_z=0, force_separate_z=None
        )

    names = {"background": 0, **{f"c{i}": i for i in range(1, classes)}}
    plans: Any = SimpleNamespace(transpose_forward=[0, 1, 2], transpose_backward=[0, 1, 2])
    settings: Any = SimpleNamespace(spacing=list(SPACING), resampling_fn_probabilities=resample)
    properties = {
        "spacing": spacing,
        "shape_after_cropping_and_before_resampling": shape,
        "shape_before_cropping": shape,
        "bbox_used_for_cropping": [[0, n] for n in shape],
    }
    found = export_prediction.convert_predicted_logits_to_segmentation_with_correct_shape(
        torch.from_numpy(logits), plans, settings, LabelManager(names, None), properties
    )
    return np.asarray(found, np.uint8)


def bound_bytes(classes: int, grid: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Bound of the memory of `ours`: planes of the scan, a part of the grid, and the labels.

    At most ten arrays of float64 of a plane are held, and six of float32 of a part.
    """
    plane, part = classes * shape[1] * shape[2], SLAB * classes * grid[1] * grid[2]
    return 8 * 10 * plane + 4 * 6 * part + int(np.prod(shape)) + _MODULES


def _measure(kind: str, arguments: argparse.Namespace) -> None:
    small = kind != "ours"
    shape = tuple(arguments.peer_shape if small else arguments.shape)
    ratio = [g / s for g, s in zip(arguments.grid, arguments.shape, strict=True)]
    grid = tuple(round(r * n) for r, n in zip(ratio, shape, strict=True))
    began, before = time.perf_counter(), _peak_mib()
    function = theirs if kind == "theirs" else ours
    labels = function(arguments.classes, grid, shape)
    seconds = time.perf_counter() - began
    record = {"seconds": seconds, "peak": _peak_mib() - before, "voxels": labels.size}
    record["bound"] = bound_bytes(arguments.classes, grid, shape) / 2**20
    np.save(arguments.output, labels)
    print(json.dumps(record))


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Parse the command line, and print a line per measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--classes", type=int, default=60)
    parser.add_argument("--shape", type=int, nargs=3, default=[512, 512, 600])
    parser.add_argument("--grid", type=int, nargs=3, default=[240, 240, 400])
    parser.add_argument("--peer-shape", type=int, nargs=3, default=[192, 192, 224])
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.kind:
        _measure(arguments.kind, arguments)
        return
    print_machine()
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / f"{index}.npy" for index in range(len(KINDS))]
        for kind, file in zip(KINDS, files, strict=True):
            command = [sys.executable, "-m", "benchmarks.classes", *sys.argv[1:], "--kind", kind]
            ended = subprocess.run(
                [*command, "--output", str(file)], check=True, stdout=subprocess.PIPE, text=True
            )
            found = json.loads(ended.stdout.splitlines()[-1])
            print(
                f"{kind}: {found['voxels']} voxels, {found['seconds']:.1f} s, peak "
                f"{found['peak']:.0f} MiB (bound of ours {found['bound']:.0f})"
            )
        differ = np.count_nonzero(np.load(files[0]) != np.load(files[1]))
        print(f"{differ} labels differ at the peer's size")


if __name__ == "__main__":
    main()
