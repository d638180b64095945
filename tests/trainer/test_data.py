from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from attnseg.runtime.errors import TrainingError
from attnseg.runtime.normalise import Normalisation, brain_box, normalise
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.data import (
    DataSet,
    PatchSampler,
    TrainingCase,
    cached_case,
    find_labelled_cases,
    learn_landmarks,
    open_data_set,
    read_split,
    split_cases,
    synthetic_cases,
)


def test_a_case_without_labels_is_named(small_scan: Path) -> None:
    (small_scan / "small" / "small_seg.nii.gz").unlink()
    with pytest.raises(TrainingError, match="case small has no label file"):
        open_data_set(small_scan, None, TrainConfig())


@pytest.mark.parametrize(
    ("values", "message"),
    [([0, 1, 2, 7], r"holds labels \[0, 1, 2, 7\]"), ([0, 1, 3, 4], r"3 in place of 4, not both")],
)
def test_labels_that_are_none_are_refused(
    small_scan: Path, tmp_path: Path, values: list[int], message: str
) -> None:
    file = small_scan / "small" / "small_seg.nii.gz"
    image = nib.load(file)
    labels = np.zeros(image.shape, np.uint8)
    labels[0, 0, : len(values)] = values
    nib.save(nib.Nifti1Image(labels, image.affine), file)
    (case,) = find_labelled_cases(small_scan).cases.values()
    with pytest.raises(TrainingError, match=message):
        cached_case(case, Normalisation(), tmp_path / "cache")


def test_enhancing_tumour_may_be_4_or_3(small_scan: Path, tmp_path: Path) -> None:
    (case,) = find_labelled_cases(small_scan).cases.values()
    older = np.array(cached_case(case, Normalisation(), tmp_path / "a").classes)
    image = nib.load(case.label)
    labels = np.asarray(image.dataobj).copy()
    labels[labels == 4] = 3
    nib.save(nib.Nifti1Image(labels, image.affine), case.label)
    newer = cached_case(case, Normalisation(), tmp_path / "b").classes
    np.testing.assert_array_equal(newer, older)
    assert set(np.unique(newer)) == {0, 1, 2, 3}


def test_a_prepared_case_is_what_the_runtime_would_see(small_scan: Path, tmp_path: Path) -> None:
    (case,) = find_labelled_cases(small_scan).cases.values()
    prepared = cached_case(case, Normalisation(), tmp_path)
    channels = [np.asarray(nib.load(f).dataobj) for f in case.case.files]
    box = brain_box(channels)
    expected = normalise([c[box] for c in channels], Normalisation())
    np.testing.assert_allclose(prepared.image, expected, atol=4e-3)
    labels = np.asarray(nib.load(case.label).dataobj)[box]
    np.testing.assert_array_equal(prepared.classes, np.array([0, 1, 2, 0, 3])[labels])


def test_a_scan_in_another_orientation_is_prepared_alike(small_scan: Path, tmp_path: Path) -> None:
    (case,) = find_labelled_cases(small_scan).cases.values()
    expected = cached_case(case, Normalisation(), tmp_path / "a")
    codes = nib.orientations.axcodes2ornt("RSA")
    for file in (*case.case.files, case.label):
        image = nib.load(file)
        turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), codes)
        nib.save(image.as_reoriented(turn), file)
    turned = cached_case(case, Normalisation(), tmp_path / "b")
    np.testing.assert_array_equal(turned.image, expected.image)
    np.testing.assert_array_equal(turned.classes, expected.classes)


def test_the_cache_is_used_for_the_same_normalisation_only(
    small_scan: Path, tmp_path: Path
) -> None:
    (case,) = find_labelled_cases(small_scan).cases.values()
    cache = tmp_path / "cache"
    cached_case(case, Normalisation(), cache)
    files = {f: f.stat().st_mtime_ns for f in cache.iterdir()}
    cached_case(case, Normalisation(), cache)
    assert {f: f.stat().st_mtime_ns for f in cache.iterdir()} == files
    cached_case(case, Normalisation("nonzero", learn_landmarks([case])), cache)
    assert len(list(cache.iterdir())) == 2 * len(files)


