"""Imported MONAI bundles against MONAI's own transforms and inferer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnseg import Segmenter, SegmentOptions
from attnseg.imports.imported import import_monai
from attnseg.runtime.case.nifti import read_volume
from attnseg.runtime.case.scans import find_scans
from tests.imports.monai_bundles import (
    BRATS,
    BRATS_METADATA,
    SPLEEN,
    SPLEEN_METADATA,
    affine_of,
    changed,
    run_with_monai,
    tilted,
    write_bundle,
    write_scan,
)

RESAMPLED_LAST = [
    {"_target_": "LoadImaged", "keys": "image"},
    {"_target_": "EnsureChannelFirstd", "keys": "image"},
    {"_target_": "ScaleIntensityd", "keys": "image", "minv": -1.0, "maxv": 1.0},
    {"_target_": "Spacingd", "keys": ["image"], "pixdim": [1.2, 0.9], "mode": ["bilinear"]},
]
ACTIVATED_LAST = [
    SPLEEN["postprocessing"]["transforms"][1],
    SPLEEN["postprocessing"]["transforms"][0],
    *SPLEEN["postprocessing"]["transforms"][2:],
]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int, np.ndarray]] = {
    "regions by thresholds, not resampled": (
        BRATS,
        BRATS_METADATA,
        4,
        affine_of("LPS", (1.5, 1.5, 2.0)),  # the bundle does not say what it was trained at
    ),
    "labels by argmax, turned and resampled": (
        SPLEEN,
        SPLEEN_METADATA,
        1,
        affine_of("LAS", (1.1, 1.1, 2.5)),
    ),
    "oblique": (SPLEEN, SPLEEN_METADATA, 1, tilted(affine_of("PIR", (0.9, 1.7, 2.1)), 12)),
    "logits resampled": (
        changed(SPLEEN, postprocessing__transforms=ACTIVATED_LAST),
        SPLEEN_METADATA,
        1,
        affine_of("RAS", (1.5, 2.0, 2.0)),
    ),
    "axes as stored, normalised before resampling": (
        changed(SPLEEN, preprocessing__transforms=RESAMPLED_LAST, inferer__mode="constant"),
        SPLEEN_METADATA,
        1,
        affine_of("SPL", (1.0, 1.0, 0.7)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_labels_are_those_of_monai(tmp_path: Path, name: str) -> None:
    config, described, channels, affine = CASES[name]
    model = write_bundle(tmp_path / "model", config, described)
    files = write_scan(tmp_path / "scan", channels, (38, 33, 21), affine, ct=channels == 1)
    wanted = run_with_monai(model, files)
    bundle = import_monai(model, tmp_path / "bundle").bundle
    (case,) = find_scans(files[0].parent, {}, bundle.manifest.task.channels).cases
    segmenter = Segmenter(bundle, SegmentOptions(precision="fp32", device="cpu"))
    labels = segmenter.segment(read_volume(case.files)).labels
    assert labels.shape == wanted.shape
    assert len(np.unique(wanted)) == len(bundle.manifest.task.labels)
    foreground = np.count_nonzero(wanted)
    assert foreground > 1000
    assert np.count_nonzero(labels != wanted) <= 1e-4 * foreground
