from __future__ import annotations

import os
from pathlib import Path

from attnseg.export.source.default import default_model
from tests.conftest import WEIGHTS


def checkpoint(folder: Path, seconds: int) -> Path:
    folder.mkdir(parents=True)
    file = folder / "best.pt"
    file.write_bytes(b"")
    os.utime(file, (seconds, seconds))
    return file


def test_without_a_run_it_is_the_shipped_model(tmp_path: Path) -> None:
    assert default_model(tmp_path / "runs") == WEIGHTS
    (tmp_path / "runs" / "started").mkdir(parents=True)
    (tmp_path / "runs" / "started" / "last.pt").write_bytes(b"")
    assert default_model(tmp_path / "runs") == WEIGHTS


def test_with_runs_it_is_the_newest_of_their_best_checkpoints(tmp_path: Path) -> None:
    checkpoint(tmp_path / "b", 100)
    newest = checkpoint(tmp_path / "ablation" / "a", 300)
    checkpoint(tmp_path / "c", 200)
    assert default_model(tmp_path) == newest
