"""Hostile model folders of nnU-Net, and MONAI bundles."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from numpy.random import Generator

from attnseg.imports.monai.bundle import read_monai
from attnseg.imports.nnunet import read_nnunet
from attnseg.runtime.options import SegmentOptions, resolve
from tests.hostile.drive import SilentlyWrongError
from tests.hostile.mutate import change_bytes, change_json, encode_json
from tests.hostile.weights import Executed
from tests.imports.models import REGIONS, NnUNetFolder
from tests.imports.monai_bundles import BRATS, BRATS_METADATA, SPLEEN, SPLEEN_METADATA, write_bundle


class NnUNetFolders:
    """`plans.json`, `dataset.json` and a checkpoint; accepted folders hold the original weights."""

    def __init__(self, seeds: Path) -> None:
        torch.set_num_threads(1)
        self.folder = NnUNetFolder(labels=REGIONS, order=(1, 2)).write(seeds / "model")
        self.checkpoint = Path("fold_0") / "checkpoint_final.pth"
        self.stored = torch.load(self.folder / self.checkpoint, weights_only=False)

    def make(self, rng: Generator, folder: Path) -> None:
        """See `Reader.make`."""
        model = folder / "model"
        shutil.copytree(self.folder, model)
        how = rng.random()
        if how < 0.75:
            name = "plans.json" if how < 0.55 else "dataset.json"
            changed = change_json(rng, json.loads((model / name).read_text()), 1)
            (model / name).write_bytes(encode_json(rng, changed))
        elif how < 0.85:
            attack = Executed(folder / "executed")
            torch.save({**self.stored, "logging": attack}, model / self.checkpoint)
        else:
            file = model / self.checkpoint
            file.write_bytes(change_bytes(rng, file.read_bytes()))

    def read(self, folder: Path) -> None:
        """See `Reader.read`."""
        try:
            found = read_nnunet(folder / "model", ["all"])
        finally:
            if (folder / "executed").exists():
                raise SilentlyWrongError("code in the file was executed")
        resolve(SegmentOptions(device="cpu"), found.record)
        weights = found.network.state_dict()
        for name, value in self.stored["network_weights"].items():
            if not torch.equal(weights[f"networks.0.{name}"], value):
                raise SilentlyWrongError(f"{name} was changed")


class MonaiBundles:
    """Config, metadata and weights; accepted bundles hold the original weights."""

    def __init__(self, seeds: Path) -> None:
        torch.set_num_threads(1)
        self.folders = (
            write_bundle(seeds / "brats", BRATS, BRATS_METADATA),
            write_bundle(seeds / "spleen", SPLEEN, SPLEEN_METADATA),
        )

    def make(self, rng: Generator, folder: Path) -> None:
        """See `Reader.make`."""
        model = folder / "model"
        shutil.copytree(self.folders[rng.integers(2)], model)
        how = rng.random()
        weights = model / "models" / "model.pt"
        if how < 0.8:
            file = model / "configs" / ("inference.json" if how < 0.6 else "metadata.json")
            changed = change_json(rng, json.loads(file.read_text()), 1)
            if rng.random() < 0.1:
                attack = f"$open({str(folder / 'executed')!r}, 'w')"
                changed = {**changed, "inferer": {"_target_": attack, "roi_size": attack}}
            file.write_bytes(encode_json(rng, changed))
        elif how < 0.9:
            torch.save({"model": {}, "epoch": Executed(folder / "executed")}, weights)
        else:
            weights.write_bytes(change_bytes(rng, weights.read_bytes()))

    def read(self, folder: Path) -> None:
        """See `Reader.read`."""
        try:
            found = read_monai(folder / "model")
        finally:
            if (folder / "executed").exists():
                raise SilentlyWrongError("code in the file was executed")
        resolve(SegmentOptions(device="cpu"), found.record)
        known = [torch.load(own / "models" / "model.pt", weights_only=True) for own in self.folders]
        weights = found.network.state_dict()
        (stored,) = (own for own in known if own.keys() == weights.keys())
        for name, value in stored.items():
            if not torch.equal(weights[name], value):
                raise SilentlyWrongError(f"{name} was changed")
