from __future__ import annotations

import errno
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from attnseg.data.labelled import find_labelled_cases
from attnseg.export.source.checkpoint import encode_weights, load_trained
from attnseg.runtime.errors import TrainingError
from attnseg.runtime.steps.resample import Grid
from attnseg.synthetic import make_case, write_case
from attnseg.trainer import logs, loop
from attnseg.trainer.checkpoint import (
    checkpoint_config,
    checkpoint_preparation,
    checkpoint_weights,
    load_checkpoint,
    load_run,
    save_checkpoint,
)
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.data_set import DataSet, open_data_set
from attnseg.trainer.devices import Devices
from attnseg.trainer.loop import train
from attnseg.trainer.model import MODELS, NetworkConfig
from attnseg.trainer.networks import build_network
from attnseg.trainer.run import new_run
from attnseg.trainer.start import start_run
from tests.trainer.conftest import (
    SCORES,
    SETTINGS,
    TINY,
    assert_same_end,
    call,
    log_rows,
    train_command,
)

EVERYTHING = {
    **SETTINGS,
    "schedule": "cosine",
    "ema_decay": "0.9",
    "mirror": "true",
    "clip_norm": "0.5",
}
ONE_STEP = replace(TINY, epochs=1, steps_per_epoch=1)


class Whole:
    """A run that nothing interrupted, and the settings that it was made with."""

    def __init__(self, settings: dict[str, str], data: DataSet, output: Path) -> None:
        self.settings = settings
        self.config = TrainConfig().with_settings(settings)
        self.output = output
        train(data, self.config, output)


