from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from attnseg import Bundle, Segmenter, SegmentOptions
from attnseg.data.decathlon import read_decathlon
from attnseg.data.labelled import find_labelled_cases
from attnseg.evaluation.metrics import dice
from attnseg.export.export import export_bundle
from attnseg.runtime.case.nifti import read_volume
from attnseg.runtime.case.scans import find_cases
from attnseg.runtime.errors import TrainingError
from attnseg.runtime.steps.preprocess import Preprocessing
from attnseg.runtime.steps.schemes import ZScore
from attnseg.runtime.task import Channel, Label
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.data_set import DataSet, open_data_set
from attnseg.trainer.loop import train
from attnseg.trainer.model import NetworkConfig

SHAPE = (40, 40, 20)
AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])  # RAS, as the Decathlon's files mostly are
DESCRIPTION = {
    "name": "Thorax",
    "modality": {"0": "CT"},
    "labels": {"0": "background", "1": "lung", "2": "heart"},
}
ENTRY = {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}


def make_thorax(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A CT of two ellipsoids, a lung left of a heart, in air with noise; and its labels."""
    rng = np.random.default_rng(seed)
    index = np.indices(SHAPE).astype(float)
    labels = np.zeros(SHAPE, np.uint8)
    for value, x, radius in ((1, 12, 9), (2, 29, 7)):
        centre = np.array([x, 20, 10]) + rng.uniform(-2, 2, 3)
        radii = np.array([radius, radius + 2, radius / 2]) * rng.uniform(0.9, 1.1, 3)
        squares = [((i - c) / r) ** 2 for i, c, r in zip(index, centre, radii, strict=True)]
        labels[sum(squares) < 1] = value
    grey = np.array([-1000.0, -400.0, 300.0])[labels]
    return (grey + rng.normal(0, 30, SHAPE)).astype(np.int16), labels


def write_thorax(root: Path, seeds: range) -> None:
    pairs = []
    for seed in seeds:
        for folder, array in zip(("imagesTr", "labelsTr"), make_thorax(seed), strict=True):
            (root / folder).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, AFFINE), root / folder / f"thorax_{seed}.nii.gz")
        name = f"thorax_{seed}.nii.gz"
        pairs.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    (root / "dataset.json").write_text(json.dumps({**DESCRIPTION, "training": pairs}))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    root = tmp_path_factory.mktemp("decathlon") / "Task99_Thorax"
    write_thorax(root, range(4))
    return open_data_set(root, None, TrainConfig(validation_share=0.25))


@pytest.fixture(scope="module")
def bundle(data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    config = TrainConfig(
        network=NetworkConfig(widths=(8, 16), bottleneck=16, multi_scale=False),
        patch=16,
        batch_size=4,
        epochs=2,
        steps_per_epoch=30,
        learning_rate=1e-2,
        schedule="cosine",
        precision="fp32",
        histogram_matching=False,
    )
    run = tmp_path_factory.mktemp("run")
    return export_bundle(train(data, config, run), run / "model").bundle


def test_an_exported_model_finds_both_organs_of_a_case_not_trained_on(
    bundle: Bundle, tmp_path: Path
) -> None:
    image, truth = make_thorax(77)
    nib.save(nib.Nifti1Image(image, AFFINE), tmp_path / "thorax_77.nii.gz")
    (case,) = find_cases(tmp_path, bundle.manifest.task.channels).cases
    segmenter = Segmenter(bundle, SegmentOptions(precision="fp32"))
    result = segmenter.segment(read_volume(case.files))
    assert case.name == "thorax_77"
    assert result.warnings == ()
    for value in (1, 2):
        assert dice(result.labels == value, truth == value) > 0.8


def test_the_manifest_is_that_of_the_task(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest.task.channels == (Channel("CT", ("",)),)
    assert [(x.name, x.value) for x in manifest.task.labels] == [
        ("background", 0),
        ("lung", 1),
        ("heart", 2),
    ]
    assert manifest.task.regions == {"lung": (1,), "heart": (2,)}
    assert manifest.spacing_mm == (1, 1, 2)
    assert manifest.preprocessing == Preprocessing("LPS", None, "all", (ZScore("all"),))
    assert manifest.task.display == ("CT",)
    assert manifest.inference.min_voxels == 0
    assert manifest.name == "thorax-attention-resnet-unet-gap-single-scale"
    assert manifest.description == (
        "Attention-ResNetUNet with attention gap and without the multi-scale module for Thorax"
    )
    assert manifest.training is not None
    assert manifest.training.data == "Task99_Thorax"
    assert manifest.validation is not None
    assert set(manifest.validation.dice) == {"lung", "heart"}


def test_weights_of_the_bundle_export_again(bundle: Bundle, tmp_path: Path) -> None:
    again = export_bundle(bundle.file("weights").path, tmp_path / "again").bundle
    assert again.file("weights").read_bytes() == bundle.file("weights").read_bytes()
    assert again.manifest == bundle.manifest


def test_cases_are_those_that_training_lists(data: DataSet) -> None:
    assert sorted(data.cases) == [f"thorax_{i}" for i in range(4)]
    case = data.cases["thorax_2"]
    assert [f.parent.name for f in (*case.case.files, case.label)] == ["imagesTr", "labelsTr"]
    assert (len(data.split["train"]), len(data.split["validation"])) == (3, 1)


def write_json(tmp_path: Path, **changes: Any) -> Path:
    """A `dataset.json` that lists one case; None takes a field out."""
    stored = {**DESCRIPTION, "training": [ENTRY], **changes}
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps({k: v for k, v in stored.items() if v is not None}))
    return file


def test_several_modalities_are_the_volumes_of_one_file(tmp_path: Path) -> None:
    modality = {"1": "T1w", "10": "T2w", "0": "FLAIR"}
    task, ((case, label),) = read_decathlon(write_json(tmp_path, modality=modality))
    assert [c.name for c in task.task.channels] == ["FLAIR", "T1w", "T2w"]
    assert task.task.display == ("FLAIR", "T1w")
    assert case.files == (tmp_path / "imagesTr" / "a.nii.gz",) * 3
    assert label == tmp_path / "labelsTr" / "a.nii.gz"


def test_label_values_need_not_follow_each_other(tmp_path: Path) -> None:
    task, _ = read_decathlon(write_json(tmp_path, labels={"5": "b", "0": "air", "2": "a"}))
    assert task.task.labels == (Label("air", 0), Label("a", 2), Label("b", 5))
    assert task.class_regions == {"a": (1,), "b": (2,)}


def test_a_data_set_without_a_name_is_called_as_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "Task07_Pancreas"
    folder.mkdir()
    assert read_decathlon(write_json(folder, name=None))[0].description == "Task07_Pancreas"


NONE = "is not a dataset.json of the Medical Segmentation Decathlon"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": None}, NONE),
        ({"training": 3}, NONE),
        ({"modality": None}, "its modality is not a mapping of numbers to names"),
        ({"modality": ["CT"]}, "its modality is not a mapping of numbers to names"),
        ({"modality": {"first": "CT"}}, "its modality is not a mapping of numbers to names"),
        ({"modality": {}}, "needs one modality at least"),
        ({"modality": {"0": "CT", "1": "CT"}}, "lists CT twice"),
        ({"labels": None}, "its labels is not a mapping of numbers to names"),
        ({"labels": {"background": 0, "lung": 1}}, "its labels is not a mapping of numbers"),
        ({"labels": {"0": "background"}}, "labels from 0 .background. to 255 at most"),
        ({"labels": {"1": "lung", "2": "heart"}}, "labels from 0 .background. to 255"),
        ({"labels": {"-1": "none", "0": "background"}}, "labels from 0 .background. to 255"),
        ({"labels": {"0": "background", "256": "lung"}}, "labels from 0 .background. to 255"),
        ({"labels": {"0": "x", "1": "y", "2": "y"}}, "lists y twice"),
        ({"labels": {"0": "x", "1": "y", "01": "z"}}, "lists 1 twice"),
        ({"training": []}, "lists no training case"),
        ({"training": ["a.nii.gz"]}, "not a pair of image and label"),
        ({"training": [{"image": "a.nii.gz"}]}, "not a pair of image and label"),
        ({"training": [ENTRY, {**ENTRY, "image": "b/a.nii"}]}, "lists case a twice"),
    ],
    ids=str,
)
def test_descriptions_that_are_none_are_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = write_json(tmp_path, **changes)
    with pytest.raises(TrainingError, match=message) as caught:
        read_decathlon(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"training"'])
def test_files_that_are_no_json_object_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(TrainingError, match=f"{NONE}|is not JSON"):
        find_labelled_cases(tmp_path)


def test_a_file_that_is_missing_is_named_unless_a_split_leaves_it_out(tmp_path: Path) -> None:
    write_thorax(tmp_path, range(3))
    missing = tmp_path / "labelsTr" / "thorax_1.nii.gz"
    missing.unlink()
    with pytest.raises(TrainingError, match=f"{missing}: does not exist, but dataset.json names"):
        open_data_set(tmp_path, None, TrainConfig())
    split = {"train": ["thorax_0"], "validation": ["thorax_2"]}
    assert open_data_set(tmp_path, split, TrainConfig()).split == split


def test_a_file_whose_name_holds_a_null_character_is_missing(tmp_path: Path) -> None:
    entry = {"image": "./imagesTr/a\0b.nii.gz", "label": "./labelsTr/a.nii.gz"}
    write_json(tmp_path, training=[entry])
    scans = find_labelled_cases(tmp_path)
    with pytest.raises(TrainingError, match="a\0b"):
        scans.refuse_faults(None)


@pytest.mark.parametrize("name", ["a" * 300, "\ud800"], ids=["long", "surrogate"])
def test_a_name_that_no_file_can_have_is_that_of_a_missing_file(tmp_path: Path, name: str) -> None:
    write_thorax(tmp_path, range(3))
    stored = json.loads((tmp_path / "dataset.json").read_text())
    stored["training"][0]["label"] = name
    (tmp_path / "dataset.json").write_text(json.dumps(stored))
    with pytest.raises(TrainingError, match=r"does not exist, but dataset\.json names it"):
        open_data_set(tmp_path, None, TrainConfig())


def test_phantoms_of_brains_are_not_mixed_into_another_task(data: DataSet, tmp_path: Path) -> None:
    config = TrainConfig(synthetic_cases=1)
    with pytest.raises(TrainingError, match="synthetic_cases are brain scans, which this task"):
        train(data, config, tmp_path / "run")
