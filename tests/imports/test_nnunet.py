"""What is read from a model folder of nnU-Net, and what is refused."""

from __future__ import annotations

import inspect
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunetv2.preprocessing.resampling import default_resampling

from attnseg import Segmenter, SegmentOptions
from attnseg.data.labelled import find_labelled_cases
from attnseg.evaluation.cases import cases_to_evaluate
from attnseg.evaluation.evaluate import evaluate
from attnseg.export.gate.samples import read_samples
from attnseg.imports import nnunet
from attnseg.imports.imported import import_nnunet
from attnseg.imports.nnunet import read_nnunet
from attnseg.imports.verify import cases_to_compare
from attnseg.runtime.case.nifti import read_volume
from attnseg.runtime.errors import ConfigError, ExportError, ScanError
from attnseg.runtime.steps.schemes import ClipZScore, SingleZScore
from attnseg.runtime.task import Output
from tests.imports.models import CT, REGIONS, NnUNetFolder, write_scan


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


def many_labels(most: int) -> dict[str, int]:
    return {"background": 0, **{f"l{i}": i for i in range(1, most + 1)}}


def spoil_entry(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "fold_0" / "checkpoint_final.pth"
        stored = torch.load(file, weights_only=False)
        del stored[name]
        torch.save(stored, file)

    return change


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no plans": (lambda f: (f / "plans.json").unlink(), "has no plans.json"),
    "version 1": (
        lambda f: ((f / "plans.json").unlink(), (f / "plans.pkl").write_bytes(pickle.dumps(1))),
        "a model of nnU-Net 1",
    ),
    "no dataset": (lambda f: (f / "dataset.json").unlink(), r"dataset\.json: is missing"),
    "plans that are no JSON": (
        lambda f: (f / "plans.json").write_text("{"),
        r"plans\.json: is not JSON",
    ),
    "no checkpoint": (
        lambda f: [file.unlink() for file in f.glob("fold_*/*.pth")],
        r"has no fold_N/checkpoint_final\.pth.*; copy the folders of the folds",
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
        in_dataset(lambda d: d.update(labels=many_labels(256))),
        r"dataset\.json: labels must have values from 0 to 255, .*, got 257 labels from 0 to 256",
    ),
    "an incomplete plan": (
        in_plans(lambda p: p.pop("transpose_forward")),
        r"plans\.json: has no entry transpose_forward; copy the model folder again",
    ),
    "a plan of another form": (
        in_plans(lambda p: p.update(transpose_forward=3)),
        r"plans\.json: has an entry of another form \(TypeError.*; copy the model folder again",
    ),
    "no trainer": (spoil_entry("trainer_name"), r"final\.pth: has no entry trainer_name; copy"),
    "no arguments": (spoil_entry("init_args"), r"final\.pth: has no entry init_args; copy"),
    "no weights": (spoil_entry("network_weights"), r"final\.pth: has no entry network_weights"),
    "a short order of regions": (
        in_dataset(lambda d: d.update(labels=REGIONS, regions_class_order=[1])),
        r"dataset\.json: regions_class_order has 1 entries for 2 regions \(whole, lesion\); list",
    ),
    "labels of version 1": (
        in_dataset(lambda d: d.update(labels={"0": "background", "1": "organ"})),
        r"dataset\.json: label 0 has the value 'background'; give it a whole number",
    ),
    "no background": (
        in_dataset(lambda d: d.update(labels={"organ": 1, "lesion": 2})),
        r"dataset\.json: no label has the value 0; add \"background\": 0",
    ),
    "a fraction as label": (
        in_dataset(lambda d: d["labels"].update(lesion=1.7)),
        r"dataset\.json: label lesion has the value 1\.7; give it a whole number",
    ),
    "two labels of one value": (
        in_dataset(lambda d: d["labels"].update(lesion=1)),
        r"dataset\.json: lists 1 twice",
    ),
    "no labels": (in_dataset(lambda d: d.pop("labels")), "its labels is not a mapping"),
    "no channels": (in_dataset(lambda d: d.pop("channel_names")), "has no entry modality; copy"),
    "a configuration that inherits from itself": (
        in_plans(
            lambda p: p["configurations"].update(
                {"3d_fullres": {"inherits_from": "b"}, "b": {"inherits_from": "3d_fullres"}}
            )
        ),
        r"plans\.json: .* inherits from itself \(3d_fullres, b, 3d_fullres\); correct",
    ),
    "a network beside the known ones": (
        in_plans(
            lambda p: settings_of(p)["architecture"].update(
                network_class_name="dynamic_network_architectures.mine.PlainConvUNet"
            )
        ),
        r"mine\.PlainConvUNet, a custom network",
    ),
    "a network with a known beginning": (
        in_plans(
            lambda p: settings_of(p)["architecture"].update(
                network_class_name="PlainConvUNet_mine.PlainConvUNet"
            )
        ),
        r"PlainConvUNet_mine\.PlainConvUNet, a custom network",
    ),
    "a layer beside the known ones": (
        in_plans(
            lambda p: settings_of(p)["architecture"]["arch_kwargs"].update(
                nonlin="torch.nn.mine.LeakyReLU"
            )
        ),
        r"layer torch\.nn\.mine\.LeakyReLU",
    ),
    "a network of too many channels": (
        in_plans(
            lambda p: settings_of(p)["architecture"]["arch_kwargs"].update(
                features_per_stage=[6, 8, 1 << 20]
            )
        ),
        "a layer of 1048576 channels, more than 16384",
    ),
    "a network of too many stages": (
        in_plans(
            lambda p: settings_of(p)["architecture"]["arch_kwargs"].update(
                features_per_stage=[6] * 65
            )
        ),
        "has 65 stages, more than 64",
    ),
    "a network of too many layers": (
        in_plans(
            lambda p: settings_of(p)["architecture"]["arch_kwargs"].update(
                n_conv_per_stage=[1, 1, 65]
            )
        ),
        "has n_conv_per_stage 65, more than 64",
    ),
    "a custom label manager": (
        in_plans(lambda p: p.update(label_manager="MyLabelManager")),
        "MyLabelManager, a custom label manager",
    ),
    "different ratios": (
        in_plans(lambda p: settings_of(p).update(resampling_fn_data_kwargs={})),
        r"above different ratios \(None and 3\.0; None: never\)",
    ),
}


