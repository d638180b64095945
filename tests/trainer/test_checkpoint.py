from __future__ import annotations

import errno
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors.torch import save_file

from attnseg.data.task import BRATS
from attnseg.runtime.errors import TrainingError
from attnseg.trainer.checkpoint import (
    checkpoint_preparation,
    initial_weights,
    load_checkpoint,
    load_run,
    save_checkpoint,
)
from attnseg.trainer.model import NetworkConfig
from attnseg.trainer.networks import build_network
from tests.conftest import PLAIN
from tests.trainer.states import SMALL, state_of


def test_a_checkpoint_that_cannot_be_written_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, state_of(epoch=1))
    with pytest.raises(TrainingError, match="could not be written"):
        save_checkpoint(tmp_path / "gone" / "last.pt", {"epoch": 2})
    assert load_checkpoint(path)["epoch"] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["last.pt"]


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The system refuses to write beyond `size` bytes, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1000, 50_000])
def test_a_disk_that_fills_up_while_saving_keeps_the_old_checkpoint(
    tmp_path: Path, size: int
) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, state_of(epoch=1))
    with files_up_to(size), pytest.raises(TrainingError, match=r"last\.pt: could not be written"):
        save_checkpoint(path, {"epoch": 2, "model": torch.zeros(50_000)})
    assert load_checkpoint(path)["epoch"] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["last.pt"]


def test_the_error_of_a_full_disk_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object, stream: BinaryIO) -> None:
        stream.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError) as caught:
        save_checkpoint(tmp_path / "last.pt", {"epoch": 2})
    message = str(caught.value)
    assert "No space left on device" in message
    assert message.endswith("free some space, then give resume=True")
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


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


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"last\.pt: does not exist, so there is no run"):
        load_run(tmp_path)


def test_a_checkpoint_from_before_tasks_is_of_brats() -> None:
    state = {"normalisation": {"foreground": "nonzero", "landmarks": None}}
    preparation = checkpoint_preparation(state)
    assert preparation.task is BRATS
    assert preparation.preprocessing == PLAIN


def test_initial_weights_are_the_average_where_there_is_one(tmp_path: Path) -> None:
    network = build_network(SMALL)
    model = network.state_dict()
    average = {name: value + 1 for name, value in model.items()}
    for kept, expected in ((average, average), (None, model)):
        save_checkpoint(tmp_path / "best.pt", state_of(model=model, average=kept))
        weights = initial_weights(tmp_path / "best.pt", network)
        assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_initial_weights_may_be_those_of_a_bundle(tmp_path: Path) -> None:
    network = build_network(SMALL)
    model = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(model, tmp_path / "weights.safetensors")
    weights = initial_weights(tmp_path / "weights.safetensors", network)
    assert all(torch.equal(weights[name], value) for name, value in model.items())


