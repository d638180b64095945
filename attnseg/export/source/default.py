"""The model that is exported by default."""

from __future__ import annotations

from pathlib import Path

from attnseg.runtime.model.bundle import Bundle

RUNS = Path("runs")
"""Folder that is searched for training runs."""


def default_model(runs: Path = RUNS) -> Path:
    """The newest `best.pt` below a folder of runs, or the weights of the shipped bundle."""
    trained = sorted(runs.rglob("best.pt"), key=lambda file: file.stat().st_mtime)
    return trained[-1] if trained else Bundle.default().file("weights").path
