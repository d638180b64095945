from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from attnseg.runtime.errors import TrainingError
from attnseg.trainer import cases
from attnseg.trainer.cases import new_preparation
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.data_set import open_data_set
from attnseg.trainer.devices import Devices
from attnseg.trainer.loop import train
from tests.trainer.conftest import SETTINGS, TINY, call, train_command

ALONE = Devices(torch.device("cpu"))
PLAIN = TrainConfig(histogram_matching=False)


def write(root: Path, name: str, *values: int) -> None:
    """A case whose labels are `values` and 0."""
    (root / name).mkdir(parents=True)
    image = np.pad(np.arange(1, 121, dtype=np.int16).reshape(4, 5, 6), 2)
    labels = np.zeros(image.shape, np.uint8)
    labels[2, 2, 2 : 2 + len(values)] = values
    modalities = enumerate(("t1", "t1ce", "t2", "flair"), start=1)
    for suffix, array in (*((s, image * np.int16(n)) for n, s in modalities), ("seg", labels)):
        nib.save(nib.Nifti1Image(array, np.eye(4)), root / name / f"{name}_{suffix}.nii.gz")


def prepare(root: Path, config: TrainConfig = PLAIN) -> None:
    split = {"train": ["a", "b"], "validation": ["c"]}
    new_preparation(open_data_set(root, split, config), config, ALONE)


def test_training_cases_without_any_label_are_refused_before_the_first_step(
    tmp_path: Path,
) -> None:
    for name, values in {"a": (), "b": (), "c": (1, 2, 4)}.items():
        write(tmp_path, name, *values)
    with pytest.raises(TrainingError, match="no training case holds a label: all label files of"):
        prepare(tmp_path)
    data = open_data_set(tmp_path, {"train": ["a"], "validation": ["c"]}, TINY)
    with pytest.raises(TrainingError, match="no training case holds a label"):
        train(data, TINY, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    prepare(tmp_path, replace(PLAIN, synthetic_cases=1))  # phantoms have labels


def test_a_class_that_no_training_case_holds_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, values in {"a": (2,), "b": (), "c": (1, 2, 4)}.items():
        write(tmp_path, name, *values)
    caplog.set_level(logging.WARNING, "attnseg")
    prepare(tmp_path)
    (line,) = caplog.messages
    assert line.startswith("warning: no training case holds necrotic core or enhancing tumour, ")


def test_validation_cases_without_any_label_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, values in {"a": (1, 2), "b": (4,), "c": ()}.items():
        write(tmp_path, name, *values)
    caplog.set_level(logging.WARNING, "attnseg")
    prepare(tmp_path)
    (line,) = caplog.messages
    assert line.startswith("warning: no validation case holds a label")


def test_the_log_says_what_was_decided_about_label_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path, name, 1, 2, 3)
    caplog.set_level(logging.INFO, "attnseg")
    prepare(tmp_path)
    assert caplog.messages == [
        "Labels: enhancing tumour is label 3, as in BraTS since 2023: 3 of 3 cases have it"
    ]


def test_a_run_stopped_before_its_first_step_has_nothing_to_resume(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cases, "cached_case", stop)
    result = call(*train_command(phantoms, tmp_path / "run", SETTINGS))
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "stopped; no step was saved; repeat the command"
    assert not (tmp_path / "run").exists()
