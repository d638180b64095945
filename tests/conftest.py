"""Fixtures shared by several test files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from attnseg.runtime.engines.base import EngineInfo
from attnseg.runtime.model.bundle import default_folder
from attnseg.runtime.steps.preprocess import Preprocessing
from attnseg.runtime.steps.schemes import ZScore
from attnseg.synthetic import SyntheticCase, make_case, write_case

# The machines that run the tests are shared, so a slow example is not a failure.
hypothesis.settings.register_profile("attnseg", deadline=None)
hypothesis.settings.load_profile("attnseg")

SMALL_SHAPE = (80, 88, 72)

WEIGHTS = default_folder() / "weights.safetensors"
PLAIN = Preprocessing("LPS", None, "nonzero", (ZScore(),) * 4)
"""Z-scores of the four BraTS channels."""


def _real_data() -> Path | None:
    folder = os.environ.get("ATTNSEG_DATA")
    return Path(folder) if folder else None


def pytest_report_header() -> str:
    folder = _real_data()
    if folder is None:
        return "integration data: a synthetic case (ATTNSEG_DATA is not set)"
    return f"integration data: real cases in {folder}"


@pytest.fixture(scope="session")
def integration_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ATTNSEG_DATA names, or a folder with one synthetic case of full size."""
    folder = _real_data()
    if folder is not None:
        assert folder.is_dir(), f"ATTNSEG_DATA names {folder}, which is no folder"
        return folder
    folder = tmp_path_factory.mktemp("integration")
    write_case(make_case(7), folder, "synthetic")
    return folder


@pytest.fixture(scope="session")
def small_synthetic() -> SyntheticCase:
    return make_case(3, SMALL_SHAPE)


@pytest.fixture(scope="session")
def _small_scan(tmp_path_factory: pytest.TempPathFactory, small_synthetic: SyntheticCase) -> Path:
    return write_case(small_synthetic, tmp_path_factory.mktemp("scan"), "small")


@pytest.fixture
def small_scan(tmp_path: Path, _small_scan: Path) -> Path:
    """A folder that holds the case folder `small`; the test may damage it."""
    shutil.copytree(_small_scan, tmp_path / "scan" / "small")
    return tmp_path / "scan"


SaveImage = Callable[..., Path]


@pytest.fixture
def save_image(tmp_path: Path) -> SaveImage:
    """Save an array as a NIfTI file and return its path."""

    def save(
        array: NDArray[Any], name: str = "image.nii.gz", affine: Any = None, **header: Any
    ) -> Path:
        image = nib.Nifti1Image(array, np.eye(4) if affine is None else affine)
        for field, value in header.items():
            image.header[field] = value
        nib.save(image, tmp_path / name)
        return tmp_path / name

    return save


class LinearEngine:
    """Logits are a fixed matrix times the channels, per voxel: every result can be computed."""

    info = EngineInfo("linear", "1", "fp32", "cpu")

    def __init__(self, matrix: NDArray[np.float32]) -> None:
        self.matrix = matrix.astype(np.float32)
        self.calls = 0

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        self.calls += 1
        return np.einsum("kc,bcxyz->bkxyz", self.matrix, batch)
