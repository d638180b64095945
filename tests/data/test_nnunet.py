from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from attnseg.data.labelled import find_labelled_cases, read_classes
from attnseg.data.nnunet import read_nnunet
from attnseg.evaluation.cases import read_truth
from attnseg.runtime.case.nifti import read_volume
from attnseg.runtime.case.scans import find_cases
from attnseg.runtime.errors import TrainingError
from attnseg.runtime.task import Channel, Label, Output
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.data_set import open_data_set

# The example of nnU-Net's documentation.
PROSTATE: dict[str, Any] = {
    "channel_names": {"0": "T2", "1": "ADC"},
    "labels": {"background": 0, "PZ": 1, "TZ": 2},
    "numTraining": 3,
    "file_ending": ".nii.gz",
    "overwrite_image_reader_writer": "SimpleITKIO",
}
NAMES = ("prostate_00", "prostate_01", "prostate_02")


def save(file: Path, array: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([0.5, 0.5, 3.0, 1.0])), file)


def describe(root: Path, **changes: Any) -> Path:
    """Write a `dataset.json`; None takes a field out."""
    stored = {key: value for key, value in {**PROSTATE, **changes}.items() if value is not None}
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(stored))
    return root / "dataset.json"


def images_of(index: int) -> list[np.ndarray]:
    grey = np.arange(1, 121, dtype=np.int16).reshape(4, 5, 6) + 1000 * index
    return [grey, grey[::-1].copy()]


LABELS = (np.arange(120).reshape(4, 5, 6) % 3).astype(np.uint8)


def write_prostate(root: Path, ending: str = ".nii.gz", **changes: Any) -> Path:
    for index, name in enumerate(NAMES):
        for channel, image in enumerate(images_of(index)):
            save(root / "imagesTr" / f"{name}_{channel:04}{ending}", image)
        save(root / "labelsTr" / f"{name}{ending}", LABELS)
    return describe(root, file_ending=ending, **changes)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_a_data_set_is_read_as_its_description_says(tmp_path: Path, ending: str) -> None:
    write_prostate(tmp_path / "Dataset005_Prostate", ending)
    scans = find_labelled_cases(tmp_path / "Dataset005_Prostate")
    assert not scans.faults
    assert tuple(scans.cases) == NAMES
    task = scans.task.task
    assert task.channels == (Channel("T2", ("_0000",)), Channel("ADC", ("_0001",)))
    assert task.labels == (Label("background", 0), Label("PZ", 1), Label("TZ", 2))
    assert task.regions == {"PZ": (1,), "TZ": (2,)}
    assert scans.task.description == "Dataset005_Prostate"
    case = scans.cases["prostate_01"]
    volume = read_volume(case.case.files)
    for channel, image in zip(volume.channels, images_of(1), strict=True):
        np.testing.assert_array_equal(channel, image)
    np.testing.assert_array_equal(read_classes(case, scans.task).channels[0], LABELS)
    np.testing.assert_array_equal(read_truth(case, scans.task), LABELS)


def test_a_model_of_the_task_finds_scans_that_are_named_by_nnunet(tmp_path: Path) -> None:
    write_prostate(tmp_path)
    channels = find_labelled_cases(tmp_path).task.task.channels
    cases = find_cases(tmp_path / "imagesTr", channels).cases
    assert [case.name for case in cases] == list(NAMES)
    assert [f.name for f in cases[0].files] == [
        "prostate_00_0000.nii.gz",
        "prostate_00_0001.nii.gz",
    ]


def test_it_is_a_data_set_to_train_on(tmp_path: Path) -> None:
    write_prostate(tmp_path)
    data = open_data_set(tmp_path, None, TrainConfig())
    assert sorted(data.cases) == list(NAMES)
    assert (len(data.split["train"]), len(data.split["validation"])) == (2, 1)
    assert data.task.spacing_mm == (0.5, 0.5, 3.0)


def test_modality_is_read_in_place_of_channel_names(tmp_path: Path) -> None:
    write_prostate(tmp_path, channel_names=None, modality={"1": "ADC", "0": "T2"})
    assert find_labelled_cases(tmp_path).task.task.channel_names == ("T2", "ADC")


def test_channels_of_one_name_are_numbered(tmp_path: Path) -> None:
    task, _ = read_nnunet(write_prostate(tmp_path, channel_names={"0": "zscore", "1": "zscore"}))
    assert task.task.channel_names == ("zscore 0", "zscore 1")


def test_a_dataset_entry_lists_files_of_any_name(tmp_path: Path) -> None:
    for channel, image in enumerate(images_of(0)):
        save(tmp_path / "scans" / f"{channel}.nii.gz", image)
    save(tmp_path / "truth.nii.gz", LABELS)
    entry = {"images": ["scans/0.nii.gz", "./scans/1.nii.gz"], "label": "truth.nii.gz"}
    describe(tmp_path, numTraining=1, dataset={"p1": entry})
    (case,) = find_labelled_cases(tmp_path).cases.values()
    assert case.name == "p1"
    assert [f.name for f in case.case.files] == ["0.nii.gz", "1.nii.gz"]
    assert case.label == tmp_path / "truth.nii.gz"


