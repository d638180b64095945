from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from attnseg.data.task import BRATS
from attnseg.export.source.checkpoint import (
    Description,
    _describe,
    encode_weights,
    load_trained,
)
from attnseg.runtime.errors import TrainingError
from attnseg.runtime.model.bundle import default_folder
from attnseg.trainer.checkpoint import save_checkpoint
from attnseg.trainer.model import MODELS, NetworkConfig
from attnseg.trainer.networks import build_network
from tests.trainer.states import state_of

SPLEEN = replace(BRATS, description="Spleen (CT)")


@pytest.mark.parametrize(
    ("config", "name", "title"),
    [
        (NetworkConfig(), "attention-resnet-unet", "Attention-ResNetUNet"),
        (MODELS["resunet"], "resnet-unet", "ResNet-UNet"),
        (MODELS["unet3d"], "unet3d", "3-D U-Net"),
        (
            NetworkConfig(attention="se"),
            "attention-resnet-unet-se",
            "Attention-ResNetUNet with attention se and with the multi-scale module",
        ),
    ],
)
def test_a_model_is_named_by_its_data_set_and_its_architecture(
    config: NetworkConfig, name: str, title: str
) -> None:
    found = _describe(config, SPLEEN)
    assert found == Description(f"spleen-ct-{name}", f"{title} for Spleen (CT)")
    assert _describe(config, BRATS).name == f"brats-brain-tumours-{name}"
    assert _describe(config, replace(BRATS, description="")) == Description(name, title)


def test_no_changed_byte_of_a_weights_file_changes_its_weights(tmp_path: Path) -> None:
    shipped = load_trained(default_folder() / "weights.safetensors")
    small = build_network(NetworkConfig(widths=(2, 4), bottleneck=4)).eval()
    stored = encode_weights(replace(shipped, network=small))
    path = tmp_path / "weights.safetensors"
    path.write_bytes(stored)
    expected = load_trained(path).network.state_dict()
    start = 8 + int.from_bytes(stored[:8], "little")  # of the tensors
    for place in [*range(0, start, 97), *range(start, len(stored), 31)]:
        path.write_bytes(stored[:place] + bytes([stored[place] ^ 0x55]) + stored[place + 1 :])
        try:
            found = load_trained(path).network.state_dict()
        except TrainingError:
            continue
        assert place < start  # a word of the metadata
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def weights_file(folder: Path, **changes: Any) -> Path:
    """Weights of a small network, with changed entries of the metadata."""
    shipped = load_trained(default_folder() / "weights.safetensors")
    small = build_network(NetworkConfig(widths=(2, 4), bottleneck=4)).eval()
    stored = encode_weights(replace(shipped, network=small))
    size = int.from_bytes(stored[:8], "little")
    metadata = json.loads(json.loads(stored[8 : 8 + size])["__metadata__"]["attnseg"])
    metadata |= changes
    metadata = {name: value for name, value in metadata.items() if value != "missing"}
    path = folder / "weights.safetensors"
    path.write_bytes(save(load(stored), {"attnseg": json.dumps(metadata)}))
    return path


def test_the_small_weights_are_read(tmp_path: Path) -> None:
    assert load_trained(weights_file(tmp_path)).network.config.widths == (2, 4)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("format", 3, "metadata field format: Input should be 'attnseg-weights-1', got 3"),
        ("network", "missing", "metadata field network: Field required"),
        ("network", 3, "metadata field network: Input should be an object, got 3"),
        (
            "network",
            {"in_channels": 1.5},
            "network field in_channels: Input should be a valid integer, got 1.5",
        ),
        (
            "network",
            {"bottleneck": 10000},
            "the network has 2736857814 parameters, more than 268435456; lower widths or",
        ),
        ("network", {"widths": [2, 6]}, "its configuration and weights do not agree"),
        (
            "network",
            {"widths": [2, 4], "classes": 3},
            "its network has 4 channels and 3 classes, its task 4 and 4",
        ),
        ("patch", "64", "metadata field patch: Input should be a valid integer, got '64'"),
        ("patch", True, "metadata field patch: Input should be a valid integer, got True"),
        ("overlap", math.nan, "metadata field overlap: Input should be less than 1, got nan"),
        ("training", None, "metadata field training: Input should be an object, got None"),
        ("validation", {"dice": {}}, "metadata field validation.method: Field required"),
        ("description", {"name": 3}, "metadata field description.name: Input should be a valid s"),
        ("weights_sha256", 7, "metadata field weights_sha256: Input should be a valid string"),
        ("weights_sha256", "0", "its weights do not match their digest"),
        ("task", [], "metadata field task: Input should be a valid dictionary"),
    ],
)
def test_metadata_of_another_type_is_named(
    tmp_path: Path, name: str, value: object, message: str
) -> None:
    path = weights_file(tmp_path, **{name: value})
    with pytest.raises(TrainingError) as caught:
        load_trained(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "metadata configuration: Input should be an object, got []"),
        ('{"a":' * 5000, "metadata configuration: Invalid JSON: recursion limit exceeded"),
        ("{'", "metadata configuration: Invalid JSON: key must be a string"),
    ],
)
def test_metadata_that_is_no_object_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(save({"w": torch.zeros(1)}, {"attnseg": text}))
    with pytest.raises(TrainingError) as caught:
        load_trained(path)
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    "header",
    [
        b'{"w":' * 5000,
        b'{"__metadata__": 3}',
        b'{"__metadata__": {"attnseg": 3}}',
        b'{"w": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e99]}}',
        b'{"w": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}',  # not known to PyTorch
        b'{"w": 3}',
        b"[]",
        b"\xff",
        b"",
    ],
)
def test_a_header_that_breaks_the_format_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"0000")
    with pytest.raises(TrainingError, match=r"safetensors: is damaged or not a saf") as caught:
        load_trained(path)
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_read_are_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    path = weights_file(tmp_path)
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(TrainingError, match=r"safetensors: cannot be read \(Input/output error"):
        load_trained(path)


