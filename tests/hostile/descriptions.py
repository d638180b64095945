"""Hostile JSON that users write or receive: specs, `dataset.json`, splits; and settings as text."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.random import Generator

from attnseg import Bundle, SegmentOptions
from attnseg.data.labelled import find_labelled_cases
from attnseg.data.split import read_split
from attnseg.export.source.foreign import read_spec
from attnseg.runtime.options import resolve
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.data_set import open_data_set
from attnseg.trainer.start import RunChoices
from tests.export.conftest import SPEC
from tests.hostile.drive import SilentlyWrongError
from tests.hostile.model import SHAPE
from tests.hostile.mutate import NAMES, NUMBERS, any_value, change_json, encode_json, pick

_DECATHLON = {
    "name": "Spleen",
    "modality": {"0": "CT"},
    "labels": {"0": "background", "1": "spleen"},
    "training": [
        {"image": f"./imagesTr/a_{i}.nii.gz", "label": f"./labelsTr/a_{i}.nii.gz"} for i in range(3)
    ],
    "numTraining": 3,
}
_NNUNET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "spleen": 1},
    "file_ending": ".nii.gz",
    "numTraining": 3,
}
_LISTED = {
    **_NNUNET,
    "dataset": {
        f"a_{i}": {"images": [f"imagesTr/a_{i}.nii.gz"], "label": f"labelsTr/a_{i}.nii.gz"}
        for i in range(3)
    },
}

_OF_REGIONS: dict[str, Any] = {
    "activation": "sigmoid",
    "outputs": [{"region": "liver", "label": 1, "channels": [0], "threshold": 0.5}],
    "orientation": None,
    "axes": "zyx",
    "order": ["crop", "normalise", "resample"],
    "crop": "nonzero",
    "grid": {"spacing_mm": [3, 1, 1], "order": 3, "separate_above": 3, "back": "probabilities"},
    "normalisation": [{"scheme": "clip-zscore", "low": -9, "high": 9, "mean": 1, "std": 2}],
    "inference": {"window": [32, 32, 32], "placement": "even", "mirror_axes": [0, 1, 2]},
}
"""Fields of a spec as an imported model has them."""


class Specs:
    """The spec of an ONNX file."""

    def __init__(self, _: Path) -> None:
        older = {**SPEC, "grid": None, "regions": {"liver": [1, 2]}, "display": ["ct"]}
        one: dict[str, Any] = {**older, "normalisation": {"scheme": "zscore", "region": "filled"}}
        self.specs = [older, one, {**one, **_OF_REGIONS}]

    def make(self, rng: Generator, folder: Path) -> None:
        """See `Reader.make`."""
        stored = encode_json(rng, change_json(rng, pick(rng, self.specs), 2))
        (folder / "model.json").write_bytes(stored)

    def read(self, folder: Path) -> None:
        """See `Reader.read`."""
        spec = read_spec(folder / "model.json")
        resolve(SegmentOptions(device="cpu"), spec)


class DataSets:
    """A `dataset.json` beside three labelled cases, and a split of them."""

    def __init__(self, _: Path) -> None:
        rng = np.random.default_rng(0)
        voxels = rng.integers(1, 100, SHAPE).astype(np.int16)
        self.image = nib.Nifti1Image(voxels, np.eye(4)).to_bytes()
        self.label = nib.Nifti1Image((voxels > 50).astype(np.uint8), np.eye(4)).to_bytes()

    def make(self, rng: Generator, folder: Path) -> None:
        """See `Reader.make`."""
        for part, content in (("imagesTr", self.image), ("labelsTr", self.label)):
            (folder / part).mkdir()
            for i in range(3):
                (folder / part / f"a_{i}.nii.gz").write_bytes(content)
                if part == "imagesTr":
                    (folder / part / f"a_{i}_0000.nii.gz").write_bytes(content)
        chosen: dict[str, Any] = pick(rng, (_DECATHLON, _NNUNET, _LISTED))
        split = {"train": ["a_0", "a_1"], "validation": ["a_2"]}
        if rng.random() < 0.8:
            chosen = change_json(rng, chosen, 2)
        else:
            split = change_json(rng, split, 2)
        (folder / "dataset.json").write_bytes(encode_json(rng, chosen))
        (folder / "split.json").write_bytes(encode_json(rng, split))

    def read(self, folder: Path) -> None:
        """See `Reader.read`."""
        find_labelled_cases(folder)
        split = read_split(folder / "split.json")
        data = open_data_set(folder, split, TrainConfig())
        found = {part: [case.name for case in data.part(part)] for part in split}
        if found != split:
            raise SilentlyWrongError(f"the split {split} gave {found}")


class Options:
    """Options of `run` as Python values, and settings of `train` as text."""

    def __init__(self, _: Path) -> None:
        self.model = Bundle.default().manifest

    def make(self, rng: Generator, folder: Path) -> None:
        """See `Reader.make`."""
        options = [field.name for field in fields(SegmentOptions)]
        settings = [f.name for f in fields(TrainConfig)] + ["widths", "bottleneck", "attention"]
        chosen = {pick(rng, options): _option(rng) for _ in range(int(rng.integers(1, 4)))}
        given = {pick(rng, settings): _text(rng) for _ in range(int(rng.integers(1, 4)))}
        text = json.dumps({"options": chosen, "settings": given})
        (folder / "options.json").write_text(text)

    def read(self, folder: Path) -> None:
        """See `Reader.read`."""
        stored = json.loads((folder / "options.json").read_text())
        if len(stored["settings"]) % 2:
            plan = resolve(SegmentOptions(**stored["options"]), self.model)
            plan.windows.plan((240, 240, 155))
            json.dumps(plan.settings(), allow_nan=False)
        else:
            config = RunChoices(settings=stored["settings"]).config()
            if TrainConfig.from_dict(config.to_dict()) != config:
                raise SilentlyWrongError(f"{config} is not what its fields say")


def _option(rng: Generator) -> Any:
    texts = ("auto", "cpu", "openvino", "fp32", "paper", "mirror8", "mean", "full", "never")
    return pick(rng, (*texts, 64, 0.5, None)) if rng.random() < 0.6 else any_value(rng)


def _text(rng: Generator) -> str:
    number = pick(rng, NUMBERS)
    made = (
        str(number),
        f"{number},{number}",
        pick(rng, NAMES).encode("utf-8", "replace").decode(),
        "9" * 5000,
        "1e400",
        "0x10",
        "1_000",
        "١٢",
    )
    usual = ("0", "1", "2", "32", "0.5", "1e-3", "1,1,1", "false", "fp32", "2,4")
    return pick(rng, usual if rng.random() < 0.6 else made)
