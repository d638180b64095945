from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from attnseg.runtime.errors import ScanError, Setting, TrainingError
from attnseg.trainer.devices import Devices, open_devices
from tests.trainer.conftest import SETTINGS, assert_same_end, log_rows, train_command

TOGETHER = {**SETTINGS, "batch_size": "1", "epochs": "2", "ema_decay": "0.9"}

# What each of two processes does: train until one of them is interrupted in the second epoch,
# then resume. It tells the patches it saw, and a digest of its weights after each epoch.
PROCESS = """
import contextlib, faulthandler, hashlib, json, os, signal, sys, time
from pathlib import Path
from attnseg.trainer import loop
from attnseg.trainer.data_set import open_data_set
from attnseg.trainer.checkpoint import load_checkpoint, load_run
from attnseg.trainer.config import TrainConfig

faulthandler.dump_traceback_later(150)  # if they wait for each other, where
phantoms, output, settings, split, ports = sys.argv[1:]
rank, (first_port, second_port) = os.environ["RANK"], ports.split(",")
config = TrainConfig().with_settings(json.loads(settings))
data = open_data_set(Path(phantoms), json.loads(split), config)
told = {"drawn": [], "patches": [], "weights": []}
real_augment, real_finish = loop.augment, loop._finish_epoch

def augment(*args):
    told["drawn"].append(float(args[0].double().sum()))
    images, labels = real_augment(*args)
    told["patches"].append(float(images.double().sum()))
    if rank == "1" and len(told["patches"]) == 5:
        signal.raise_signal(signal.SIGINT)
    return images, labels

def digest(tensors):
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()

def finish(run, *rest):
    told["weights"].append(
        [digest(run.model.parameters()), digest(run.average.state_dict().values())]
    )
    return real_finish(run, *rest)

loop.augment, loop._finish_epoch = augment, finish
os.environ["MASTER_PORT"] = first_port
with contextlib.suppress(KeyboardInterrupt):
    loop.train(data, config, Path(output))
    raise SystemExit("was not interrupted")
saved = Path(output, "saved")  # by the first process, which the other does not wait for
if rank == "0":
    saved.touch()
while not saved.exists():
    time.sleep(0.01)
state = load_checkpoint(Path(output, "last.pt"))
told["stopped"] = [state["epoch"], len(state["losses"])]
os.environ["MASTER_PORT"] = second_port
loop.train(data, config, Path(output), load_run(Path(output)))
Path(output, f"rank{rank}.json").write_text(json.dumps(told))
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def run_two(phantoms: Path, output: Path) -> list[dict[str, Any]]:
    """What the two processes tell."""
    split = (phantoms.parent / "split.json").read_text()
    ports = ",".join(str(port) for port in free_ports(2))
    command = [sys.executable, "-c", PROCESS, phantoms, output, json.dumps(TOGETHER), split, ports]
    # One thread each, as torchrun has it: other numbers of threads round otherwise.
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        until = time.monotonic() + 200
        while time.monotonic() < until and None in (codes := [p.poll() for p in processes]):
            if any(codes):  # the other would wait forever
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
    errors = [process.communicate()[1] for process in processes]
    assert [p.returncode for p in processes] == [0, 0], errors
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def parts(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def told(phantoms: Path, parts: Path) -> list[dict[str, Any]]:
    return run_two(phantoms, parts)


def test_two_processes_have_the_same_weights_from_different_patches(
    told: list[dict[str, Any]],
) -> None:
    first, second = told
    assert len(first["weights"]) == 2
    assert first["weights"] == second["weights"]
    assert first["drawn"] != second["drawn"]  # patch positions differ
    assert len({*first["patches"], *second["patches"]}) == 12  # and so does the augmentation


def test_an_interrupt_of_one_process_stops_both_after_the_same_step(
    told: list[dict[str, Any]],
) -> None:
    assert [t["stopped"] for t in told] == [[1, 2], [1, 2]]
    assert [len(t["patches"]) for t in told] == [6, 6]


def test_an_interrupted_run_of_two_resumes_to_the_end_of_a_whole_one(
    told: list[dict[str, Any]], parts: Path, phantoms: Path, tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "attnseg", *train_command(phantoms, tmp_path, TOGETHER)]
    whole = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("Best checkpoint") == 1
    assert len(log_rows(tmp_path)) == 2
    assert_same_end(tmp_path, parts)


def test_one_process_is_alone() -> None:
    with open_devices() as devices:
        assert (devices.rank, devices.count, devices.first) == (0, 1, True)
        assert devices.gather("own") == ["own"]
        with devices.together():
            pass


def test_what_stops_one_process_stops_the_others_in_its_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = ScanError("case b: is damaged", "train with {}", Setting("epochs", 3))
    monkeypatch.setattr(Devices, "gather", lambda _, own: [own, other.args])
    devices = Devices(torch.device("cpu"), 0, 2)
    with (
        pytest.raises(TrainingError, match="case b: is damaged; train with epochs=3"),
        devices.together(),
    ):
        pass
    with pytest.raises(ScanError, match="case a: is absent"), devices.together():
        raise ScanError("case a: is absent")


def test_the_name_counts_the_processes() -> None:
    cpu = torch.device("cpu")
    assert Devices(cpu).name.endswith(f"CPU, {torch.get_num_threads()} threads")
    assert Devices(cpu, 1, 3).name == f"3 x {Devices(cpu).name}"
    assert not Devices(cpu, 1, 3).first
