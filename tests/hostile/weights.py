"""Hostile files of weights: checkpoints, and safetensors."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from numpy.random import Generator

from attnseg.export.source.checkpoint import encode_weights, load_trained
from attnseg.runtime.model.bundle import default_folder
from attnseg.trainer.checkpoint import FORMAT
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.model import NetworkConfig
from attnseg.trainer.networks import build_network
from tests.hostile.drive import SilentlyWrongError
from tests.hostile.mutate import any_value, change_bytes, change_json, nested, pick

SMALL = NetworkConfig(widths=(2, 4), bottleneck=4)


class Executed:
    """An object whose unpickling would write a file; none must ever exist."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.write_text, (self.file, "executed"))


class Weights:
    """A checkpoint or a safetensors file; those that are accepted hold the original weights."""

    def __init__(self, _: Path) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        self.shipped = load_trained(default_folder() / "weights.safetensors")
        small = replace(self.shipped, network=build_network(SMALL).eval())
        self.weights = small.network.state_dict()
        self.safetensors = encode_weights(small)
        config = TrainConfig(network=SMALL, patch=32)
        self.state: dict[str, Any] = {
            **small.preparation.to_dict(),
            "config": config.to_dict(),
            "data": "brats",
            "split": {"train": ["a", "b"], "validation": ["c"]},
            "epoch": 3,
            "seconds": 12.5,
            "device": "cpu",
            "validation": {"loss": 1.0, "WT": 0.5, "TC": 0.5, "ET": 0.5},
            "model": self.weights,
            "average": None,
        }

    def make(self, rng: Generator, folder: Path) -> None:
        """See `Reader.make`."""
        if rng.random() < 0.4:
            stored = self._safetensors(rng)
            (folder / "a.safetensors").write_bytes(stored)
        else:
            self._checkpoint(rng, folder / "best.pt")

    def _safetensors(self, rng: Generator) -> bytes:
        """Change the bytes, or the structure of the header."""
        stored = self.safetensors
        if rng.random() < 0.5:
            return change_bytes(rng, stored)
        size = int.from_bytes(stored[:8], "little")
        header = json.loads(stored[8 : 8 + size])
        if rng.random() < 0.6:
            metadata = json.loads(header["__metadata__"]["attnseg"])
            digest = metadata.pop("weights_sha256")
            changed = {**change_json(rng, metadata, 1), "weights_sha256": digest}
            text = json.dumps(changed)
            if rng.random() < 0.1:
                text = text[:-1] + ', "x": ' + "[" * 5000 + "]" * 5000 + "}"
            header["__metadata__"]["attnseg"] = text
        else:
            header = change_json(rng, header, 2)
        text = json.dumps(header).encode("utf-8", "replace")
        size = pick(rng, (len(text),) * 9 + (0, 2**63, len(text) + 1, len(stored)))
        return (
            size.to_bytes(8, "little") + text + stored[8 + int.from_bytes(stored[:8], "little") :]
        )

    def _checkpoint(self, rng: Generator, file: Path) -> None:
        """Change the stored values, the archive, or put in what a pickle may execute."""
        how = rng.random()
        plain = {name: value for name, value in self.state.items() if name != "model"}
        if how < 0.4:
            _save(file, {**change_json(rng, plain, 2), "model": self.weights})
        elif how < 0.5:
            name = pick(rng, [*plain, "model"])
            value = pick(rng, (any_value(rng), torch.zeros(3), nested(900), {"a": torch.ones(1)}))
            _save(file, {**self.state, name: value})
        elif how < 0.6:
            attack = Executed(file.parent / "executed")
            _save(file, {**self.state, pick(rng, list(plain)): attack})
        else:
            _save(file, self.state)
            stored = file.read_bytes()
            change = _members if how < 0.7 else change_bytes
            file.write_bytes(change(rng, stored))

    def read(self, folder: Path) -> None:
        """See `Reader.read`."""
        (file,) = folder.iterdir()
        try:
            found = load_trained(file).network.state_dict()
        finally:
            if (folder / "executed").exists():
                raise SilentlyWrongError("code in the file was executed")
        for name, value in self.weights.items():
            if not torch.equal(found[name], value):
                raise SilentlyWrongError(f"{name} was changed")


def _save(file: Path, state: dict[str, Any]) -> None:
    torch.save({"format": FORMAT, **state}, file)


def _members(rng: Generator, stored: bytes) -> bytes:
    """Rename, drop, repeat or inflate members of an archive, with valid CRCs."""
    with zipfile.ZipFile(io.BytesIO(stored)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    place = int(rng.integers(len(members)))
    name, content = members[place]
    how = int(rng.integers(5))
    if how == 0:
        del members[place]
    elif how == 1:
        members[place] = pick(rng, ("../a", name.upper(), name + "x", "/" + name)), content
    elif how == 2:
        members.append((pick(rng, ("archive/code/a.py", "archive/constants.pkl")), content))
    elif how == 3:
        members.append(("archive/zeros", bytes(200 << 20)))
    else:
        pickles = (pickle.dumps([[1]] * 9), b"\x80\x02" + b"(" * 10_000, b"cos\nsystem\n(S'a'\ntR.")
        members[0] = members[0][0], pick(rng, pickles)
    stream, kind = io.BytesIO(), pick(rng, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(stream, "w", kind) as archive:
        for own, data in members:
            archive.writestr(own, data)
    return stream.getvalue()
