"""Comparison of an imported model with the predictor of nnU-Net itself."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.imports.nnunet import read_channels
from attnseg.runtime.case.nifti import read_labels, read_volume
from attnseg.runtime.case.scans import Case, find_scans
from attnseg.runtime.model.bundle import Bundle
from attnseg.runtime.options import SegmentOptions
from attnseg.runtime.segmenter import Segmenter

COMPARISON_HEADER = ("case", "foreground voxels", "other labels", "share")
TOLERANCE = 1e-4
"""Largest share of foreground voxels with another label."""


@dataclass(frozen=True)
class Comparison:
    """Labels of one case, compared with nnU-Net's.

    Attributes:
        case: Name of the case.
        foreground: Number of voxels above 0 in nnU-Net's labels.
        differ: Number of voxels with another label.
    """

    case: str
    foreground: int
    differ: int

    @property
    def share(self) -> float:
        """Voxels with another label, as a share of the foreground."""
        return self.differ / max(1, self.foreground)

    @property
    def equal(self) -> bool:
        """Whether the share is within `TOLERANCE`."""
        return self.share <= TOLERANCE

    def row(self) -> tuple[str, ...]:
        """Cells under `COMPARISON_HEADER`."""
        return self.case, str(self.foreground), str(self.differ), f"{self.share:.1e}"


def cases_to_compare(folder: Path, scans: Path) -> list[Case]:
    """Cases below `scans` for a model folder, none of them read yet.

    Args:
        folder: Model folder of nnU-Net, whose channels the cases have.
        scans: Folder of scans, named as for `attnseg run`.

    Raises:
        ExportError: The folder is no model folder of nnU-Net 2.
        ScanError: No case is found, or one is incomplete.
    """
    found = find_scans(scans, {}, read_channels(folder))
    for problem in found.problems.values():
        raise problem
    return list(found.cases)


def compare_with_nnunet(
    folder: Path,
    bundle: Bundle,
    cases: Sequence[Case],
    step: Callable[[str], None] = lambda _: None,
) -> list[Comparison]:
    """Segment cases with an imported bundle in fp32 and with nnU-Net's predictor, on the CPU.

    Args:
        folder: Model folder of nnU-Net; it was imported, so its checkpoints are known to hold
            tensors and plain values only.
        bundle: Bundle of the same folds and checkpoint.
        cases: The cases; see `cases_to_compare`.
        step: Callback that receives the name of each step.

    Raises:
        ScanError: A scan cannot be read.
    """
    segmenter = Segmenter(bundle, SegmentOptions(precision="fp32", device="cpu"))
    with redirect_stdout(io.StringIO()):  # nnU-Net prints
        predictor = _predictor(folder, bundle)
    compared = []
    for case in cases:
        step(f"attnseg: {case.name}")
        labels = segmenter.segment(read_volume(case.files)).labels
        step(f"nnU-Net: {case.name}")
        with redirect_stdout(io.StringIO()):
            theirs = _predict(predictor, case)
        differ = int(np.count_nonzero(labels != theirs))
        compared.append(Comparison(case.name, int(np.count_nonzero(theirs)), differ))
    return compared


def _predictor(folder: Path, bundle: Bundle) -> Any:
    for name in ("raw", "preprocessed", "results"):  # nnU-Net warns of variables that are not set
        os.environ.setdefault(f"nnUNet_{name}", os.curdir)
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    origin = bundle.manifest.network
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    folds = tuple(fold if fold == "all" else int(fold) for fold in origin["folds"])
    predictor.initialize_from_trained_model_folder(str(folder), folds, origin["checkpoint"])
    return predictor


def _predict(predictor: Any, case: Case) -> NDArray[np.uint8]:
    """Labels `(X, Y, Z)` of a case by nnU-Net."""
    reader = predictor.plans_manager.image_reader_writer_class()
    image, properties = reader.read_images([str(file) for file in case.files])
    labels = predictor.predict_single_npy_array(image, properties)
    with tempfile.TemporaryDirectory() as scratch:  # a reader that turns images turns labels back
        file = Path(scratch) / "labels.nii.gz"
        reader.write_seg(labels, str(file), properties)
        return np.asarray(read_labels(file).channels[0], np.uint8)