def test_a_changed_label_file_is_read_again(small_scan: Path, tmp_path: Path) -> None:
    (case,) = find_labelled_cases(small_scan).cases.values()
    assert cached_case(case, Normalisation(), tmp_path / "cache").classes.any()
    image = nib.load(case.label)
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), case.label)
    assert not cached_case(case, Normalisation(), tmp_path / "cache").classes.any()


def test_labels_on_another_grid_are_refused(small_scan: Path, tmp_path: Path) -> None:
    (case,) = find_labelled_cases(small_scan).cases.values()
    image = nib.load(case.label)
    flipped = image.affine @ np.diag([-1, 1, 1, 1])
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), flipped), case.label)
    with pytest.raises(TrainingError, match=r"case small: .*small_seg.nii.gz: its affine differs"):
        cached_case(case, Normalisation(), tmp_path / "cache")


def test_a_case_that_cannot_be_used_is_named(small_scan: Path, tmp_path: Path) -> None:
    (case,) = find_labelled_cases(small_scan).cases.values()
    image = nib.load(case.case.files[1])
    nib.save(nib.Nifti1Image(np.full(image.shape, 7, np.int16), image.affine), case.case.files[1])
    with pytest.raises(TrainingError, match=r"case small: .* no value but 7"):
        cached_case(case, Normalisation(), tmp_path / "cache")
    with pytest.raises(TrainingError, match=r"case small: .* no value but 7"):
        learn_landmarks([case])


def test_only_cases_of_the_split_need_labels(small_scan: Path, tmp_path: Path) -> None:
    for name in ("other", "unlabelled"):
        shutil.copytree(small_scan / "small", small_scan / name)
        for file in (small_scan / name).iterdir():
            file.rename(file.with_name(file.name.replace("small", name)))
    (small_scan / "unlabelled" / "unlabelled_seg.nii.gz").unlink()
    file = tmp_path / "split.json"
    file.write_text(json.dumps({"train": ["small"], "validation": ["other"]}))
    data = open_data_set(small_scan, read_split(file), TrainConfig())
    assert [c.name for c in data.part("validation")] == ["other"]
    file.write_text(json.dumps({"train": ["small"], "validation": ["unlabelled"]}))
    with pytest.raises(TrainingError, match="case unlabelled has no label file"):
        open_data_set(small_scan, read_split(file), TrainConfig())


def test_phantoms_are_made_once_and_counted(tmp_path: Path) -> None:
    first = synthetic_cases(2, 50, tmp_path)
    written = [c.label.stat().st_mtime_ns for c in first]
    again = synthetic_cases(1, 50, tmp_path)
    assert [c.name for c in again] == ["synthetic-50"]
    assert again[0].label.stat().st_mtime_ns == written[0]
    assert synthetic_cases(0, 50, tmp_path / "none") == []


def test_the_shipped_split_is_that_of_seed_0() -> None:
    stored = read_split(Path(__file__).parents[2] / "docs" / "brats18-split.json")
    names = stored["train"] + stored["validation"]
    assert split_cases(names, TrainConfig().validation_share, 0) == stored


def test_splits_are_disjoint_complete_and_repeatable() -> None:
    names = [f"case{i}" for i in range(30)]
    split = split_cases(names, 0.2, 0)
    assert split == split_cases(reversed(names), 0.2, 0)
    assert len(split["validation"]) == 6
    assert sorted(split["train"] + split["validation"]) == sorted(names)
    assert split != split_cases(names, 0.2, 1)
    assert len(split_cases(["a", "b"], 0.01, 0)["validation"]) == 1
    with pytest.raises(TrainingError, match="at least 2 cases"):
        split_cases(["a"], 0.2, 0)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("{", "is not a split file"),
        ('{"train": ["a"]}', "is not a split file"),
        ('{"train": [], "validation": ["a"]}', "its train list is empty"),
        ('{"train": ["a"], "validation": ["a"]}', "names a in train and in validation"),
    ],
)
def test_split_files_that_are_none_are_refused(tmp_path: Path, stored: str, message: str) -> None:
    file = tmp_path / "split.json"
    file.write_text(stored)
    with pytest.raises(TrainingError, match=message):
        read_split(file)


