from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnseg.export.checkpoint import load_trained
from attnseg.runtime.errors import TrainingError
from attnseg.synthetic import make_case, write_case
from attnseg.trainer import loop
from attnseg.trainer.checkpoint import (
    checkpoint_weights,
    load_checkpoint,
    run_split,
    save_checkpoint,
)
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.data import DataSet, find_labelled_cases, open_data_set
from attnseg.trainer.loop import train
from attnseg.trainer.model import AttentionResNetUNet, NetworkConfig

TINY = TrainConfig(
    network=NetworkConfig(widths=(8, 16), bottleneck=16),
    patch=32,
    epochs=3,
    steps_per_epoch=2,
    learning_rate=1e-3,
    precision="fp32",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    folder = tmp_path_factory.mktemp("cases")
    for seed in (11, 12, 13):
        write_case(make_case(seed, (64, 72, 56)), folder, f"case{seed}")
    split = {"train": ["case11", "case12"], "validation": ["case13"]}
    return DataSet("phantoms", find_labelled_cases(folder).cases, split)


def log_rows(output: Path) -> list[dict[str, str]]:
    with (output / "log.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        del row["seconds"]
    return rows


class InterruptedRunError(Exception):
    pass


@pytest.mark.parametrize(
    "config",
    [TINY, replace(TINY, schedule="cosine", ema_decay=0.9, mirror=True)],
    ids=["plateau", "cosine, average, mirror"],
)
@pytest.mark.parametrize("finished", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(
    data: DataSet,
    tmp_path: Path,
    config: TrainConfig,
    finished: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(data, config, tmp_path / "whole")

    real_epoch, calls = loop._train_epoch, []

    def stop_later(*args):
        calls.append(None)
        if len(calls) > finished:
            raise InterruptedRunError
        return real_epoch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_train_epoch", stop_later)
        with pytest.raises(InterruptedRunError):
            train(data, config, tmp_path / "parts")
    train(data, config, tmp_path / "parts", resume=True)

    assert log_rows(tmp_path / "parts") == log_rows(tmp_path / "whole")
    whole, parts = (load_checkpoint(tmp_path / n / "last.pt") for n in ("whole", "parts"))
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name


def test_the_network_learns_the_phantoms(data: DataSet, tmp_path: Path) -> None:
    config = replace(TINY, epochs=4, steps_per_epoch=15, learning_rate=3e-3)
    best = train(data, config, tmp_path)
    rows = log_rows(tmp_path)
    assert len(rows) == 4
    assert float(rows[-1]["train_loss"]) < 0.7 * float(rows[0]["train_loss"])
    assert load_checkpoint(best)["validation"]["WT"] > 0.6


def test_the_best_checkpoint_is_the_epoch_of_highest_mean_dice(
    data: DataSet, tmp_path: Path
) -> None:
    best = load_checkpoint(train(data, TINY, tmp_path))
    means = [
        sum(float(row[f"validation_{region}"]) for region in ("WT", "TC", "ET")) / 3
        for row in log_rows(tmp_path)
    ]
    assert best["epoch"] == 1 + means.index(max(means))
    assert best["best"] == pytest.approx(max(means), abs=1e-4)
    assert best["split"] == data.split
    assert best["data"] == "phantoms"


def test_a_folder_with_a_run_is_not_trained_over(data: DataSet, tmp_path: Path) -> None:
    train(data, replace(TINY, epochs=1), tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(TrainingError, match="holds a run already; add --resume"):
        train(data, TINY, tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_resume_needs_a_checkpoint(data: DataSet, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"last\.pt: does not exist, so there is no run"):
        train(data, TINY, tmp_path, resume=True)


def test_a_loss_that_is_not_finite_stops_and_names_the_cases(data: DataSet, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss became (nan|inf) on patches of case1"):
        train(data, replace(TINY, learning_rate=1e30, steps_per_epoch=20), tmp_path)


def test_phantoms_are_mixed_into_training(data: DataSet, tmp_path: Path) -> None:
    config = replace(TINY, epochs=1, steps_per_epoch=1, synthetic_cases=1)
    train(data, config, tmp_path)
    assert list((tmp_path / "cache").glob("synthetic-1000-*"))


def test_a_run_that_stops_while_saving_resumes_to_the_same_end(
    data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TINY, epochs=2, steps_per_epoch=1)
    train(data, config, tmp_path / "whole")
    real_save = loop.save_checkpoint

    def stop(path: Path, state: dict[str, object]) -> None:
        if state["epoch"] == 2 and path.name == "last.pt":
            raise InterruptedRunError
        real_save(path, state)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", stop)
        with pytest.raises(InterruptedRunError):
            train(data, config, tmp_path / "parts")
    best = train(data, config, tmp_path / "parts", resume=True)
    assert best.exists()
    assert log_rows(tmp_path / "parts") == log_rows(tmp_path / "whole")


def test_a_checkpoint_tells_the_scores_of_its_own_epoch(data: DataSet, tmp_path: Path) -> None:
    train(data, TINY, tmp_path)
    last, rows = load_checkpoint(tmp_path / "last.pt"), log_rows(tmp_path)
    assert last["validation"]["WT"] == pytest.approx(float(rows[-1]["validation_WT"]), abs=1e-4)


def test_a_checkpoint_that_cannot_be_written_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises(TrainingError, match="could not be written"):
        save_checkpoint(tmp_path / "gone" / "last.pt", {"epoch": 2})
    assert load_checkpoint(path)["epoch"] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["last.pt"]


def test_checkpoints_are_read_as_data_only(tmp_path: Path) -> None:
    class Exploit:
        def __reduce__(self):
            return (print, ("executed",))

    path = tmp_path / "evil.pt"
    torch.save({"format": "attnseg-checkpoint-1", "x": Exploit()}, path)
    with pytest.raises(TrainingError, match="is damaged or not a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04"])
def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=r"x\.pt: is damaged or not a checkpoint"):
        load_checkpoint(path)
    torch.save({"other": 1}, path)
    with pytest.raises(TrainingError, match=r"x\.pt: is not a checkpoint of attnseg"):
        load_checkpoint(path)


def test_the_average_of_the_weights_by_hand(data: DataSet, tmp_path: Path) -> None:
    # After step n the decay is min(0.9, (1 + n) / (10 + n)): 2/11 after the first step.
    config = replace(TINY, epochs=1, steps_per_epoch=1, ema_decay=0.9, learning_rate=0.1)
    state = load_checkpoint(train(data, config, tmp_path))
    torch.manual_seed(config.seed)
    initial = AttentionResNetUNet(config.network).state_dict()
    name = "head.weight"
    expected = 2 / 11 * initial[name] + 9 / 11 * state["model"][name]
    assert not torch.equal(initial[name], state["model"][name])
    torch.testing.assert_close(state["average"][name], expected)
    assert checkpoint_weights(state) is state["average"]


def test_the_cosine_schedule_by_hand(data: DataSet, tmp_path: Path) -> None:
    config = replace(TINY, epochs=4, steps_per_epoch=1, schedule="cosine", learning_rate=1.0e-3)
    train(data, config, tmp_path)
    rates = [float(row["learning_rate"]) for row in log_rows(tmp_path)]
    assert rates == pytest.approx([0.85355e-3, 0.5e-3, 0.14645e-3, 0], rel=1e-4)


def test_the_plateau_schedule_halves_after_its_patience(
    data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {"loss": 1.0, "WT": 0.5, "TC": 0.5, "ET": 0.5}
    monkeypatch.setattr(loop, "validate", lambda *_: scores)
    config = replace(TINY, epochs=5, steps_per_epoch=1, patience=1, factor=0.5)
    train(data, config, tmp_path)
    rates = [float(row["learning_rate"]) for row in log_rows(tmp_path)]
    # The first epoch sets the mark; two without a better one are one more than the patience.
    assert rates == [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4]


def test_bf16_training_is_not_fp32_training(data: DataSet, tmp_path: Path) -> None:
    config = replace(TINY, epochs=1, steps_per_epoch=1)
    exact, mixed = (
        load_checkpoint(train(data, replace(config, precision=p), tmp_path / p))["model"]
        for p in ("fp32", "bf16")
    )
    assert not torch.equal(exact["head.weight"], mixed["head.weight"])
    torch.testing.assert_close(exact["head.weight"], mixed["head.weight"], atol=5e-3, rtol=0)


def test_a_run_with_a_split_resumes_beside_unlabelled_cases(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_case(make_case(11, (64, 72, 56)), tmp_path / "data", name, truth=name != "c")
    split = {"train": ["a"], "validation": ["b"]}
    config = replace(TINY, epochs=1, steps_per_epoch=1)
    train(open_data_set(tmp_path / "data", split, config), config, tmp_path / "run")
    stored = run_split(tmp_path / "run")
    assert stored == split
    data = open_data_set(tmp_path / "data", stored, TrainConfig())
    assert train(data, TrainConfig(), tmp_path / "run", resume=True).exists()


def test_an_exported_average_is_what_was_validated(data: DataSet, tmp_path: Path) -> None:
    config = replace(TINY, epochs=1, ema_decay=0.9)
    best = train(data, config, tmp_path)
    state, model = load_checkpoint(best), load_trained(best)
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, state["average"][name].reshape(value.shape)), name
    assert model.normalisation.landmarks is not None
    assert model.validation.dice["WT"] == pytest.approx(state["validation"]["WT"], abs=1e-4)
    assert model.training.train_cases == ("case11", "case12")
