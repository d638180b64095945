"""Cases to compare precisions on, and windows for the golden window and int8 calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from attnseg.data.decide import decide_labels
from attnseg.data.labelled import LabelledCase, find_labelled_cases
from attnseg.data.task import LabelledTask
from attnseg.evaluation.cases import cases_to_evaluate, read_truth
from attnseg.runtime.case.nifti import read_volume
from attnseg.runtime.case.scans import find_cases
from attnseg.runtime.case.volume import Volume
from attnseg.runtime.engines.base import Engine
from attnseg.runtime.model.golden import Golden
from attnseg.runtime.model.manifest import Manifest
from attnseg.runtime.options import SegmentOptions, resolve
from attnseg.runtime.steps.decide import Decision
from attnseg.runtime.steps.preprocess import preprocess
from attnseg.runtime.steps.schemes import ClipZScore, Range, Scheme, Unchanged
from attnseg.runtime.steps.windows import pad_image
from attnseg.runtime.task import Task
from attnseg.synthetic import MODALITIES, make_case

PHANTOM_SEED = 11  # not a seed of training (1000 and up) or of the demo
CALIBRATION_CASES = 8
CALIBRATION_WINDOWS = 8  # in all; their activations are held in memory together
PHANTOM_SHAPE = (96, 112, 88)


@dataclass(frozen=True)
class Sample:
    """A case to compare precisions on.

    Attributes:
        name: Name of the case.
        volume: Channels of the case.
        truth: Ground truth `(X, Y, Z)`, uint8 label values on the volume's grid; None if unknown.
        phantom: Whether the case is synthetic, and may be larger than any training case.
    """

    name: str
    volume: Volume
    truth: NDArray[np.uint8] | None = None
    phantom: bool = False


SampleSource = Callable[[Manifest], Sequence[Sample]]
"""Callable that returns the cases for a model's manifest."""


def read_samples(data: Path, manifest: Manifest) -> list[Sample]:
    """The labelled cases below `data` that the model was not trained on.

    Raises:
        ScanError: No case is found, or a scan cannot be read.
        TrainingError: The labels or channels are not the model's, or no case is held out.
    """
    scans = find_labelled_cases(data)
    cases = cases_to_evaluate(scans, manifest, "held-out")
    task = decide_labels(scans, [case.name for case in cases]).task
    return [_read_sample(case, task) for case in cases]


def _read_sample(case: LabelledCase, task: LabelledTask) -> Sample:
    return Sample(case.name, read_volume(case.case.files), read_truth(case, task))


def calibration_windows(scans: Path, manifest: Manifest) -> list[NDArray[np.float32]]:
    """Windows `(C, X, Y, Z)` float32, spread over the cases below a folder, labelled or not.

    Raises:
        ScanError: No case is found, or one is incomplete or cannot be read.
    """
    found = find_cases(scans, manifest.task.channels)
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
    """A brain phantom for the BraTS modalities; one window of smooth noise for other channels."""
    if manifest.task.channel_names == MODALITIES:
        phantom = make_case(PHANTOM_SEED, PHANTOM_SHAPE)
        return Sample(
            "synthetic brain", Volume(phantom.images, phantom.affine), phantom.labels, phantom=True
        )
    rng = np.random.default_rng(0)
    place = [manifest.preprocessing.axes.index(axis) for axis in range(3)]
    window = [manifest.inference.window[axis] for axis in place]
    spacing_mm = [(manifest.spacing_mm or (1.0, 1.0, 1.0))[axis] for axis in place]
    noise = rng.standard_normal((len(manifest.task.channels), *window))
    smooth = ndimage.gaussian_filter(noise, (0, 4, 4, 4))
    mixed = smooth / smooth.std() + 0.2 * noise
    schemes = manifest.preprocessing.normalisation
    images = [_like_scans(own, scheme) for own, scheme in zip(mixed, schemes, strict=True)]
    return Sample("smooth noise", Volume(images, np.diag([*spacing_mm, 1.0])))


def _like_scans(noise: NDArray[np.float64], scheme: Scheme) -> NDArray[Any]:
    """Noise of unit variance in the range of intensities that a scheme is for."""
    if isinstance(scheme, ClipZScore):
        return np.asarray(np.round(scheme.mean + scheme.std * noise), np.int16)
    if isinstance(scheme, Range) and scheme.source is not None:
        low, high = scheme.source
        return np.asarray((low + high) / 2 + (high - low) / 4 * noise, np.float32)
    if isinstance(scheme, Unchanged):
        return noise.astype(np.float32)
    return np.asarray(np.round(100 * (noise - noise.min()) + 1), np.int16)


def sample_windows(manifest: Manifest, sample: Sample) -> NDArray[np.float32]:
    """Preprocessed windows of a sample `(N, C, X, Y, Z)`, float32."""
    image = preprocess(sample.volume, manifest.preprocessing).image
    plan = resolve(SegmentOptions(), manifest).windows.plan(image.shape[1:])
    padded = pad_image(image, plan)
    return np.stack([padded[(slice(None), *window.slices())] for window in plan.windows])


def make_golden(reference: Engine, windows: NDArray[np.float32], task: Task) -> Golden:
    """The window of `(N, C, X, Y, Z)` with the most foreground voxels, and its logits."""
    best, most, decision = None, -1, Decision.of(task)
    for image in windows.astype(np.float16).astype(np.float32):
        logits = reference.infer(image[None]).copy()
        found = int(np.count_nonzero(decision.classes(logits[0])))
        if found > most:
            best, most = Golden(image[None], logits), found
    assert best is not None, "a plan has at least one window"
    return best
