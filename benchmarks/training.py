"""Speed of the training data pipeline, compared with the training step.

    python -m benchmarks.training [--data FOLDER] [--repeats 10] [--threads 2]

Times one batch of the paper's preset: sampling of patches (in the background while training),
augmentation (on the network's device), MONAI's transforms with the same ranges, and the training
step. Without --data: a synthetic case. Machines are shared, so compare ratios.
"""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnseg.data.labelled import find_labelled_cases
from attnseg.runtime.options import available_threads
from attnseg.runtime.steps.preprocess import Preprocessing
from attnseg.runtime.steps.schemes import ZScore
from attnseg.synthetic import make_case, write_case
from attnseg.trainer.augment import augment, margin_voxels
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.data import Batch, BatchFeed, PatchSampler, cached_case
from attnseg.trainer.loss import segmentation_loss
from attnseg.trainer.networks import build_network
from attnseg.trainer.preparation import Preparation
from benchmarks.harness import median_ms, print_machine


def monai_augment(config: TrainConfig) -> Callable[[Batch], None]:
    """MONAI's transforms with the same ranges, applied per patch as in its data loaders."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monai: Any = importlib.import_module("monai.transforms")
    angle = np.deg2rad(config.rotation_degrees)
    keys = ["image", "label"]
    modes = ["bilinear", "nearest"]
    cells = round(config.patch / config.elastic_spacing_voxels)
    shift = config.elastic_voxels / config.elastic_spacing_voxels
    transforms = monai.Compose(
        [
            monai.RandRotated(keys, angle, angle, angle, prob=1, mode=modes),
            monai.RandGridDistortiond(
                keys, num_cells=cells, prob=1, distort_limit=shift, mode=modes
            ),
            monai.CenterSpatialCropd(keys, config.patch),
            monai.RandAdjustContrastd(["image"], prob=1, gamma=config.gamma),
            monai.RandScaleIntensityd(["image"], config.intensity_scale, prob=1),
        ]
    )

    def apply(batch: Batch) -> None:
        for image, label in zip(batch.images, batch.labels, strict=True):
            transforms({"image": image, "label": label[None].float()})

    return apply


def training_step(config: TrainConfig, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    """A training step like the trainer's: forward pass, backward pass and update."""
    network = build_network(config.network).to(device)
    network = network.to(memory_format=torch.channels_last_3d).train()  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.learning_rate)

    def step(images: Tensor, labels: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            logits = network(images.contiguous(memory_format=torch.channels_last_3d))
        loss = segmentation_loss(logits, labels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        loss.item()  # waits for the device

    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=os.environ.get("ATTNSEG_DATA"))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=available_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = TrainConfig()
    print_machine("torch", "monai")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{options.threads} threads"
    print(f"device    {device.type}, {name}; batch {config.batch_size} of {config.patch}^3\n")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(options.data) if options.data else Path(scratch) / "data"
        if not options.data:
            write_case(make_case(0), root, "synthetic")
        scans = find_labelled_cases(root)
        schemes = (ZScore(),) * len(scans.task.task.channels)
        plain = Preprocessing(scans.task.orientation, None, "nonzero", schemes)
        preparation = Preparation(scans.task, plain)
        labelled = sorted(scans.cases.values(), key=lambda c: c.name)[:2]
        cases = [cached_case(case, preparation, Path(scratch) / "cache") for case in labelled]
        channels, classes = len(scans.task.task.channels), len(scans.task.task.labels)
        network = replace(config.network, in_channels=channels, classes=classes)
        config = replace(config, network=network)
        sampler = PatchSampler(cases, _cut(config), config.tumour_share, classes)
        measure(config, sampler, device, options.repeats)


def _cut(config: TrainConfig) -> int:
    return config.patch + 2 * margin_voxels(config)


def measure(config: TrainConfig, sampler: PatchSampler, device: torch.device, repeats: int) -> None:
    """Time each part on batches of `sampler`, and print it relative to the training step."""
    feed = BatchFeed(sampler, config.batch_size, np.random.default_rng(0))
    batch = feed.take()
    feed.close()
    images, labels = batch.images.to(device), batch.labels.to(device)
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    ready = augment(images, labels, config, generator)
    assert ready[0].shape[2:] == (config.patch,) * 3
    step, theirs = training_step(config, device), monai_augment(config)

    def ours() -> None:
        augment(images, labels, config, generator)[1].sum().item()  # waits for the device

    times = {
        "draw (in the background)": median_ms(
            lambda: [sampler.draw(rng) for _ in range(config.batch_size)], repeats
        ),
        "augment": median_ms(ours, repeats),
        "MONAI's transforms, CPU": median_ms(lambda: theirs(batch), repeats),
        "network's step": median_ms(lambda: step(*ready), repeats),
    }
    print(f"{'per batch':<28}{'ms':>8}{'of the step':>14}")
    for name, elapsed_ms in times.items():
        share = elapsed_ms / times["network's step"]
        print(f"{name:<28}{elapsed_ms:8.1f}{share:14.1%}")
    waiting = max(0.0, times["draw (in the background)"] - times["network's step"])
    print(f"\nthe network waits {waiting:.1f} ms a step for patches")


if __name__ == "__main__":
    main()
