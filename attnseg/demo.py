"""The demo: a synthetic case made, segmented and measured, with nothing to download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attnseg.runtime.bundle import Manifest
from attnseg.runtime.outputs import output_names
from attnseg.runtime.scans import LABEL_SUFFIXES, Case
from attnseg.runtime.volume import read_volume
from attnseg.synthetic import make_case, write_case

DEMO_SEED = 7  # not among the seeds of the phantoms mixed into training, which start at 1000
CASE_NAME = "synthetic-glioma"


@dataclass(frozen=True)
class DemoScore:
    """Dice per region of the demo's result against the truth it was made with."""

    dice: dict[str, float]


def make_demo_scan(folder: Path) -> Path:
    """Write the demo's scan below `folder` and return the folder to segment."""
    scan = folder / "scan"
    write_case(make_case(DEMO_SEED), scan, CASE_NAME)
    return scan


def score_demo(case: Case, output: Path, manifest: Manifest) -> DemoScore:
    """Dice of the labels in `output` against those the case was made with."""
    truth_file = case.sibling(LABEL_SUFFIXES)
    assert truth_file is not None
    truth = read_volume([truth_file]).channels[0]
    labels = read_volume([output / output_names(case.name)["labels"]]).channels[0]
    dice = {}
    for name, values in manifest.regions.items():
        a, b = np.isin(labels, values), np.isin(truth, values)
        dice[name] = 2 * int((a & b).sum()) / max(1, int(a.sum()) + int(b.sum()))
    return DemoScore(dice)
