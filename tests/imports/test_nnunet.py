"""What is read from a model folder of nnU-Net, and what is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnseg.imports.imported import import_nnunet
from attnseg.imports.nnunet import read_nnunet
from attnseg.runtime.errors import ExportError
from attnseg.runtime.steps.schemes import ClipZScore, SingleZScore
from attnseg.runtime.task import Output
from tests.imports.models import CT, REGIONS, NnUNetFolder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return NnUNetFolder(folds=2, mirror_axes=(0, 2)).write(tmp_path / "model")


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file of a folder."""
    stored = json.loads((folder / name).read_text())
    change(stored)
    (folder / name).write_text(json.dumps(stored))


def settings_of(plans: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = plans["configurations"]["3d_fullres"]
    return settings


def test_the_steps_are_those_of_the_plans(tmp_path: Path) -> None:
    model = NnUNetFolder(
        labels=REGIONS,
        order=(1, 2),
        channels=("CT", "T1"),
        schemes=("CTNormalization", "ZScoreNormalization"),
        masks=(False, True),
        transpose=(1, 0, 2),
        spacing=(3.0, 1.0, 2.0),
        mirror_axes=(0, 1),
    )
    found = read_nnunet(model.write(tmp_path / "model"), ["all"])
    record = found.record
    rules, inference = record.preprocessing, record.inference
    assert record.spacing_mm == (3.0, 1.0, 2.0)
    # nnU-Net's (z, y, x), turned by (1, 0, 2), is (y, z, x).
    assert (rules.orientation, rules.axes) == (None, (1, 2, 0))
    assert rules.order == ("crop", "normalise", "resample")
    assert rules.normalisation == (
        ClipZScore(CT["percentile_00_5"], CT["percentile_99_5"], CT["mean"], CT["std"]),
        SingleZScore("filled"),
    )
    assert (inference.window, inference.window_multiple) == ((16, 16, 24), (2, 4, 4))
    assert (inference.placement, inference.weights) == ("even", "gaussian-nnunet")
    assert inference.mirror_axes == (0, 1)
    task = record.task
    assert [c.suffixes for c in task.channels] == [("_0000",), ("_0001",)]
    assert [(label.name, label.value) for label in task.labels] == [
        ("background", 0),
        ("label 1", 1),
        ("lesion", 2),
    ]
    assert task.outputs == (Output("whole", 1, (0,)), Output("lesion", 2, (1,)))
    assert found.origin["folds"] == ["0"]


def test_folds_are_chosen_by_number(folder: Path) -> None:
    assert read_nnunet(folder, ["all"]).origin["folds"] == ["0", "1"]
    image = torch.randn(1, 1, 16, 16, 24)
    with torch.no_grad():
        first, second, both = (
            read_nnunet(folder, folds).network(image) for folds in (["0"], ["1"], ["0", "1"])
        )
    torch.testing.assert_close(both, (first + second) / 2)


class Dangerous:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_checkpoint_that_would_run_code_is_refused(folder: Path, tmp_path: Path) -> None:
    file, proof = folder / "fold_0" / "checkpoint_final.pth", tmp_path / "proof"
    torch.save({"network_weights": {}, "extra": Dangerous(proof)}, file)
    with pytest.raises(ExportError, match="wants to unpickle ") as caught:
        read_nnunet(folder, ["0"])
    assert not proof.exists()
    assert "\n" not in str(caught.value)


def spoil_checkpoint(folder: Path) -> None:
    (folder / "fold_0" / "checkpoint_final.pth").write_bytes(b"not a checkpoint")


def spoil_weights(folder: Path) -> None:
    file = folder / "fold_0" / "checkpoint_final.pth"
    stored = torch.load(file, weights_only=False)
    stored["network_weights"].popitem()
    torch.save(stored, file)


def set_trainer(folder: Path) -> None:
    file = folder / "fold_0" / "checkpoint_final.pth"
    stored = torch.load(file, weights_only=False)
    torch.save({**stored, "trainer_name": "MyTrainer"}, file)


def set_configuration(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for file in folder.glob("fold_*/*.pth"):
            stored = torch.load(file, weights_only=False)
            stored["init_args"]["configuration"] = name
            torch.save(stored, file)

    return change


def in_plans(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, "plans.json", change)


def in_dataset(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, "dataset.json", change)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no plans": (lambda f: (f / "plans.json").unlink(), "has no plans.json"),
    "version 1": (
        lambda f: ((f / "plans.json").unlink(), (f / "plans.pkl").write_bytes(pickle.dumps(1))),
        "a model of nnU-Net 1",
    ),
    "no dataset": (lambda f: (f / "dataset.json").unlink(), r"dataset\.json: cannot be read"),
    "plans that are no JSON": (
        lambda f: (f / "plans.json").write_text("{"),
        r"plans\.json: is not JSON",
    ),
    "no checkpoint": (
        lambda f: [file.unlink() for file in f.glob("fold_*/*.pth")],
        r"has no fold_\*/checkpoint_final\.pth",
    ),
    "a damaged checkpoint": (spoil_checkpoint, "is not a checkpoint of PyTorch"),
    "other weights": (spoil_weights, "its weights are not those of the network"),
    "a custom trainer": (set_trainer, "MyTrainer, a custom trainer"),
    "a 2-D configuration": (set_configuration("2d"), "2d is a 2-D configuration"),
    "an unknown configuration": (set_configuration("4d"), "no configuration 4d"),
    "a cascade": (
        in_plans(lambda p: settings_of(p).update(previous_stage="3d_lowres")),
        "second stage of a cascade",
    ),
    "a custom network": (
        in_plans(lambda p: settings_of(p)["architecture"].update(network_class_name="my.nets.Net")),
        r"my\.nets\.Net, a custom network",
    ),
    "an unknown layer": (
        in_plans(
            lambda p: settings_of(p)["architecture"]["arch_kwargs"].update(nonlin="os.system")
        ),
        r"layer os\.system",
    ),
    "an unknown argument": (
        in_plans(lambda p: settings_of(p)["architecture"]["arch_kwargs"].update(depth=3)),
        "cannot be built",
    ),
    "a custom normalisation": (
        in_plans(lambda p: settings_of(p).update(normalization_schemes=["MyNorm"])),
        "normalisation MyNorm",
    ),
    "a custom preprocessor": (
        in_plans(lambda p: settings_of(p).update(preprocessor_name="MyPreprocessor")),
        "MyPreprocessor, a custom preprocessor",
    ),
    "another resampling": (
        in_plans(lambda p: settings_of(p).update(resampling_fn_data="resample_torch")),
        "resampled by resample_torch",
    ),
    "another reader": (
        in_plans(lambda p: p.update(image_reader_writer="Tiff3DIO")),
        "read by Tiff3DIO",
    ),
    "channels missing": (
        in_dataset(lambda d: d.update(channel_names={"0": "T1", "1": "T2"})),
        "for 1 channels, dataset.json has 2",
    ),
    "too many labels": (
        in_dataset(
            lambda d: d.update(labels={"background": 0, **{f"l{i}": i for i in range(1, 300)}})
        ),
        "299 labels",
    ),
    "an incomplete plan": (in_plans(lambda p: p.pop("transpose_forward")), "are incomplete"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_run_unchanged_is_refused_in_one_line(
    folder: Path, tmp_path: Path, what: str
) -> None:
    spoil, message = REFUSED[what]
    spoil(folder)
    with pytest.raises(ExportError, match=message) as caught:
        import_nnunet(folder, tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()


def test_a_missing_fold_and_a_missing_folder_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"has no fold_7/checkpoint_final\.pth; choose of 0, 1"):
        read_nnunet(folder, ["7"])
    with pytest.raises(ExportError, match="is not a folder"):
        read_nnunet(tmp_path / "nothing", ["all"])
    with pytest.raises(ExportError, match=rf"has no plans\.json.*give {folder}"):
        read_nnunet(folder.parent, ["all"])


def test_plans_of_older_versions_name_the_same_network(folder: Path) -> None:
    expected = read_nnunet(folder, ["0"])

    def older(plans: dict[str, Any]) -> None:
        settings = settings_of(plans)
        kwargs = settings.pop("architecture")["arch_kwargs"]
        settings |= {
            "UNet_class_name": "PlainConvUNet",
            "UNet_base_num_features": 6,
            "unet_max_num_features": 8,
            "n_conv_per_stage_encoder": kwargs["n_conv_per_stage"],
            "n_conv_per_stage_decoder": kwargs["n_conv_per_stage_decoder"],
            "pool_op_kernel_sizes": kwargs["strides"],
            "conv_kernel_sizes": kwargs["kernel_sizes"],
        }

    edit(folder, "plans.json", older)
    # The features of the test's network, 6, 8 and 10, are not 6, 12 and 24 bounded by 8.
    with pytest.raises(ExportError, match="its weights are not those of the network"):
        read_nnunet(folder, ["0"])
    for file in folder.glob("fold_0/*.pth"):
        stored = torch.load(file, weights_only=False)
        stored["network_weights"] = _narrowed(stored["network_weights"])
        torch.save(stored, file)
    found = read_nnunet(folder, ["0"])
    assert found.record == expected.record
    assert np.isfinite(found.network(torch.zeros(1, 1, 16, 16, 24)).detach().numpy()).all()


def _narrowed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights whose 10 channels are cut to 8."""

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        for axis, size in enumerate(tensor.shape[:2]):
            if size == 10:
                tensor = tensor.narrow(axis, 0, 8)
        return tensor.clone()

    return {name: cut(tensor) for name, tensor in weights.items()}