RESAMPLING: dict[str, tuple[dict[str, Any], str]] = {
    "a separate axis always": ({"force_separate_z": True}, "force_separate_z True"),
    "zero in place of false": ({"force_separate_z": 0}, "force_separate_z 0"),
    "labels": ({"is_seg": True}, "is_seg True"),
    "order along the axis": ({"order_z": 1}, "order_z 1"),
    "quadratic": ({"order": 2}, "order 2"),
    "an unknown option": ({"mode": "edge"}, "mode 'edge'"),
    "no ratio": (
        {"separate_z_anisotropy_threshold": "3"},
        "separate_z_anisotropy_threshold '3'",
    ),
    "a ratio below 1": (
        {"separate_z_anisotropy_threshold": 0.5},
        r"separate_z_anisotropy_threshold 0\.5",
    ),
}


@pytest.mark.parametrize("which", ["data", "probabilities"])
@pytest.mark.parametrize("what", RESAMPLING)
def test_other_options_of_resampling_are_refused_by_name(
    folder: Path, what: str, which: str
) -> None:
    options, message = RESAMPLING[what]
    key = f"resampling_fn_{which}_kwargs"
    edit(folder, "plans.json", lambda p: settings_of(p)[key].update(options))
    with pytest.raises(ExportError, match=rf"plans\.json: {key} has {message}, which is not"):
        read_nnunet(folder, ["0"])


@pytest.mark.parametrize(
    ("options", "separate_above"),
    [
        ({"force_separate_z": None}, 3.0),
        ({"force_separate_z": None, "separate_z_anisotropy_threshold": 5}, 5.0),
        ({"force_separate_z": False}, None),
        ({}, None),
    ],
    ids=str,
)
def test_an_axis_is_apart_as_the_resampling_function_of_nnunet_has_it(
    folder: Path, options: dict[str, Any], separate_above: float | None
) -> None:
    def change(plans: dict[str, Any]) -> None:
        settings_of(plans)["resampling_fn_data_kwargs"] = options
        settings_of(plans)["resampling_fn_probabilities_kwargs"] = {"order": 1, **options}

    edit(folder, "plans.json", change)
    grid = read_nnunet(folder, ["0"]).record.preprocessing.grid
    assert (grid.separate_above, grid.order) == (separate_above, 3)


def test_the_options_of_resampling_are_those_of_nnunet() -> None:
    function = default_resampling.resample_data_or_seg_to_shape
    parameters = list(inspect.signature(function).parameters.values())[4:]
    assert {own.name: own.default for own in parameters} == nnunet._RESAMPLE_DEFAULTS


