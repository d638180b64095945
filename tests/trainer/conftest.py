"""Phantom cases, a tiny training run, and helpers to compare runs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from attnseg.cli.app import main
from attnseg.synthetic import make_case, write_case
from attnseg.trainer.checkpoint import load_checkpoint
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.data_set import DataSet, open_data_set

SETTINGS = {
    "widths": "4,8",
    "bottleneck": "8",
    "patch": "32",
    "epochs": "3",
    "steps_per_epoch": "3",
    "learning_rate": "1e-3",
    "precision": "fp32",
}
TINY = TrainConfig().with_settings(SETTINGS)
SCORES = {"loss": 1.0, "WT": 0.5, "TC": 0.5, "ET": 0.5}
"""Result of a mocked validation, for tests that do not depend on it."""


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three small cases, and the file `split.json` beside it."""
    folder = tmp_path_factory.mktemp("trainer") / "phantoms"
    for seed in (11, 12, 13):
        write_case(make_case(seed, (64, 72, 56)), folder, f"case{seed}")
    split = '{"train": ["case11", "case12"], "validation": ["case13"]}'
    (folder.parent / "split.json").write_text(split)
    return folder


@pytest.fixture(scope="session")
def data(phantoms: Path) -> DataSet:
    split = {"train": ["case11", "case12"], "validation": ["case13"]}
    return open_data_set(phantoms, split, TINY)


def train_command(phantoms: Path, output: Path, settings: dict[str, str]) -> list[str]:
    """Arguments of `attnseg` that train on the phantoms as `TrainConfig` with `settings` does."""
    changes = [f"--set={name}={text}" for name, text in settings.items()]
    split = phantoms.parent / "split.json"
    return ["train", f"--data={phantoms}", f"--split={split}", f"--output={output}", *changes]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def log_rows(output: Path) -> list[dict[str, str]]:
    """The rows of a run's log, without the time that they took."""
    with (output / "log.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        del row["seconds"]
    return rows


def assert_same_end(one: Path, other: Path) -> None:
    """Two runs ended alike to the bit: logs, weights, their average and the best of them."""
    assert log_rows(one) == log_rows(other)
    for name in ("last.pt", "best.pt"):
        first, second = (load_checkpoint(run / name) for run in (one, other))
        assert first["epoch"] == second["epoch"]
        for weights in ("model", "average"):
            if first[weights] is None:
                assert second[weights] is None
                continue
            assert first[weights].keys() == second[weights].keys()
            for key, value in first[weights].items():
                assert torch.equal(value, second[weights][key]), (name, weights, key)
