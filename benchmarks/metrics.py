"""Time of all scores of a case's regions, and of HD95 in attnseg and medpy on the same masks.

    python -m benchmarks.metrics CASE_FOLDER [--repeats 5]

The ground truth is scored against a copy that is eroded and shifted by two voxels. Requires
the extra `dev`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from medpy.metric.binary import hd95
from scipy import ndimage

from attnseg.data.labelled import find_labelled_cases
from attnseg.evaluation.metrics import hd95_mm, score_structures
from attnseg.runtime.case.nifti import read_labels
from benchmarks.harness import median_ms, print_machine


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("case", type=Path, help="folder of a case with expert labels")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print_machine("numpy", "scipy", "medpy")
    scans = find_labelled_cases(options.case)
    labelled = next(iter(scans.cases.values()))
    volume = read_labels(labelled.label)
    truth = np.asarray(volume.channels[0])
    found = np.roll(np.where(ndimage.binary_erosion(truth > 0), truth, 0), 2, axis=0)
    regions, spacing = scans.task.task.regions, volume.spacing_mm
    masks = [(np.isin(found, v), np.isin(truth, v)) for v in regions.values()]
    ours = [hd95_mm(*pair, spacing) for pair in masks]
    theirs = [hd95(*pair, voxelspacing=spacing) for pair in masks]
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    times = {
        "every score of every region": median_ms(
            lambda: score_structures(found, truth, regions, spacing), options.repeats
        ),
        "HD95 of every region": median_ms(
            lambda: [hd95_mm(*pair, spacing) for pair in masks], options.repeats
        ),
        "HD95 by medpy": median_ms(
            lambda: [hd95(*pair, voxelspacing=spacing) for pair in masks], 1, 0
        ),
    }
    print(f"case      {labelled.name}, {truth.shape}, HD95 {[round(v, 2) for v in ours]} mm\n")
    for name, elapsed_ms in times.items():
        print(f"{name:<30}{elapsed_ms:8.0f} ms")


if __name__ == "__main__":
    main()
