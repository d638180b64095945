"""Dice per region of the results of `attnseg run` against expert labels.

    attnseg run DATA -o out/ && python -m benchmarks.accuracy DATA out/

Prints one row per case and the means over the cases that the shipped model was and was not
trained on. Results of another model are refused. Needs `attnseg[train]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from attnseg import Bundle
from attnseg.runtime.outputs import output_names, read_report
from attnseg.runtime.scans import LABEL_SUFFIXES, find_cases
from attnseg.trainer.data import read_classes
from attnseg.trainer.metrics import region_dice
from attnseg.trainer.task import BRATS


def _print_row(name: str, dice: Mapping[str, float], seconds: float) -> None:
    print(f"{name:<32}" + "".join(f"{value:8.3f}" for value in dice.values()) + f"{seconds:8.1f}")


def _print_mean(title: str, rows: Sequence[tuple[Mapping[str, float], float]]) -> None:
    if rows:
        regions = rows[0][0]
        mean = {region: float(np.mean([row[region] for row, _ in rows])) for region in regions}
        _print_row(f"{title} ({len(rows)})", mean, float(np.mean([s for _, s in rows])))


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path, help="folder of cases with expert labels")
    parser.add_argument("output", type=Path, help="folder of results")
    options = parser.parse_args()

    bundle = Bundle.default()
    training = bundle.manifest.training
    trained_on = set(training.train_cases if training else ())
    rows: dict[bool, list[tuple[Mapping[str, float], float]]] = {True: [], False: []}
    print(f"{'case':<32}" + "".join(f"{region:>8}" for region in BRATS.regions) + "       s")
    for case in find_cases(options.data).cases:
        truth, report = case.sibling(LABEL_SUFFIXES), read_report(options.output, case.name)
        if truth is None or report is None:
            print(f"{case.name:<32} left out: no expert labels or no result")
            continue
        if report["model"]["manifest_sha256"] != bundle.sha256:
            raise SystemExit(f"{case.name}: made with another model than the one shipped")
        result = options.output / output_names(case.name)["labels"]
        found, expected = (read_classes(f, case.files[0]).channels[0] for f in (result, truth))
        dice = region_dice(found, expected, BRATS.class_regions)
        seconds = sum(report["elapsed_ms"].values()) / 1000
        rows[case.name in trained_on].append((dice, seconds))
        _print_row(case.name, dice, seconds)
    _print_mean("mean, not trained on", rows[False])
    _print_mean("mean, trained on", rows[True])


if __name__ == "__main__":
    main()