@pytest.mark.parametrize(
    "other",
    [
        NetworkConfig(widths=(2, 6), bottleneck=4),
        NetworkConfig(widths=(2, 4), bottleneck=4, attention="cbam"),
        NetworkConfig(widths=(2, 4), bottleneck=4, classes=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["best.pt", "weights.safetensors"])
def test_initial_weights_of_another_network_are_refused(
    tmp_path: Path, other: NetworkConfig, name: str
) -> None:
    model = {key: value.contiguous() for key, value in build_network(other).state_dict().items()}
    state = state_of(SMALL if other.classes == 3 else other, model=model)
    save_checkpoint(tmp_path / "best.pt", state)
    save_file(model, tmp_path / "weights.safetensors")
    with pytest.raises(TrainingError, match=f"{name}: is of another architecture") as caught:
        initial_weights(tmp_path / name, build_network(SMALL))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["best.pt", "weights.safetensors"])
def test_initial_weights_that_are_none_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(TrainingError, match=f"{name}: "):
        initial_weights(tmp_path / name, build_network(SMALL))
    (tmp_path / name).write_bytes(b"junk")
    with pytest.raises(TrainingError, match=f"{name}: ") as caught:
        initial_weights(tmp_path / name, build_network(SMALL))
    assert "\n" not in str(caught.value)


def test_no_changed_byte_of_a_checkpoint_changes_its_weights(tmp_path: Path) -> None:
    weights = build_network(SMALL).state_dict()
    path = tmp_path / "best.pt"
    save_checkpoint(path, state_of(model=weights, epoch=3))
    stored = path.read_bytes()
    refused = 0
    for place in range(0, len(stored), max(1, len(stored) // 120)):
        path.write_bytes(stored[:place] + bytes([stored[place] ^ 0x55]) + stored[place + 1 :])
        try:
            found = load_checkpoint(path)
        except TrainingError:
            refused += 1
        else:  # the byte is padding, or a time or another detail of the archive
            assert found["epoch"] == 3
            assert all(torch.equal(found["model"][name], weights[name]) for name in weights)
    assert refused > 60


def refused(path: Path, state: dict[str, Any]) -> str:
    """Message of the only error that reading a state may raise."""
    save_checkpoint(path, state)
    with pytest.raises(TrainingError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


REQUIRED = ("config", "data", "split", "device", "model", "average", "epoch", "validation")


@pytest.mark.parametrize("name", [*REQUIRED, "seconds"])
def test_an_entry_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    state = state_of()
    del state[name]
    message = refused(tmp_path / "best.pt", state)
    assert message == f"checkpoint field {name}: Field required"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("config", None, "checkpoint field config: Input should be a valid dictionary, got None"),
        ("config", [1], "checkpoint field config: Input should be a valid dictionary, got [1]"),
        ("config", {"epoch": 3}, "unknown training field epoch"),
        (
            "config",
            {"network": {"in_channels": 1.5}},
            "training field network.in_channels: Input should be a valid integer, got 1.5",
        ),
        (
            "config",
            {"network": {"in_channels": torch.ones(1)}},
            "the training configuration is no plain data (Object of type Tensor is not JSON "
            "serializable)",
        ),
        (
            "config",
            {"network": {"bottleneck": 10000}},
            "the network has 2736857814 parameters, more than 268435456; lower widths or "
            "bottleneck",
        ),
        (
            "config",
            {"network": {"classes": 3}},
            "its network has 4 channels and 3 classes, its task 4 and 4",
        ),
        ("data", 7, "checkpoint field data: Input should be a valid string, got 7"),
        ("split", {"train": ["a"]}, "checkpoint field split.validation: Field required"),
        (
            "split",
            {"train": "a", "validation": []},
            "checkpoint field split.train: Input should be a valid list, got 'a'",
        ),
        ("epoch", True, "checkpoint field epoch: Input should be a valid integer, got True"),
        (
            "epoch",
            -1,
            "checkpoint field epoch: Input should be greater than or equal to 0, got -1",
        ),
        ("seconds", math.inf, "checkpoint field seconds: Input should be a finite number, got inf"),
        (
            "validation",
            {"WT": "good"},
            "checkpoint field validation.WT: Input should be a valid number, got 'good'",
        ),
        ("validation", 0.5, "checkpoint field validation: Input should be a valid dictionary, got"),
        ("model", {"w": 3}, "checkpoint field model.w: Input should be an instance of Tensor, got"),
        ("losses", ["a"], "checkpoint field losses.0: Input should be a valid number, got 'a'"),
        ("best", None, "checkpoint field best: Input should be a valid number, got None"),
        ("random", {}, "checkpoint field random: Input should be a valid list, got {}"),
        ("optimiser", 1, "checkpoint field optimiser: Input should be a valid dictionary, got 1"),
        ("task", 3, "checkpoint field task: Input should be a valid dictionary"),
        ("grid", {"shape": [0, 1, 1]}, "a grid needs three positive numbers, got (0, 1, 1)"),
        ("normalisation", None, "checkpoint field normalisation: Input should be a valid dict"),
        (
            "normalisation",
            {"foreground": "all", "landmarks": {"percentiles": [1, 9], "values": [[0, 1]]}},
            "normalisation must have landmarks for 4 channels, got 1",
        ),
        (
            "normalisation",
            {"foreground": "all", "landmarks": {"percentiles": [1, 9], "values": [[0, math.nan]]}},
            "landmarks must be at least two, and ascending, got (0.0, nan)",
        ),
    ],
)
def test_an_entry_that_is_wrong_is_named(
    tmp_path: Path, name: str, value: object, message: str
) -> None:
    assert refused(tmp_path / "best.pt", state_of(**{name: value})).startswith(message)


def test_numbers_are_plain_numbers_after_reading(tmp_path: Path) -> None:
    """A tensor of one number is taken for a number."""
    state = state_of(validation={"WT": torch.tensor([0.25])}, losses=[torch.tensor(2.0), 1])
    save_checkpoint(tmp_path / "best.pt", state)
    found = load_checkpoint(tmp_path / "best.pt")
    numbers = [found["validation"]["WT"], *found["losses"]]
    assert numbers == [0.25, 2.0, 1.0]
    assert {type(number) for number in numbers} == {float}


def test_an_alias_of_a_label_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    task = {**state_of()["task"], "aliases": {3: 9}}
    message = refused(tmp_path / "best.pt", state_of(task=task))
    assert message == "aliases stand for label 9, which does not exist"
