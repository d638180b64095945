"""The whole pipeline on the cases below ATTNSEG_DATA, or else on a full-size synthetic case."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from attnseg import Bundle, Segmenter, SegmentOptions
from attnseg.evaluation.metrics import region_dice
from attnseg.runtime.case.nifti import read_volume
from attnseg.runtime.case.scans import LABEL_SUFFIXES, Case, find_cases, find_siblings


@pytest.fixture(scope="module")
def cases(integration_data: Path) -> list[Case]:
    """The cases that the shipped model was not trained on."""
    training = Bundle.default().manifest.training
    assert training is not None
    scans = find_cases(integration_data)
    assert not scans.problems
    held_out = [c for c in scans.cases if c.name not in training.train_cases]
    assert held_out
    return held_out


@pytest.fixture(scope="module")
def labels(cases: list[Case]) -> dict[str, np.ndarray]:
    segmenter = Segmenter()
    return {c.name: segmenter.segment(read_volume(c.files)).labels for c in cases}


def truth_of(case: Case) -> np.ndarray:
    (file,) = find_siblings([case], LABEL_SUFFIXES)[case.name]
    return np.asarray(nib.load(file).dataobj)


def test_the_mean_dice_is_what_the_issue_asked_for(
    cases: list[Case], labels: dict[str, np.ndarray]
) -> None:
    regions = Bundle.default().manifest.task.regions
    rows = [region_dice(labels[c.name], truth_of(c), regions) for c in cases]
    mean = {region: np.mean([row[region] for row in rows]) for region in regions}
    assert mean["WT"] >= 0.80
    assert mean["TC"] >= 0.60
    assert mean["ET"] >= 0.55


def test_fp32_and_the_default_precision_agree(
    cases: list[Case], labels: dict[str, np.ndarray]
) -> None:
    case = cases[0]
    exact = Segmenter(options=SegmentOptions(precision="fp32"))
    expected = exact.segment(read_volume(case.files)).labels
    regions = Bundle.default().manifest.task.regions
    agreement = region_dice(labels[case.name], expected, regions)
    assert min(agreement.values()) > 0.98


def test_volumes_are_read_as_nibabel_reads_them(cases: list[Case]) -> None:
    for case in cases:
        volume = read_volume(case.files)
        for file, channel in zip(case.files, volume.channels, strict=True):
            image = nib.load(file)
            np.testing.assert_array_equal(channel, np.asarray(image.dataobj))
            np.testing.assert_array_equal(volume.affine, image.affine)