@pytest.fixture(
    scope="module", params=[SETTINGS, EVERYTHING], ids=["plateau", "cosine, average, mirror, clip"]
)
def whole(
    request: pytest.FixtureRequest, data: DataSet, tmp_path_factory: pytest.TempPathFactory
) -> Whole:
    return Whole(request.param, data, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def plain(data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(SETTINGS, data, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def averaged(data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(ONE_STEP, ema_decay=0.9)
    return train(data, config, tmp_path_factory.mktemp("averaged"))


@pytest.fixture
def no_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validations cost more than steps; for tests that they do not matter to."""
    monkeypatch.setattr(loop, "validate", lambda *_, **__: SCORES)


def act_at(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int, action: Callable[[], object]
) -> None:
    """Do something at the given call of a function of the loop."""
    real, calls = getattr(loop, name), []

    def wrapped(*args: Any, **named: Any) -> Any:
        calls.append(None)
        if len(calls) == number:
            action()
        return real(*args, **named)

    monkeypatch.setattr(loop, name, wrapped)


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: signal.raise_signal(number)


class StoppedError(Exception):
    pass


def stop() -> None:
    raise StoppedError


@pytest.mark.parametrize("finished", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(
    whole: Whole, data: DataSet, tmp_path: Path, finished: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        act_at(patch, "_train_epoch", finished + 1, stop)
        with pytest.raises(StoppedError):
            train(data, whole.config, tmp_path)
    assert load_checkpoint(tmp_path / "last.pt")["epoch"] == finished
    train(data, whole.config, tmp_path, load_run(tmp_path))
    assert_same_end(tmp_path, whole.output)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_an_epoch_saves_the_steps_done_and_resumes_to_the_same_end(
    whole: Whole,
    phantoms: Path,
    tmp_path: Path,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        act_at(patch, "augment", 5, send(number))
        result = call(*train_command(phantoms, tmp_path, whole.settings))
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "stopped; repeat the command with --resume to continue"
    state = load_checkpoint(tmp_path / "last.pt")
    assert (state["epoch"], len(state["losses"])) == (1, 2)
    assert len(log_rows(tmp_path)) == 1
    result = call("train", f"--data={phantoms}", f"--output={tmp_path}", "--resume")
    assert result.exit_code == 0, result.output
    assert_same_end(tmp_path, whole.output)


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_stopped_in_its_first_epoch_resumes_to_the_same_end(
    plain: Whole, data: DataSet, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A signal in the last step of an epoch leaves its validation to the run that goes on.
    with monkeypatch.context() as patch:
        act_at(patch, "augment", step, send(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(data, plain.config, tmp_path)
    state = load_checkpoint(tmp_path / "last.pt")
    assert (state["epoch"], len(state["losses"])) == (0, step)
    assert state["validation"] is None
    train(data, plain.config, tmp_path, load_run(tmp_path))
    assert_same_end(tmp_path, plain.output)


def test_a_run_stopped_while_validating_resumes_to_the_same_end(
    plain: Whole, data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        act_at(patch, "validate", 2, send(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(data, plain.config, tmp_path)
    state = load_checkpoint(tmp_path / "last.pt")
    assert (state["epoch"], len(state["losses"])) == (1, 3)  # its steps need not be done again
    train(data, plain.config, tmp_path, load_run(tmp_path))
    assert_same_end(tmp_path, plain.output)


def test_a_signal_at_the_end_of_a_validation_stops_after_the_epoch(
    data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_validation: None
) -> None:
    before = signal.getsignal(signal.SIGINT)
    config = replace(TINY, epochs=2, steps_per_epoch=1)
    act_at(monkeypatch, "validate", 1, send(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(data, config, tmp_path)
    assert load_checkpoint(tmp_path / "last.pt")["epoch"] == 1
    assert signal.getsignal(signal.SIGINT) is before
    act_at(monkeypatch, "validate", 1, send(signal.SIGINT))  # of the last epoch: nothing is left
    assert train(data, config, tmp_path, load_run(tmp_path)).exists()
    assert load_checkpoint(tmp_path / "last.pt")["epoch"] == 2


def test_a_run_killed_at_any_moment_resumes_to_the_same_end(
    plain: Whole, data: DataSet, phantoms: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "attnseg", *train_command(phantoms, tmp_path, plain.settings)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while not (tmp_path / "last.pt").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))
        process.kill()
    train(data, plain.config, tmp_path, load_run(tmp_path))
    assert_same_end(tmp_path, plain.output)


def test_a_run_that_stops_while_saving_resumes_to_the_same_end(
    plain: Whole, data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(path: Path, state: dict[str, Any]) -> None:
        if state["epoch"] == 2 and path.name == "last.pt":
            raise StoppedError
        save_checkpoint(path, state)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save)
        with pytest.raises(StoppedError):
            train(data, plain.config, tmp_path)
    assert len(log_rows(tmp_path)) == 2
    train(data, plain.config, tmp_path, load_run(tmp_path))
    assert_same_end(tmp_path, plain.output)


def test_a_full_disk_while_saving_keeps_the_old_checkpoint_and_gives_one_line(
    plain: Whole, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.save

    def full(state: dict[str, Any], stream: BinaryIO) -> None:
        if state["epoch"] == 2:
            stream.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(state, stream)

    def full_too(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        patch.setattr(logs, "draw_curves", full_too)
        result = call(*train_command(phantoms, tmp_path, plain.settings))
    assert result.exit_code == 1
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("error:")]
    assert "No space left on device" in line
    assert line.endswith("free some space, then give --resume")
    assert result.stderr.endswith(f"{line}\n")
    assert load_checkpoint(tmp_path / "last.pt")["epoch"] == 1
    assert not list(tmp_path.glob("*.part"))
    assert call("train", f"--data={phantoms}", f"-o{tmp_path}", "--resume").exit_code == 0
    assert_same_end(tmp_path, plain.output)


def test_a_log_that_cannot_be_written_says_what_to_do(
    data: DataSet, tmp_path: Path, no_validation: None
) -> None:
    (tmp_path / "tensorboard").write_bytes(b"not a folder")
    with pytest.raises(
        TrainingError, match=r"could not be written to .* give resume=True"
    ) as caught:
        train(data, ONE_STEP, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_run_that_starts_anew_before_its_first_checkpoint_has_a_new_log(
    data: DataSet, tmp_path: Path, no_validation: None
) -> None:
    (tmp_path / "log.csv").write_text("epoch,train_loss,seconds\n1,0.5,1\n")
    train(data, ONE_STEP, tmp_path)
    (row,) = log_rows(tmp_path)
    assert row["validation_WT"] == "0.5"


def test_a_resumed_run_keeps_its_own_configuration_split_and_weights(
    plain: Whole, averaged: Path, data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        act_at(patch, "_train_epoch", 3, stop)
        with pytest.raises(StoppedError):
            train(data, plain.config, tmp_path)
    other = data.with_split({"train": ["case13"], "validation": ["case11"]})
    config = replace(TINY, learning_rate=9, epochs=99)
    train(other, config, tmp_path, load_run(tmp_path), initial=averaged)
    assert_same_end(tmp_path, plain.output)


def test_a_resumed_run_reads_its_checkpoint_once(
    plain: Whole, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def load(file: Any, *args: Any, **options: Any) -> Any:
        read.append(Path(file).name)
        return torch_load(file, *args, **options)

    torch_load = torch.load
    monkeypatch.setattr(torch, "load", load)
    assert start_run(phantoms, plain.output, resume=True) == plain.output / "best.pt"
    assert read == ["last.pt"]


def test_another_number_of_processes_cannot_resume_a_run(plain: Whole, data: DataSet) -> None:
    file = plain.output / "last.pt"
    stored = file.read_bytes()
    state = load_checkpoint(file)
    try:
        save_checkpoint(file, {**state, "random": state["random"] * 2})
        message = r"was trained by 2 processes, not 1; resume it with the same number"
        with pytest.raises(TrainingError, match=message):
            train(data, plain.config, plain.output, load_run(plain.output))
    finally:
        file.write_bytes(stored)


def changed_moment(state: dict[str, Any]) -> None:
    state["optimiser"]["state"][0]["exp_avg"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.pop("optimiser"), "KeyError: 'optimiser'"),
        (lambda s: s.update(optimiser={}), "KeyError: 'param_groups'"),
        (lambda s: s["optimiser"].update(param_groups=[]), "ValueError: not enough values"),
        (lambda s: s["optimiser"]["param_groups"][0].update(lr=None), "TypeError: float"),
        (lambda s: s["optimiser"].update(state={0: None}), "TypeError: 'NoneType'"),
        (lambda s: s["optimiser"].update(state={999: {}}), "KeyError: 'exp_avg'"),
        (changed_moment, r"ValueError: exp_avg of parameter 0 is \(3,\)"),
        (lambda s: s["scheduler"].update(best="low"), "TypeError: best is 'low'"),
        (lambda s: s["scheduler"].update(_last_lr=3), "TypeError: _last_lr is 3"),
        (lambda s: s.update(random=[None]), "TypeError: cannot unpack"),
        (lambda s: s.update(random=[({"bit_generator": 3}, None)]), "Error: "),
        (lambda s: s["model"].popitem(), "RuntimeError: .*Missing key"),
    ],
)
def test_a_state_that_cannot_be_resumed_is_one_clear_error(
    plain: Whole, data: DataSet, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    file = plain.output / "last.pt"
    stored = file.read_bytes()
    state = load_checkpoint(file)
    change(state)
    try:
        save_checkpoint(file, state)
        message = rf"last\.pt: does not fit its own configuration \(.*{reason}"
        with pytest.raises(TrainingError, match=message) as caught:
            train(data, plain.config, plain.output, load_run(plain.output))
    finally:
        file.write_bytes(stored)
    assert "\n" not in str(caught.value)


def test_only_the_progress_of_optimiser_and_scheduler_is_taken_from_a_checkpoint(
    plain: Whole, data: DataSet
) -> None:
    """Their settings, and names that are no settings, are those of the configuration."""
    state = load_checkpoint(plain.output / "last.pt")
    state["optimiser"]["param_groups"][0] |= {"betas": "none", "lr": 0.125}
    state["scheduler"] |= {"step": 3, "num_bad_epochs": 2}
    preparation, devices = checkpoint_preparation(state), Devices(torch.device("cpu"))
    run = new_run(checkpoint_config(state), data, preparation, devices, steps=3)
    run.restore(state)
    assert run.optimiser.param_groups[0]["betas"] == (0.9, 0.999)
    assert run.optimiser.param_groups[0]["lr"] == 0.125
    assert run.scheduler.num_bad_epochs == 2
    assert callable(run.scheduler.step)


def test_a_finished_run_has_nothing_to_resume(plain: Whole, data: DataSet) -> None:
    before = (plain.output / "last.pt").read_bytes()
    assert (
        train(data, plain.config, plain.output, load_run(plain.output)) == plain.output / "best.pt"
    )
    assert (plain.output / "last.pt").read_bytes() == before


def test_the_network_learns_the_phantoms(data: DataSet, tmp_path: Path) -> None:
    network = NetworkConfig(widths=(8, 16), bottleneck=16, multi_scale=False)
    config = replace(TINY, network=network, epochs=2, steps_per_epoch=20, learning_rate=5e-3)
    config = replace(config, schedule="cosine")
    best = train(data, config, tmp_path)
    rows = log_rows(tmp_path)
    assert len(rows) == 2
    assert float(rows[-1]["train_loss"]) < 0.8 * float(rows[0]["train_loss"])
    assert load_checkpoint(best)["validation"]["WT"] > 0.6


def test_the_best_checkpoint_is_the_epoch_of_highest_mean_dice(plain: Whole, data: DataSet) -> None:
    best = load_checkpoint(plain.output / "best.pt")
    means = [
        sum(float(row[f"validation_{region}"]) for region in ("WT", "TC", "ET")) / 3
        for row in log_rows(plain.output)
    ]
    assert best["epoch"] == 1 + means.index(max(means))
    assert best["best"] == pytest.approx(max(means), abs=1e-4)
    assert best["split"] == data.split
    assert best["data"] == "phantoms"


def test_the_log_is_drawn_and_told_to_tensorboard(plain: Whole) -> None:
    rows = log_rows(plain.output)
    with Image.open(plain.output / "curves.png") as image:
        assert image.format == "PNG"
    events = EventAccumulator(str(plain.output / "tensorboard"))
    events.Reload()
    for tag, field in (
        ("train/loss", "train_loss"),
        ("validation/loss", "validation_loss"),
        ("validation/WT", "validation_WT"),
        ("learning/rate", "learning_rate"),
    ):
        told = [(e.step, e.value) for e in events.Scalars(tag)]
        logged = [(int(row["epoch"]), float(row[field])) for row in rows]
        assert [step for step, _ in told] == [1, 2, 3]
        assert [v for _, v in told] == pytest.approx([v for _, v in logged], rel=1e-6)


def test_a_folder_with_a_run_is_not_trained_over(plain: Whole, data: DataSet) -> None:
    before = (plain.output / "last.pt").read_bytes()
    with pytest.raises(TrainingError, match="holds a run already; give resume=True"):
        train(data, TINY, plain.output)
    assert (plain.output / "last.pt").read_bytes() == before


def test_a_folder_with_other_files_is_not_trained_into(data: DataSet, tmp_path: Path) -> None:
    for name in ("cache", ".DS_Store", "thesis.tex"):  # the first two are allowed
        (tmp_path / name).write_text("")
    with pytest.raises(TrainingError, match=r"is not empty, and thesis\.tex in it is of no run"):
        train(data, TINY, tmp_path)


def test_a_best_checkpoint_alone_is_not_trained_over(data: DataSet, tmp_path: Path) -> None:
    (tmp_path / "best.pt").write_bytes(b"dear")
    with pytest.raises(TrainingError, match="holds a run already"):
        train(data, ONE_STEP, tmp_path)
    assert (tmp_path / "best.pt").read_bytes() == b"dear"


def test_two_processes_do_not_train_in_one_folder(data: DataSet, tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(TrainingError, match="is being trained by another process; wait for it"),
    ):
        train(data, ONE_STEP, tmp_path)
    train(data, ONE_STEP, tmp_path)
    assert not (tmp_path / ".lock").exists()


def test_a_run_that_cannot_begin_leaves_no_folder(phantoms: Path, tmp_path: Path) -> None:
    broken = tmp_path / "data"
    shutil.copytree(phantoms, broken)
    label = next(broken.rglob("*_seg.nii.gz"))
    image = nib.load(label)
    nib.save(nib.Nifti1Image(np.full(image.shape, 9, np.uint8), image.affine), label)
    names = sorted(folder.name for folder in broken.iterdir())
    split = {"train": names[1:], "validation": names[:1]}
    with pytest.raises(TrainingError, match="holds labels"):
        train(open_data_set(broken, split, ONE_STEP), ONE_STEP, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_says_what_it_is_about_to_do(
    data: DataSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="attnseg"):
        train(data, ONE_STEP, tmp_path)
        train(data, ONE_STEP, tmp_path, load_run(tmp_path))
    first, *_, last = [m for m in caplog.messages if "training and" in m]
    cases = r"\d+ training and \d+ validation cases, 0\.\d\d M parameters"
    assert re.fullmatch(rf"{cases}, .*: 1 epochs of 1 steps", first)
    assert last.endswith("all 1 epochs are done; to train on, start a new run from best.pt")


def test_resume_needs_a_checkpoint(data: DataSet, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"last\.pt: does not exist, so there is no run"):
        train(data, TINY, tmp_path, load_run(tmp_path))


def test_a_loss_that_is_not_finite_stops_and_names_the_cases(data: DataSet, tmp_path: Path) -> None:
    message = r"the loss became (nan|inf) on patches of case1\d.*; lower the learning rate"
    with pytest.raises(TrainingError, match=message):
        train(data, replace(TINY, learning_rate=1e30, steps_per_epoch=20), tmp_path)


def test_a_bad_label_file_of_any_part_is_found_before_the_first_step(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        write_case(make_case(11, (64, 72, 56)), tmp_path / "cases", name)
    cases = find_labelled_cases(tmp_path / "cases").cases
    image = nib.load(cases["b"].label)
    nib.save(nib.Nifti1Image(np.full(image.shape, 9, np.uint8), image.affine), cases["b"].label)
    split = {"train": ["a"], "validation": ["b"]}
    act_at(monkeypatch, "_train_step", 1, stop)
    with pytest.raises(TrainingError, match=r"b_seg\.nii\.gz: holds labels \[9\]"):
        train(open_data_set(tmp_path / "cases", split, TINY), TINY, tmp_path / "run")


def test_phantoms_are_mixed_into_training(
    data: DataSet, tmp_path: Path, no_validation: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnseg.trainer.data.make_case", lambda s: make_case(s, (64, 72, 56)))
    train(data, replace(ONE_STEP, synthetic_cases=1), tmp_path)
    assert list((tmp_path / "cache").glob("synthetic-1000-*"))


def test_a_checkpoint_tells_the_scores_of_its_own_epoch(plain: Whole) -> None:
    last, rows = load_checkpoint(plain.output / "last.pt"), log_rows(plain.output)
    assert last["validation"]["WT"] == pytest.approx(float(rows[-1]["validation_WT"]), abs=1e-4)


def test_the_average_of_the_weights_by_hand(
    data: DataSet, tmp_path: Path, no_validation: None
) -> None:
    # After step n the decay is min(0.9, (1 + n) / (10 + n)): 2/11 after the first step.
    config = replace(ONE_STEP, ema_decay=0.9, learning_rate=0.1)
    state = load_checkpoint(train(data, config, tmp_path))
    torch.manual_seed(config.seed)
    initial = build_network(config.network).state_dict()
    name = "head.weight"
    expected = 2 / 11 * initial[name] + 9 / 11 * state["model"][name]
    assert not torch.equal(initial[name], state["model"][name])
    torch.testing.assert_close(state["average"][name], expected)
    assert checkpoint_weights(state) is state["average"]


def test_the_cosine_schedule_by_hand(data: DataSet, tmp_path: Path, no_validation: None) -> None:
    config = replace(TINY, epochs=2, steps_per_epoch=2, schedule="cosine", learning_rate=1e-3)
    train(data, config, tmp_path)
    rates = [float(row["learning_rate"]) for row in log_rows(tmp_path)]
    # The last steps of the two epochs are the second and fourth of four, numbers 1 and 3.
    expected = [1e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in (1, 3)]
    assert rates == pytest.approx(expected, rel=1e-6)
    assert rates == pytest.approx([0.853553e-3, 0.146447e-3], rel=1e-4)


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_the_plateau_schedule_halves_after_its_patience_resumed_or_not(
    data: DataSet,
    tmp_path: Path,
    no_validation: None,
    finished: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(TINY, epochs=5, steps_per_epoch=1, patience=1, factor=0.5)
    if finished:
        with monkeypatch.context() as patch:
            act_at(patch, "_train_epoch", finished + 1, stop)
            with pytest.raises(StoppedError):
                train(data, config, tmp_path)
    train(data, config, tmp_path, load_run(tmp_path) if finished else None)
    rates = [float(row["learning_rate"]) for row in log_rows(tmp_path)]
    # The first epoch sets the mark; two without a better one are one more than the patience.
    assert rates == [1e-3, 1e-3, 1e-3, 5e-4, 5e-4]


def test_bf16_training_is_not_fp32_training(
    data: DataSet, tmp_path: Path, no_validation: None
) -> None:
    config = replace(TINY, epochs=1, steps_per_epoch=3)
    exact, mixed = (
        load_checkpoint(train(data, replace(config, precision=p), tmp_path / p))["model"]
        for p in ("fp32", "bf16")
    )
    assert not torch.equal(exact["head.weight"], mixed["head.weight"])
    torch.testing.assert_close(exact["head.weight"], mixed["head.weight"], atol=5e-3, rtol=0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_gradient_is_scaled_down_to_the_norm_asked_for(
    data: DataSet, tmp_path: Path, no_validation: None, precision: str
) -> None:
    # After one step Adam's first moment is a tenth of the gradient.
    config = replace(ONE_STEP, precision=precision, clip_norm=0.01, weight_decay=0)
    state = load_checkpoint(train(data, config, tmp_path))
    moments = [m["exp_avg"] for m in state["optimiser"]["state"].values()]
    norm = math.sqrt(sum(float((m.double() ** 2).sum()) for m in moments))
    assert norm == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_fp16_training_keeps_finite_losses_and_its_gradient_scale(
    data: DataSet, tmp_path: Path, no_validation: None
) -> None:
    config = replace(ONE_STEP, precision="fp16", clip_norm=1.0, steps_per_epoch=2, batch_size=1)
    state = load_checkpoint(train(data, config, tmp_path))
    assert all(math.isfinite(float(row["train_loss"])) for row in log_rows(tmp_path))
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    assert state["scaler"]["scale"] > 0


@pytest.mark.parametrize("model", ["attnresunet", "unet3d"])
def test_bf16_on_a_cpu_refuses_patches_that_leave_two_voxels(
    data: DataSet, tmp_path: Path, model: str
) -> None:
    network = replace(MODELS[model], widths=(4, 8), bottleneck=8)
    config = replace(TINY, network=network, patch=8, precision="bf16")
    message = "patches of 8 leave 2 voxels at the bottom .* give precision=.fp32. or a larger patch"
    with pytest.raises(TrainingError, match=message):
        train(data, config, tmp_path)
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize(
    "change",
    [{"precision": "fp32"}, {"patch": 12}, {"network": MODELS["deepmedic"]}],
    ids=["fp32", "patch 12", "deepmedic"],
)
def test_other_small_patches_are_trained_on(
    data: DataSet, tmp_path: Path, no_validation: None, change: dict[str, Any]
) -> None:
    config = replace(ONE_STEP, patch=8, precision="fp32")
    config = replace(config, **{"precision": "bf16", **change})
    assert train(data, config, tmp_path).exists()


@pytest.mark.parametrize("name", ["best.pt", "weights.safetensors"])
def test_a_run_starts_from_the_weights_it_is_given(
    averaged: Path, data: DataSet, tmp_path: Path, no_validation: None, name: str
) -> None:
    initial = averaged
    if name != "best.pt":
        initial = tmp_path / name
        initial.write_bytes(encode_weights(load_trained(averaged)))
    config = replace(ONE_STEP, learning_rate=1e-12, ema_decay=0.9, seed=5)
    state = load_checkpoint(train(data, config, tmp_path / "run", initial=initial))
    given = checkpoint_weights(load_checkpoint(averaged))
    for parameter, _ in build_network(config.network).named_parameters():
        for weights in (state["model"], state["average"]):
            torch.testing.assert_close(weights[parameter], given[parameter], atol=1e-7, rtol=1e-6)


def test_weights_of_another_architecture_are_refused_in_one_line(
    averaged: Path, phantoms: Path, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "widths": "4,16"}
    result = call(*train_command(phantoms, tmp_path, settings), f"--init={averaged}")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {averaged}: is of another architecture than this run's")
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize(
    ("change", "grid", "shape"),
    [
        ({"resize": (48, 40, 40)}, Grid(shape=(48, 40, 40)), (48, 40, 40)),
        ({"spacing_mm": (2.0, 1.5, 1.0)}, Grid(spacing_mm=(2.0, 1.5, 1.0)), (32, 48, 56)),
    ],
    ids=["resize", "spacing"],
)
def test_a_run_on_a_grid_records_it_for_the_bundle(
    phantoms: Path,
    data: DataSet,
    tmp_path: Path,
    no_validation: None,
    change: dict[str, Any],
    grid: Grid,
    shape: tuple[int, int, int],
) -> None:
    config = replace(ONE_STEP, **change)
    best = train(open_data_set(phantoms, data.split, config), config, tmp_path)
    preparation = load_trained(best).preparation
    assert preparation.preprocessing.grid == grid
    assert preparation.task.spacing_mm == (grid.spacing_mm or (1, 1, 1))
    assert preparation.preprocessing.normalisation[0].percentile_count
    (image,) = tmp_path.glob("cache/case13-*-image.npy")
    box = np.load(image).shape[1:]
    assert all(n // 2 < inside <= n for inside, n in zip(box, shape, strict=True))


def test_a_run_with_a_split_resumes_beside_unlabelled_cases(
    tmp_path: Path, no_validation: None
) -> None:
    for name in ("a", "b", "c"):
        write_case(make_case(11, (64, 72, 56)), tmp_path / "data", name, truth=name != "c")
    split = {"train": ["a"], "validation": ["b"]}
    train(open_data_set(tmp_path / "data", split, ONE_STEP), ONE_STEP, tmp_path / "run")
    assert load_run(tmp_path / "run")["split"] == split
    assert start_run(tmp_path / "data", tmp_path / "run", resume=True).exists()


def test_an_exported_average_is_what_was_validated(averaged: Path) -> None:
    state, model = load_checkpoint(averaged), load_trained(averaged)
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, state["average"][name].reshape(value.shape)), name
    assert model.preparation.preprocessing.normalisation[0].percentile_count
    assert model.validation.dice["WT"] == pytest.approx(state["validation"]["WT"], abs=1e-4)
    assert model.training.train_cases == ("case11", "case12")
