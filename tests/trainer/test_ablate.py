from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from attnseg import Bundle
from attnseg.data.labelled import find_labelled_cases
from attnseg.data.task import BRATS
from attnseg.runtime.case.volume import Volume
from attnseg.runtime.engines.base import EngineInfo
from attnseg.runtime.errors import TrainingError
from attnseg.synthetic import make_case, write_case
from attnseg.trainer import ablate as module
from attnseg.trainer.ablate import ablate
from attnseg.trainer.checkpoint import checkpoint_config, load_checkpoint
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.data_set import DataSet
from attnseg.trainer.model import NetworkConfig
from attnseg.trainer.variants import ABLATION, variant_network

TINY = TrainConfig(
    network=NetworkConfig(widths=(2, 4), bottleneck=4),
    patch=16,
    epochs=1,
    steps_per_epoch=1,
    precision="fp32",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    folder = tmp_path_factory.mktemp("cases")
    for seed in (1, 2):
        write_case(make_case(seed, (40, 44, 36)), folder, f"case{seed}")
    split = {"train": ["case1"], "validation": ["case2"]}
    return DataSet("phantoms", BRATS, find_labelled_cases(folder).cases, split)


@contextmanager
def open_empty(_: Path) -> Iterator[SimpleNamespace]:
    """A model that finds nothing."""
    yield SimpleNamespace(
        bundle=Bundle.default(),
        engine=EngineInfo("fake", "1", "fp32", "cpu"),
        plan=SimpleNamespace(settings=dict),
        segment=lambda volume: SimpleNamespace(labels=empty(volume), warnings=()),
    )


def empty(volume: Volume) -> np.ndarray:
    return np.zeros(volume.shape, np.uint8)


def test_a_folder_with_other_files_is_refused(data: DataSet, tmp_path: Path) -> None:
    (tmp_path / "baseline").mkdir()
    (tmp_path / "scans").mkdir()
    with pytest.raises(TrainingError, match="is not empty, and scans in it is of no run"):
        ablate(data, TINY, tmp_path, open_empty)


def test_the_four_rows_switch_attention_and_multi_scale() -> None:
    networks = {n: variant_network(NetworkConfig(), v) for n, v in ABLATION.items()}
    assert {n: (c.attention, c.multi_scale) for n, c in networks.items()} == {
        "baseline": ("none", False),
        "attention": ("gap", False),
        "multi-scale": ("none", True),
        "both": ("gap", True),
    }


def test_each_row_is_trained_and_evaluated_and_stands_in_the_table(
    data: DataSet, tmp_path: Path
) -> None:
    text = ablate(data, TINY, tmp_path, open_empty)
    assert (tmp_path / "ablation.md").read_text() == text
    for name, variant in ABLATION.items():
        state = load_checkpoint(tmp_path / name / "best.pt")
        assert checkpoint_config(state).network == variant_network(TINY.network, variant)
        assert (tmp_path / name / "evaluation" / "cases.csv").exists()
        assert f"| {name} |" in text
    assert "(3.6) |" in text
    assert "| 0.000 / 0.000 / 0.000 | 373.1 / 373.1 / 373.1 |" in text


def test_an_ablation_that_was_stopped_goes_on_where_it_was(
    data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    real = module.train

    def stop_at_the_third(data, config, run, stored, **options):
        if len(trained) == 2 and run.name == "multi-scale":
            trained.append("stopped")
            raise KeyboardInterrupt
        if stored is None:
            trained.append(run.name)
        return real(data, config, run, stored, **options)

    monkeypatch.setattr(module, "train", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        ablate(data, TINY, tmp_path, open_empty)
    assert not (tmp_path / "ablation.md").exists()
    ablate(data, TINY, tmp_path, open_empty)
    assert trained == ["baseline", "attention", "stopped", "multi-scale", "both"]


def test_other_settings_in_the_same_folder_are_refused(data: DataSet, tmp_path: Path) -> None:
    ablate(data, TINY, tmp_path, open_empty)
    with pytest.raises(TrainingError, match="baseline: was trained with other settings"):
        ablate(data, replace(TINY, learning_rate=1e-3), tmp_path, open_empty)


def test_an_ablation_of_nothing_is_refused(data: DataSet, tmp_path: Path) -> None:
    plain = replace(TINY, network=replace(TINY.network, attention="none"))
    with pytest.raises(TrainingError, match="the ablation needs attnresunet with attention"):
        ablate(data, plain, tmp_path, open_empty)