def test_255_labels_beside_the_background_fit_in_a_byte(folder: Path) -> None:
    edit(folder, "dataset.json", lambda d: d.update(labels=many_labels(255)))
    with pytest.raises(ExportError, match="weights are not those"):  # which are of 3 labels
        read_nnunet(folder, ["0"])


def test_all_folds_are_the_numbered_ones(folder: Path) -> None:
    for name in ("fold_0_backup", "fold_all", "fold_10", "fold_x"):
        shutil.copytree(folder / "fold_0", folder / name)
    assert read_nnunet(folder, ["all"]).origin["folds"] == ["0", "1", "10"]
    with pytest.raises(ExportError, match=r"no fold_0_backup/.*; choose of 0, 1, 10, all$"):
        read_nnunet(folder, ["0_backup"])
    assert read_nnunet(folder, ["all", "1"]).origin["folds"] == ["all", "1"]
    for name in ("fold_0", "fold_1", "fold_10"):
        shutil.rmtree(folder / name)
    assert read_nnunet(folder, ["all"]).origin["folds"] == ["all"]


def test_the_folds_that_were_read_are_said(folder: Path) -> None:
    both = "The mean of the folds 0 and 1 was taken (checkpoint_final.pth)"
    assert read_nnunet(folder, ["all"]).notes == (both,)
    (folder / "fold_2").mkdir()
    lacking = "Left out is fold_2, without checkpoint_final.pth"
    assert read_nnunet(folder, ["all"]).notes == (both, lacking)
    assert read_nnunet(folder, ["1"]).notes[0] == "Fold 1 was read (checkpoint_final.pth)"


def test_no_fold_and_another_checkpoint_are_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match="folds names no fold; give all, or numbers such as 0,1"):
        read_nnunet(folder, [])
    with pytest.raises(ExportError, match=r"no fold_N/checkpoint_best\.pth.*checkpoint='final'"):
        read_nnunet(folder, ["all"], "best")


def test_cases_are_found_before_the_export(folder: Path, tmp_path: Path) -> None:
    write_scan(tmp_path / "scans", "case")
    (case,) = cases_to_compare(folder, tmp_path / "scans")
    assert [file.name for file in case.files] == ["case_0000.nii.gz"]
    with pytest.raises(ScanError, match="nothing"):
        cases_to_compare(folder, tmp_path / "nothing")


def test_a_case_that_lacks_a_channel_is_not_compared(tmp_path: Path) -> None:
    model = NnUNetFolder(
        channels=("T1", "T2"), schemes=("ZScoreNormalization",) * 2, masks=(True, True)
    )
    write_scan(tmp_path / "scans", "case")
    with pytest.raises(ScanError, match="T2"):
        cases_to_compare(model.write(tmp_path / "model"), tmp_path / "scans")


def test_a_model_of_regions_is_evaluated_on_its_data_set(tmp_path: Path) -> None:
    model = NnUNetFolder(labels=REGIONS, order=(1, 2))
    data = tmp_path / "data"
    write_scan(data / "imagesTr", "a")
    (data / "dataset.json").write_text(json.dumps({**model.dataset(), "numTraining": 1}))
    bundle = import_nnunet(model.write(tmp_path / "model"), tmp_path / "bundle").bundle
    segmenter = Segmenter(bundle, SegmentOptions(precision="fp32", device="cpu"))
    scan = data / "imagesTr" / "a_0000.nii.gz"
    volume = read_volume([scan])
    labels = segmenter.segment(volume).labels
    assert {1, 2} <= set(np.unique(labels))
    truth = np.where(labels == 1, 2, labels).astype(np.uint8)  # the whole, all of it lesion
    (data / "labelsTr").mkdir()
    nib.save(nib.Nifti1Image(truth, nib.load(scan).affine), data / "labelsTr" / "a.nii.gz")
    scans = find_labelled_cases(data)
    cases = cases_to_evaluate(scans, bundle.manifest, "all")
    scores = evaluate(cases, segmenter, scans.task, tmp_path / "scores").scores["a"]
    found, whole = int((labels == 2).sum()), int((labels > 0).sum())
    assert scores["whole"].dice == 1
    assert scores["lesion"].dice == pytest.approx(2 * found / (found + whole))
    (sample,) = read_samples(data, bundle.manifest)
    np.testing.assert_array_equal(sample.truth, truth)


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
    other = folder.parent / "other"
    shutil.copytree(folder, other)
    with pytest.raises(ExportError, match=rf"has no plans\.json.*give {folder} or {other}"):
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
