"""Time and memory of an imported model, beside the predictor of nnU-Net or MONAI itself.

    python -m benchmarks.imported MODEL_FOLDER BUNDLE FILE [FILE ...]
        [--mirror] [--repeats 3] [--threads 2] [--kinds framework fp32 ...]

Each run is a process of its own, from files to a label file, and the kinds take turns, since
machines are shared: compare ratios. The labels of each kind are compared with those of the
framework. Needs nnunetv2 or MONAI; code of a MONAI bundle is executed, as MONAI does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import print_machine

FRAMEWORK = "framework"
KINDS: dict[str, dict[str, Any]] = {
    FRAMEWORK: {},
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "fp32, no windows of zeros": {"precision": "fp32", "empty_windows": "skip"},
    "fp32, one mirror axis": {"precision": "fp32", "mirror_axes": (0,)},
}
"""Options of the runtime for each kind; the last one for models with mirror axes."""


def run_nnunet(arguments: argparse.Namespace, output: Path) -> dict[str, float]:
    """Segment with `nnUNetPredictor`, write the labels, and return seconds per stage."""
    for name in ("raw", "preprocessed", "results"):
        os.environ.setdefault(f"nnUNet_{name}", os.curdir)
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    torch.set_num_threads(arguments.threads)
    folder = arguments.model
    predictor = nnUNetPredictor(
        device=torch.device("cpu"), use_mirroring=arguments.mirror, allow_tqdm=False
    )
    folds = tuple(int(path.name[5:]) for path in sorted(folder.glob("fold_[0-9]*")))
    predictor.initialize_from_trained_model_folder(str(folder), folds, "checkpoint_final.pth")
    reader = predictor.plans_manager.image_reader_writer_class()
    began = time.perf_counter()
    image, properties = reader.read_images([str(file) for file in arguments.files])
    labels = predictor.predict_single_npy_array(image, properties)
    reader.write_seg(labels, str(output), properties)
    return {"case": time.perf_counter() - began}


def run_monai(arguments: argparse.Namespace, output: Path) -> dict[str, float]:
    """Segment by the sections of the bundle, write the labels, and return seconds per stage."""
    import monai.networks.nets  # noqa: F401  (names of networks are looked up in it)
    import nibabel as nib
    import torch
    from monai.bundle.config_parser import ConfigParser

    torch.set_num_threads(arguments.threads)
    folder = arguments.model
    parser: Any = ConfigParser()
    parser.read_config(str(folder / "configs" / "inference.json"))
    parser.config["bundle_root"] = str(folder)
    steps = parser.config["postprocessing"]["transforms"]
    steps[:] = [step for step in steps if step["_target_"] != "SaveImaged"]
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(folder / "models" / "model.pt", weights_only=True))
    inferer = parser.get_parsed_content("inferer")
    before, after = (parser.get_parsed_content(f"{name}processing") for name in ("pre", "post"))
    began = time.perf_counter()
    files = [str(file) for file in arguments.files]
    item = before({"image": files if len(files) > 1 else files[0]})
    with torch.inference_mode():
        item["pred"] = inferer(item["image"][None], network)[0]
    labels = np.asarray(after(item)["pred"])[0].astype(np.uint8)
    first: Any = nib.load(files[0])
    nib.save(nib.Nifti1Image(labels, first.affine), output)
    return {"case": time.perf_counter() - began}


def run_attnseg(arguments: argparse.Namespace, kind: str, output: Path) -> dict[str, float]:
    """Segment with the runtime, write the labels, and return seconds per stage."""
    from attnseg import Segmenter, SegmentOptions
    from attnseg.runtime.case.nifti import encode_labels, read_volume

    options = SegmentOptions(
        engine="openvino",
        threads=arguments.threads,
        tta="model" if arguments.mirror else "none",
        **KINDS[kind],
    )
    segmenter = Segmenter(arguments.bundle, options)
    began = time.perf_counter()
    volume = read_volume(arguments.files, arguments.threads)
    result = segmenter.segment(volume)
    output.write_bytes(encode_labels(result.labels, volume))
    stages = {name: ms / 1000 for name, ms in result.elapsed_ms.items()}
    return {"case": time.perf_counter() - began, **stages}


def _child(arguments: argparse.Namespace) -> None:
    began = time.perf_counter()
    kind, output = arguments.child, arguments.output
    if kind != FRAMEWORK:
        found = run_attnseg(arguments, kind, output)
    elif (arguments.model / "plans.json").exists():
        found = run_nnunet(arguments, output)
    else:
        found = run_monai(arguments, output)
    found["with start"] = time.perf_counter() - began
    found["peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


def _start(kind: str, output: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.imported", *sys.argv[1:]]
    ended = subprocess.run(
        [*command, "--child", kind, "--output", str(output)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def compare(arguments: argparse.Namespace) -> None:
    """Run every kind in turn, and print medians, ratios and the labels that differ."""
    from attnseg.runtime.case.nifti import read_labels

    print_machine()
    kinds = arguments.kinds or [k for k in KINDS if arguments.mirror or "mirror" not in k]
    rows: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    labels: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(arguments.repeats):
            for number, kind in enumerate(kinds):
                output = Path(scratch) / f"{number}.nii.gz"
                rows[kind].append(_start(kind, output))
                labels[kind] = np.asarray(read_labels(output).channels[0])
    foreground = int(np.count_nonzero(labels[FRAMEWORK]))
    print(f"{foreground} foreground voxels by the framework; medians of {arguments.repeats}")
    slowest = statistics.median(row["case"] for row in rows[FRAMEWORK])
    for kind, own in rows.items():
        median = {name: statistics.median(row[name] for row in own) for name in own[0]}
        differ = int(np.count_nonzero(labels[kind] != labels[FRAMEWORK]))
        stages = ", ".join(f"{name} {value:.2f}" for name, value in median.items())
        print(f"{kind}: {slowest / median['case']:.2f}x, {differ} labels differ; {stages}")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--mirror", action="store_true")
    parser.add_argument("--kinds", nargs="+", choices=KINDS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", choices=KINDS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        _child(arguments)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