@pytest.mark.parametrize(
    "missing", ["imagesTr/prostate_01_0001.nii.gz", "labelsTr/prostate_01.nii.gz"]
)
def test_a_missing_file_is_named_unless_a_split_leaves_its_case_out(
    tmp_path: Path, missing: str
) -> None:
    write_prostate(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(TrainingError, match=rf"{missing}: does not exist"):
        open_data_set(tmp_path, None, TrainConfig())
    split = {"train": ["prostate_00"], "validation": ["prostate_02"]}
    assert open_data_set(tmp_path, split, TrainConfig()).split == split


def test_regions_are_read_to_evaluate_and_refused_to_train(tmp_path: Path) -> None:
    write_prostate(
        tmp_path,
        labels={"background": 0, "gland": [1, 2], "TZ": 2},
        regions_class_order=[1, 2],
    )
    scans = find_labelled_cases(tmp_path)
    task = scans.task.task
    assert task.labels == (Label("background", 0), Label("label 1", 1), Label("TZ", 2))
    assert task.regions == {"gland": (1, 2), "TZ": (2,)}
    assert task.outputs == (Output("gland", 1, (0,)), Output("TZ", 2, (1,)))
    np.testing.assert_array_equal(read_truth(scans.cases["prostate_00"], scans.task), LABELS)
    with pytest.raises(TrainingError, match=r"regions \(gland, TZ\), which cannot be trained on"):
        open_data_set(tmp_path, None, TrainConfig())


def test_an_order_of_regions_without_regions_is_ignored_as_by_nnunet(tmp_path: Path) -> None:
    task, _ = read_nnunet(write_prostate(tmp_path, regions_class_order=[1, 2]))
    assert task.task.outputs == ()
    assert task.task.regions == {"PZ": (1,), "TZ": (2,)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"labels": {"background": 0, "whole": [1, 2], "core": [2]}},
            r"has regions \(whole, core\), and regions_class_order is None; list the label",
        ),
        (
            {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1]},
            r"regions_class_order has 1 entries for 2 regions \(whole, core\)",
        ),
        (
            {"labels": {"background": 0, "whole": [1, 2]}, "regions_class_order": [7]},
            "output whole names an unknown region or label",
        ),
        ({"labels": {"background": 0, "PZ": []}}, r"label PZ has the value \[\]"),
        (
            {"labels": {"background": 0, "PZ": 1, "ignore": 2}},
            r"has an ignore label \(2\), and its voxels have no expert label",
        ),
        ({"labels": {"0": "background", "1": "PZ"}}, "label 0 has the value 'background'"),
        ({"labels": {"background": 0, "PZ": 1.5}}, r"label PZ has the value 1\.5"),
        ({"labels": {"background": 0, "PZ": True}}, "label PZ has the value True"),
        ({"labels": {"PZ": 1, "TZ": 2}}, "no label has the value 0; add .background.: 0"),
        ({"labels": {"background": 0, "PZ": 1, "TZ": 1}}, "lists 1 twice"),
        ({"labels": ["background", "PZ"]}, "its labels is not a mapping of names to numbers"),
        ({"labels": None}, "its labels is not a mapping of names to numbers"),
        ({"channel_names": None}, "its channel_names is not a mapping of numbers to names"),
        ({"channel_names": {"0": "T2", "2": "ADC"}}, r"numbers its channel_names \[0, 2\]"),
        ({"channel_names": {"0": "T2"}}, r"_0001\.nii\.gz: is of channel 1, and dataset\.json"),
        ({"file_ending": ".nrrd"}, r"file_ending '\.nrrd', which is not supported; convert"),
        ({"numTraining": 32}, r"promises 32 cases \(numTraining\), and has 3"),
        ({"dataset": ["a"]}, "its dataset is not a mapping"),
        ({"dataset": {"a": {"images": ["a.nii.gz"]}}}, "case a of its dataset is not a pair"),
        (
            {"dataset": {"a": {"images": ["a.nii.gz"], "label": "b.nii.gz"}}},
            r"case a of its dataset has 1 images, and the data set 2 channel\(s\)",
        ),
        ({"dataset": {}}, "has no training case"),
    ],
    ids=str,
)
def test_descriptions_that_cannot_be_used_are_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_prostate(tmp_path)
    describe(tmp_path, **changes)
    with pytest.raises(TrainingError, match=message) as caught:
        find_labelled_cases(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


def test_a_description_without_folders_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"imagesTr: cannot be read .* keep imagesTr and"):
        read_nnunet(describe(tmp_path))


def test_a_byte_order_mark_is_skipped_and_broken_json_is_located(tmp_path: Path) -> None:
    file = write_prostate(tmp_path)
    text = file.read_text()
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(find_labelled_cases(tmp_path).cases) == 3
    file.write_text(text.replace('"TZ": 2}', '"TZ": 2,}'))
    with pytest.raises(TrainingError, match="is not JSON: a comma before the closing"):
        find_labelled_cases(tmp_path)
