"""The readers of attnseg that take what others made, by name."""

from __future__ import annotations

import importlib
from pathlib import Path

from tests.hostile.drive import Reader

READERS = {
    "nifti": "nifti.Nifti",
    "cases": "cases.Cases",
    "specs": "descriptions.Specs",
    "data_sets": "descriptions.DataSets",
    "options": "descriptions.Options",
    "manifest": "bundles.Manifests",
    "bundle": "bundles.Bundles",
    "weights": "weights.Weights",
    "golden": "bundles.Reports",
    "nnunet": "imports.NnUNetFolders",
    "monai": "imports.MonaiBundles",
}
"""Module and class of each reader, which are imported in its child alone."""


def open_reader(name: str, seeds: Path) -> Reader:
    """Open a reader by its name; `seeds` is an empty folder for the files that it starts from."""
    module, kind = {**READERS, "planted": "planted.Planted"}[name].split(".")
    reader: Reader = getattr(importlib.import_module(f"tests.hostile.{module}"), kind)(seeds)
    return reader
