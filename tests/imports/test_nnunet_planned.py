"""Folders that nnU-Net's own fingerprint and planner made, against nnU-Net's predictor.

One folder of each planner runs here; folders of real cases are compared by hand (docs/import.md).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from attnseg.imports.imported import import_nnunet
from attnseg.imports.verify import cases_to_compare, compare_with_nnunet
from tests.imports.models import NnUNetFolder, write_scan

NAME = "Dataset901_Planned"


@dataclass(frozen=True)
class PlannedFolder(NnUNetFolder):
    """A model folder with the plans of nnU-Net's planner."""

    made: dict[str, Any] = field(default_factory=dict)

    def plans(self) -> dict[str, Any]:
        """See `NnUNetFolder.plans`."""
        return self.made


def write_data_set(raw: Path, spacing_mm: tuple[float, float, float]) -> None:
    """Three labelled cases in nnU-Net's raw format."""
    folder = raw / NAME
    (folder / "labelsTr").mkdir(parents=True)
    for seed in range(3):
        images = folder / "imagesTr"
        write_scan(images, f"c{seed}", shape=(40, 36, 28), spacing_mm=spacing_mm, seed=seed)
        image: Any = nib.load(images / f"c{seed}_0000.nii.gz")
        values = np.asanyarray(image.dataobj)
        labels = ((values > 300).astype(np.uint8) + (values > 380)).astype(np.uint8)
        nib.save(nib.Nifti1Image(labels, image.affine), folder / "labelsTr" / f"c{seed}.nii.gz")
    dataset = NnUNetFolder().dataset()
    (folder / "dataset.json").write_text(json.dumps({**dataset, "numTraining": 3}))


@pytest.mark.parametrize(
    ("planner", "spacing_mm", "mirror_axes"),
    [
        ("ExperimentPlanner", (1.0, 1.0, 1.2), (0, 1, 2)),
        ("nnUNetPlannerResEncM", (0.8, 0.8, 3.0), None),
    ],
)
def test_labels_of_planned_models_are_those_of_nnunet(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    planner: str,
    spacing_mm: tuple[float, float, float],
    mirror_axes: tuple[int, ...] | None,
) -> None:
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprints,
        plan_experiments,
    )

    write_data_set(tmp_path / "raw", spacing_mm)
    extract_fingerprints([901], num_processes=1, verbose=False, show_progress_bar=False)
    plan_experiments([901], planner)
    (file,) = (tmp_path / "preprocessed" / NAME).glob("*Plans.json")
    plans = json.loads(file.read_text())
    patch = plans["configurations"]["3d_fullres"]["patch_size"]
    model = PlannedFolder(mirror_axes=mirror_axes, patch=tuple(patch), made=plans)
    folder = model.write(tmp_path / "model")
    write_scan(tmp_path / "scans", "case", shape=(52, 44, 36), spacing_mm=spacing_mm, seed=7)
    bundle = import_nnunet(folder, tmp_path / "bundle").bundle
    (found,) = compare_with_nnunet(folder, bundle, cases_to_compare(folder, tmp_path / "scans"))
    assert found.foreground > 500
    assert found.share <= 1e-4, found
