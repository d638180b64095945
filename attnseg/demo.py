"""The demo: a synthetic case made, segmented and measured, with nothing to download."""

from __future__ import annotations

from pathlib import Path

from attnseg.runtime.bundle import Manifest
from attnseg.runtime.outputs import output_names
from attnseg.runtime.scans import LABEL_SUFFIXES, Case
from attnseg.runtime.volume import read_labels
from attnseg.synthetic import make_case, write_case
from attnseg.trainer.metrics import region_dice

DEMO_SEED = 7  # not among the seeds of the phantoms mixed into training, which start at 1000
CASE_NAME = "synthetic-glioma"


def make_demo_scan(folder: Path) -> Path:
    """Write the demo's scan below `folder` and return the folder to segment."""
    return write_case(make_case(DEMO_SEED), folder / "scan", CASE_NAME)


def score_demo(case: Case, output: Path, manifest: Manifest) -> dict[str, float]:
    """Dice per region of the labels in `output` against those the case was made with."""
    truth_file = case.sibling(LABEL_SUFFIXES)
    assert truth_file is not None
    truth = read_labels(truth_file).channels[0]
    labels = read_labels(output / output_names(case.name)["labels"]).channels[0]
    return region_dice(labels, truth, manifest.regions)
