"""Imported models of nnU-Net against nnU-Net's own predictor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnseg.imports.imported import import_nnunet
from attnseg.imports.verify import cases_to_compare, compare_with_nnunet
from attnseg.runtime.model.bundle import Bundle
from tests.imports.models import REGIONS, NnUNetFolder, write_scan

CT = {"channels": ("CT",), "schemes": ("CTNormalization",), "masks": (False,)}
TWO = {
    "channels": ("T1", "FLAIR"),
    "schemes": ("ZScoreNormalization",) * 2,
    "masks": (True, True),
}
SPLIT = {"spacing": (3.5, 1.0, 1.0), "patch": (8, 24, 24)}
CASES: dict[str, tuple[NnUNetFolder, dict[str, Any]]] = {
    "plain, labels, mirrors": (NnUNetFolder(mirror_axes=(0, 1, 2)), {}),
    "residual, labels, two folds": (
        NnUNetFolder(residual=True, folds=2, **TWO),
        {"channels": 2, "orientation": "RAS"},
    ),
    "plain, regions, two folds, two mirrors": (
        NnUNetFolder(labels=REGIONS, order=(1, 2), folds=2, mirror_axes=(1, 2)),
        {"orientation": "PIR"},
    ),
    "CT, resampled": (
        NnUNetFolder(spacing=(1.5, 1.25, 1.25), **CT),
        {"ct": True, "spacing_mm": (0.9, 1.0, 1.6), "orientation": "RAI"},
    ),
    "CT, separate axis": (
        NnUNetFolder(residual=True, **CT, **SPLIT),
        {"ct": True, "spacing_mm": (0.8, 0.8, 5.0), "shape": (40, 44, 9)},
    ),
    "oblique, at the limit of a separate axis": (
        NnUNetFolder(spacing=(1.0, 1.0, 1.0)),
        {"oblique": True, "spacing_mm": (1.0, 1.0, 3.0), "shape": (36, 30, 12)},
    ),
    "oblique, half a voxel": (
        NnUNetFolder(spacing=(1.0, 1.0, 1.0)),
        {"oblique": True, "spacing_mm": (1.5, 1.5, 1.5), "shape": (26, 24, 22)},
    ),
    "CT, no axis apart": (
        NnUNetFolder(resampling={}, **CT, **SPLIT),
        {"ct": True, "spacing_mm": (0.8, 0.8, 5.0), "shape": (40, 44, 9)},
    ),
    "regions, resampled": (
        NnUNetFolder(labels=REGIONS, order=(1, 2), spacing=(1.2, 0.8, 0.8)),
        {"spacing_mm": (1.0, 1.0, 1.0)},
    ),
    "axes moved": (
        NnUNetFolder(transpose=(1, 0, 2), spacing=(1.0, 1.3, 1.0), mirror_axes=(0,)),
        {"spacing_mm": (1.0, 1.1, 0.9)},
    ),
    "reoriented": (
        NnUNetFolder(reader="NibabelIOWithReorient", masks=(False,)),
        {"orientation": "LPI"},
    ),
    "smaller than a window": (NnUNetFolder(patch=(32, 32, 32)), {"shape": (24, 20, 30)}),
}


@pytest.mark.parametrize("name", CASES)
def test_labels_are_those_of_nnunet(tmp_path: Path, name: str) -> None:
    model, scan = CASES[name]
    folder = model.write(tmp_path / "model")
    for seed in range(2):
        write_scan(tmp_path / "scans", f"case{seed}", **{"seed": seed, **scan})
    bundle = import_nnunet(folder, tmp_path / "bundle").bundle
    compared = compare_with_nnunet(folder, bundle, cases_to_compare(folder, tmp_path / "scans"))
    assert [own.case for own in compared] == ["case0", "case1"]
    for own in compared:
        assert own.foreground > 200
        assert own.share <= 1e-4, own


def test_sums_in_single_precision_differ_a_little(tmp_path: Path) -> None:
    # `accumulate` is a choice of the manifest: nnU-Net's half, or single, which is more exact.
    folder = NnUNetFolder(mirror_axes=(0, 1, 2)).write(tmp_path / "model")
    write_scan(tmp_path / "scans", "case")
    bundle = import_nnunet(folder, tmp_path / "bundle").bundle
    inference = replace(bundle.manifest.inference, accumulate="single")
    single = Bundle(bundle.folder, replace(bundle.manifest, inference=inference), bundle.sha256)
    (own,) = compare_with_nnunet(folder, single, cases_to_compare(folder, tmp_path / "scans"))
    assert own.share <= 2e-3
    assert np.isfinite(own.share)
