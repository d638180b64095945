"""What an export is measured on when no cases are given: a phantom, and one window of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from attnseg.runtime.bundle import Manifest
from attnseg.runtime.engines.base import Engine
from attnseg.runtime.executor import WindowOptions, pad_image
from attnseg.runtime.golden import Golden
from attnseg.runtime.prepare import prepare
from attnseg.runtime.scans import find_cases
from attnseg.runtime.volume import Volume, read_volume
from attnseg.synthetic import MODALITIES, make_case
from attnseg.trainer.cases import LabelledCase, find_labelled_cases, read_classes
from attnseg.trainer.evaluate import cases_to_evaluate
from attnseg.trainer.task import Task

PHANTOM_SEED = 11  # not among those of training, which start at 1000, and of the demo
CALIBRATION_CASES = 8
CALIBRATION_WINDOWS = 8  # all their activations are in memory at once
PHANTOM_SHAPE = (96, 112, 88)


@dataclass(frozen=True)
class Sample:
    """A case to compare precisions on.

    Attributes:
        name: of the case.
        volume: its channels.
        truth: `(X, Y, Z)` label values in the volume's grid, or None where nobody knows.
    """

    name: str
    volume: Volume
    truth: NDArray[np.uint8] | None = None


SampleSource = Callable[[Manifest], Sequence[Sample]]
"""Gives the cases for a model."""


def read_samples(data: Path, manifest: Manifest) -> list[Sample]:
    """The labelled cases below `data` that the model was not trained on.

    Raises:
        ScanError: there is no case, or one cannot be read.
        TrainingError: the labels or channels are not the model's, or no case is left.
    """
    scans = find_labelled_cases(data)
    cases = cases_to_evaluate(scans, manifest, "held-out")
    return [_read_sample(case, scans.task) for case in cases]


def _read_sample(case: LabelledCase, task: Task) -> Sample:
    values = np.array([value for _, value in task.labels], np.uint8)
    truth = values[read_classes(case, task).channels[0]]
    return Sample(case.name, read_volume(case.case.files), truth)


def calibration_windows(scans: Path, manifest: Manifest) -> list[NDArray[np.float32]]:
    """Windows `(C, X, Y, Z)` of the cases below a folder, labelled or not, spread over all.

    Raises:
        ScanError: there is no case, or one is incomplete or cannot be read.
    """
    found = find_cases(scans, manifest.channels)
    for problem in found.problems.values():
        raise problem
    cases = found.cases[:: max(1, len(found.cases) // CALIBRATION_CASES)][:CALIBRATION_CASES]
    windows: list[NDArray[np.float32]] = []
    for case in cases:
        of_case = sample_windows(manifest, Sample(case.name, read_volume(case.files)))
        of_case = of_case[np.any(of_case, axis=(1, 2, 3, 4))]
        count = -(-CALIBRATION_WINDOWS // len(cases))
        windows += list(of_case[:: max(1, len(of_case) // count)][:count])
    return windows[:CALIBRATION_WINDOWS]


def synthetic_sample(manifest: Manifest) -> Sample:
    """A brain phantom for the BraTS modalities, smooth noise in one window for others."""
    if tuple(channel.name for channel in manifest.channels) == MODALITIES:
        phantom = make_case(PHANTOM_SEED, PHANTOM_SHAPE)
        return Sample("synthetic brain", Volume(phantom.images, phantom.affine), phantom.labels)
    rng = np.random.default_rng(0)
    shape = (len(manifest.channels), *manifest.inference.window)
    noise = rng.standard_normal(shape)
    smooth = ndimage.gaussian_filter(noise, (0, 4, 4, 4))
    mixed = smooth / smooth.std() + 0.2 * noise
    images = np.round(100 * (mixed - mixed.min()) + 1).astype(np.int16)
    return Sample("smooth noise", Volume(images, np.diag([*manifest.spacing_mm, 1.0])))


def sample_windows(manifest: Manifest, sample: Sample) -> NDArray[np.float32]:
    """The windows that the network sees of a sample: `(N, C, X, Y, Z)`."""
    inference = manifest.inference
    turned = sample.volume.oriented(manifest.orientation)
    image = prepare(turned, manifest.grid, manifest.normalisation).image
    options = WindowOptions(inference.window, inference.overlap, inference.window_multiple)
    plan = options.plan(image.shape[1:])
    padded = pad_image(image, plan)
    return np.stack([padded[(slice(None), *window.slices())] for window in plan.windows])


def make_golden(reference: Engine, windows: NDArray[np.float32]) -> Golden:
    """The window, of those given, on which the network finds most, with its logits."""
    best, most = None, -1
    for image in windows.astype(np.float16).astype(np.float32):
        logits = reference.infer(image[None]).copy()
        found = int(np.count_nonzero(logits.argmax(axis=1)))
        if found > most:
            best, most = Golden(image[None], logits), found
    assert best is not None, "a plan has at least one window"
    return best