def test_a_split_that_names_an_absent_case_is_refused(small_scan: Path, tmp_path: Path) -> None:
    file = tmp_path / "split.json"
    file.write_text(json.dumps({"train": ["small"], "validation": ["other"]}))
    with pytest.raises(TrainingError, match="has no case other"):
        open_data_set(small_scan, read_split(file), TrainConfig())


def test_a_data_set_gives_its_parts(small_scan: Path) -> None:
    cases = find_labelled_cases(small_scan).cases
    data = DataSet("set", cases, {"train": ["small"], "validation": []})
    assert [c.name for c in data.part("train")] == ["small"]


def two_voxel_case(shape: tuple[int, int, int] = (40, 40, 40)) -> TrainingCase:
    classes = np.zeros(shape, np.uint8)
    classes[0, 0, 0], classes[20, 20, 20] = 1, 3
    image = (np.arange(np.prod(shape)) % 2048).reshape(1, *shape).astype(np.float16)
    return TrainingCase("case", image, classes)


def test_patches_hold_tumour_as_often_as_asked() -> None:
    for share, expected in ((1.0, 1.0), (0.0, 0.0)):
        sampler = PatchSampler([two_voxel_case((200, 40, 40))], 8, share)
        rng = np.random.default_rng(0)
        found = np.mean([bool(sampler.draw(rng)[2].any()) for _ in range(50)])
        assert found == pytest.approx(expected, abs=0.1)


def test_each_class_is_centred_on_equally_often() -> None:
    classes = np.zeros((40, 40, 40), np.uint8)
    classes[8:30, 8:30, 8:20], classes[8:12, 8:12, 25], classes[20, 20, 28] = 1, 2, 3
    case = TrainingCase("c", np.zeros((1, 40, 40, 40), np.float16), classes)
    sampler = PatchSampler([case], 8, 1.0)
    rng = np.random.default_rng(0)
    centres = [int(sampler.draw(rng)[2][4, 4, 4]) for _ in range(300)]
    for value in (1, 2, 3):
        assert centres.count(value) == pytest.approx(100, abs=30)


def test_a_patch_is_a_cube_of_the_case_wherever_it_lies() -> None:
    sampler = PatchSampler([two_voxel_case()], 16, 0.5)
    rng = np.random.default_rng(1)
    source = two_voxel_case().image.astype(np.float32)[0]
    for _ in range(20):
        name, image, classes = sampler.draw(rng)
        assert (name, tuple(image.shape), tuple(classes.shape)) == (
            "case",
            (1, 16, 16, 16),
            (16, 16, 16),
        )
        windows = np.lib.stride_tricks.sliding_window_view(source, (16, 16, 16))
        assert (windows[:, :, :, 0, 0, 0] == image[0, 0, 0, 0].item()).any()


def test_a_case_smaller_than_the_patch_is_padded_with_zeros() -> None:
    case = TrainingCase("c", np.ones((1, 4, 9, 9), np.float16), np.ones((4, 9, 9), np.uint8))
    _, image, classes = PatchSampler([case], 8, 1.0).draw(np.random.default_rng(0))
    assert image.shape == (1, 8, 8, 8)
    assert classes.sum() == 4 * 8 * 8
    assert (image[0, 2:6] == 1).all()
    assert not image[0, :2].any()


def test_the_same_seed_draws_the_same_patches() -> None:
    sampler = PatchSampler([two_voxel_case()], 8, 0.5)
    first, second = (
        [sampler.draw(np.random.default_rng(3))[1].sum().item() for _ in range(3)] for _ in range(2)
    )
    assert first == second