@pytest.mark.parametrize("value", [math.nan, -0.1, 2.0, None])
def test_a_checkpoint_without_its_dice_is_refused(tmp_path: Path, value: float | None) -> None:
    scores = {"WT": 0.5, "TC": 0.5} | ({} if value is None else {"ET": value})
    save_checkpoint(tmp_path / "best.pt", state_of(validation=scores))
    with pytest.raises(TrainingError, match=r"best\.pt: holds no Dice coefficient of ET"):
        load_trained(tmp_path / "best.pt")


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.pop("head.bias"),
        lambda w: w.update(more=torch.zeros(1)),
        lambda w: w.update({"head.bias": torch.zeros(5)}),
        lambda w: w.update({"head.bias": torch.zeros(4, dtype=torch.int64)}),
        lambda w: w.update({"head.bias": torch.zeros(4, dtype=torch.complex64)}),
        lambda w: w.update({"head.bias": torch.zeros(4).to_sparse()}),
        lambda w: w.update({"head.bias": torch.zeros(4, dtype=torch.float8_e5m2)}),
        lambda w: w.update({"bottleneck.norm.num_batches_tracked": torch.tensor(1.0)}),
        lambda w: w.update({"bottleneck.norm.num_batches_tracked": torch.tensor(True)}),
        lambda w: w.clear(),
    ],
)
def test_weights_of_another_layout_are_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    state = state_of()
    change(state["model"])
    save_checkpoint(tmp_path / "best.pt", state)
    with pytest.raises(TrainingError, match=r"best\.pt: its configuration and weights do not ag"):
        load_trained(tmp_path / "best.pt")


def test_a_checkpoint_is_loaded_with_its_weights_in_fp32(tmp_path: Path) -> None:
    state = state_of()
    doubled = {n: v.double() if v.is_floating_point() else v for n, v in state["model"].items()}
    save_checkpoint(tmp_path / "best.pt", {**state, "model": doubled})
    found = load_trained(tmp_path / "best.pt").network.state_dict()
    assert all(torch.equal(found[name], value) for name, value in state["model"].items())
    assert {value.dtype for value in found.values()} == {torch.float32, torch.int64}


WRONG: tuple[Any, ...] = (
    *(None, True, -1, 1.5, math.nan, 10**30, "", "a", b"a", [], [1], {}, {"a": 1}),
    *(torch.zeros(0), torch.zeros(1), torch.zeros(3, 4)),
)


def paths(value: Any, start: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Keys and indices that lead to each part of a state, tensors left whole."""
    if start:
        yield start
    parts = value.items() if isinstance(value, dict) else ()
    parts = enumerate(value) if isinstance(value, list | tuple) else parts
    for key, part in parts:
        yield from paths(part, (*start, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of a state with another part."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(copy[path[0]], path[1:], new)
    return copy


def test_a_random_change_of_a_checkpoint_raises_nothing_else(tmp_path: Path) -> None:
    state = state_of()
    places = [path for path in paths(state) if path[0] != "model"] + [("model", "head.bias")]
    rng = np.random.default_rng(0)
    messages = []
    for _ in range(200):
        place, new = places[rng.integers(len(places))], WRONG[rng.integers(len(WRONG))]
        save_checkpoint(tmp_path / "best.pt", put(state, place, new))
        try:
            encode_weights(load_trained(tmp_path / "best.pt"))
        except TrainingError as error:
            messages.append(str(error))
    assert 100 < len(messages) < 200
    assert not any("\n" in message for message in messages)
