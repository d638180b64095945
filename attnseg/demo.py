"""The demo: a synthetic case is generated, segmented and scored, without any download."""

from __future__ import annotations

from pathlib import Path

from attnseg.evaluation.metrics import region_dice
from attnseg.runtime.case.nifti import read_labels
from attnseg.runtime.case.scans import LABEL_SUFFIXES, Case, find_siblings
from attnseg.runtime.model.manifest import Manifest
from attnseg.runtime.results.report import output_names
from attnseg.synthetic import make_case, write_case

DEMO_SEED = 7  # not a seed of the training phantoms, which start at 1000
CASE_NAME = "synthetic-glioma"


def make_demo_scan(folder: Path) -> Path:
    """Write the demo case below `folder` and return the folder of the case."""
    return write_case(make_case(DEMO_SEED), folder / "scan", CASE_NAME)


def score_demo(case: Case, output: Path, manifest: Manifest) -> dict[str, float]:
    """Dice by region of the labels in folder `output` against the ground truth of the case."""
    (truth_file,) = find_siblings([case], LABEL_SUFFIXES)[case.name]
    truth = read_labels(truth_file).channels[0]
    labels = read_labels(output / output_names(case.name)["labels"]).channels[0]
    return region_dice(labels, truth, manifest.task.regions)
