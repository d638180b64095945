from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from attnseg.data.labelled import LabelledCase, find_labelled_cases
from attnseg.data.task import BRATS
from attnseg.runtime.case.nifti import read_volume
from attnseg.runtime.errors import TrainingError
from attnseg.runtime.steps.foreground import foreground_box
from attnseg.runtime.steps.normalise import normalise
from attnseg.runtime.steps.preprocess import preprocess
from attnseg.runtime.steps.resample import Grid, resample
from attnseg.runtime.steps.schemes import Scheme, ZScore
from attnseg.synthetic import make_case
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.data import (
    BatchFeed,
    PatchSampler,
    TrainingCase,
    at_half_resolution,
    cached_case,
    synthetic_cases,
)
from attnseg.trainer.preparation import Preparation, config_grid, learn_preparation
from tests.conftest import PLAIN

PREPARATION = Preparation(BRATS, PLAIN)


def learned(cases: Sequence[LabelledCase]) -> tuple[Scheme, ...]:
    """Normalisation with the landmarks of `cases`."""
    return learn_preparation(cases, BRATS, TrainConfig()).preprocessing.normalisation


def test_a_prepared_case_is_what_the_runtime_would_see(small_scan: Path, tmp_path: Path) -> None:
    (case,) = find_labelled_cases(small_scan).cases.values()
    prepared = cached_case(case, PREPARATION, tmp_path)
    channels = [np.asarray(nib.load(f).dataobj) for f in case.case.files]
    box = foreground_box(channels).slices()
    expected = normalise([c[box] for c in channels], PLAIN.normalisation)
    np.testing.assert_allclose(prepared.image, expected, atol=4e-3)
    labels = np.asarray(nib.load(case.label).dataobj)[box]
    np.testing.assert_array_equal(prepared.classes, np.array([0, 1, 2, 0, 3])[labels])


def test_a_scan_in_another_orientation_is_prepared_alike(small_scan: Path, tmp_path: Path) -> None:
    (case,) = find_labelled_cases(small_scan).cases.values()
    expected = cached_case(case, PREPARATION, tmp_path / "a")
    codes = nib.orientations.axcodes2ornt("RSA")
    for file in (*case.case.files, case.label):
        image = nib.load(file)
        turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), codes)
        nib.save(image.as_reoriented(turn), file)
    turned = cached_case(case, PREPARATION, tmp_path / "b")
    np.testing.assert_array_equal(turned.image, expected.image)
    np.testing.assert_array_equal(turned.classes, expected.classes)


def test_the_cache_is_used_for_the_same_normalisation_only(
    small_scan: Path, tmp_path: Path
) -> None:
    (case,) = find_labelled_cases(small_scan).cases.values()
    cache = tmp_path / "cache"
    cached_case(case, PREPARATION, cache)
    files = {f: f.stat().st_mtime_ns for f in cache.iterdir()}
    cached_case(case, PREPARATION, cache)
    assert {f: f.stat().st_mtime_ns for f in cache.iterdir()} == files
    matched = replace(PLAIN, normalisation=learned([case]))
    cached_case(case, Preparation(BRATS, matched), cache)
    assert len(list(cache.iterdir())) == 2 * len(files)


def test_a_changed_label_file_is_read_again(small_scan: Path, tmp_path: Path) -> None:
    (case,) = find_labelled_cases(small_scan).cases.values()
    assert cached_case(case, PREPARATION, tmp_path / "cache").classes.any()
    image = nib.load(case.label)
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), case.label)
    assert not cached_case(case, PREPARATION, tmp_path / "cache").classes.any()


def test_a_case_that_cannot_be_used_is_named(small_scan: Path, tmp_path: Path) -> None:
    (case,) = find_labelled_cases(small_scan).cases.values()
    image = nib.load(case.case.files[1])
    nib.save(nib.Nifti1Image(np.full(image.shape, 7, np.int16), image.affine), case.case.files[1])
    with pytest.raises(TrainingError, match=r"case small: t1ce .*: is constant \(7\)"):
        cached_case(case, PREPARATION, tmp_path / "cache")
    with pytest.raises(TrainingError, match=r"case small: t1ce .*: is constant \(7\)"):
        learned([case])


@pytest.mark.parametrize("grid", [Grid(shape=(40, 40, 32)), Grid(spacing_mm=(2.0, 2.0, 3.0))])
def test_a_case_is_prepared_on_the_grid_with_its_labels(
    small_scan: Path, tmp_path: Path, grid: Grid
) -> None:
    (case,) = find_labelled_cases(small_scan).cases.values()
    placed = replace(PLAIN, grid=grid)
    prepared = cached_case(case, Preparation(BRATS, placed), tmp_path)
    seen = preprocess(read_volume(case.case.files), placed)
    np.testing.assert_allclose(prepared.image, seen.image, atol=4e-3)
    labels = np.asarray(nib.load(case.label).dataobj)
    moved = resample(labels, seen.grid_shape, nearest=True)[seen.box.slices()]
    np.testing.assert_array_equal(prepared.classes, np.array([0, 1, 2, 0, 3])[moved])
    assert set(np.unique(prepared.classes)) == {0, 1, 2, 3}


def test_the_config_asks_for_a_shape_a_spacing_or_neither() -> None:
    assert config_grid(TrainConfig()) is None
    assert config_grid(TrainConfig(resize=(8, 9, 10))) == Grid(shape=(8, 9, 10))
    assert config_grid(TrainConfig(spacing_mm=(1, 1, 2))) == Grid(spacing_mm=(1, 1, 2))


@pytest.mark.parametrize(
    ("foreground", "task", "expected"),
    [("task", "nonzero", "nonzero"), ("task", "all", "all"), ("all", "nonzero", "all")],
)
def test_the_foreground_is_the_tasks_unless_the_config_names_one(
    small_scan: Path, foreground: str, task: str, expected: str
) -> None:
    cases = find_labelled_cases(small_scan).cases.values()
    config = TrainConfig(foreground=foreground, histogram_matching=False)
    preparation = learn_preparation(list(cases), replace(BRATS, foreground=task), config)
    assert preparation.preprocessing == replace(
        PLAIN, crop=expected, normalisation=(ZScore(expected),) * 4
    )


def test_landmarks_are_the_mean_over_the_training_cases(small_scan: Path) -> None:
    (case,) = find_labelled_cases(small_scan).cases.values()
    first = learned([case])
    for file in case.case.files[:1]:  # invert the z-scores of t1
        image = nib.load(file)
        array = np.asarray(image.dataobj)
        turned = np.where(array > 0, array.max() + 1 - array, 0).astype(np.int16)
        nib.save(nib.Nifti1Image(turned, image.affine), file)
    second = learned([case])
    assert learned([case, case]) == second
    np.testing.assert_allclose(second[0].values, -np.array(first[0].values)[::-1], atol=1e-5)
    assert second[1:] == first[1:]


def test_the_largest_foreground_is_that_of_the_training_cases(small_scan: Path) -> None:
    (case,) = find_labelled_cases(small_scan).cases.values()
    arrays = [np.asarray(nib.load(file).dataobj) for file in case.case.files]
    voxels = np.count_nonzero(np.any(np.stack(arrays) != 0, axis=0))
    for matching in (True, False):
        config = TrainConfig(histogram_matching=matching)
        assert learn_preparation([case], BRATS, config).foreground_ml == round(voxels / 1000, 1)
    config = TrainConfig(histogram_matching=False, foreground="all")
    every = learn_preparation([case], BRATS, config)
    assert every.foreground_ml is None
    assert Preparation.from_dict(every.to_dict()) == every


@pytest.mark.parametrize("background", [-1024, 300])
def test_a_background_that_run_refuses_is_refused_before_training(
    small_scan: Path, tmp_path: Path, background: int
) -> None:
    (case,) = find_labelled_cases(small_scan).cases.values()
    for file in case.case.files:
        image = nib.load(file)
        array = np.asarray(image.dataobj)
        shifted = np.where(array == 0, background, array).astype(np.int16)
        nib.save(nib.Nifti1Image(shifted, image.affine), file)
    message = rf"case small: t1 \(small_t1\.nii\.gz\): its background is {background}, not 0"
    with pytest.raises(TrainingError, match=message):
        learn_preparation([case], BRATS, TrainConfig())
    with pytest.raises(TrainingError, match=message):
        cached_case(case, PREPARATION, tmp_path)


def test_dust_is_cut_before_training_and_the_log_says_so(
    small_scan: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (case,) = find_labelled_cases(small_scan).cases.values()
    clean = cached_case(case, PREPARATION, tmp_path / "clean")
    for file in case.case.files[1:]:
        image = nib.load(file)
        array = np.asarray(image.dataobj, np.float32)
        dusty = np.where(array == 0, np.float32(1e-5), array)
        nib.save(nib.Nifti1Image(dusty, image.affine), file)
    dusty = cached_case(case, PREPARATION, tmp_path / "dusty")
    np.testing.assert_allclose(dusty.image, clean.image, atol=2e-3)
    assert "warning: case small: t1ce (small_t1ce.nii.gz), t2" in caplog.text
    assert "the background is not 0" in caplog.text


def test_images_of_few_grey_values_are_refused_with_advice(small_scan: Path) -> None:
    (case,) = find_labelled_cases(small_scan).cases.values()
    image = nib.load(case.case.files[0])
    few = (np.asarray(image.dataobj) > 0) * np.int16(1)
    few[40:] *= 2
    nib.save(nib.Nifti1Image(few, image.affine), case.case.files[0])
    with pytest.raises(TrainingError, match=r"too few grey values .* histogram_matching=False"):
        learned([case])


def test_phantoms_are_made_once_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnseg.trainer.data.make_case", lambda s: make_case(s, (48, 48, 48)))
    first = synthetic_cases(2, 50, tmp_path)
    written = [c.label.stat().st_mtime_ns for c in first]
    again = synthetic_cases(1, 50, tmp_path)
    assert [c.name for c in again] == ["synthetic-50"]
    assert again[0].label.stat().st_mtime_ns == written[0]
    assert synthetic_cases(0, 50, tmp_path / "none") == []


def two_voxel_case(shape: tuple[int, int, int] = (40, 40, 40)) -> TrainingCase:
    classes = np.zeros(shape, np.uint8)
    classes[0, 0, 0], classes[20, 20, 20] = 1, 3
    image = (np.arange(np.prod(shape)) % 2048).reshape(1, *shape).astype(np.float16)
    return TrainingCase("case", image, classes)


def test_patches_hold_tumour_as_often_as_asked() -> None:
    for share, expected in ((1.0, 1.0), (0.0, 0.0)):
        sampler = PatchSampler([two_voxel_case((200, 40, 40))], 8, share, classes=4)
        rng = np.random.default_rng(0)
        found = np.mean([bool(sampler.draw(rng)[2].any()) for _ in range(50)])
        assert found == pytest.approx(expected, abs=0.1)


def test_each_class_is_centred_on_equally_often() -> None:
    classes = np.zeros((40, 40, 40), np.uint8)
    classes[8:30, 8:30, 8:20], classes[8:12, 8:12, 25], classes[20, 20, 28] = 1, 2, 3
    case = TrainingCase("c", np.zeros((1, 40, 40, 40), np.float16), classes)
    sampler = PatchSampler([case], 8, 1.0, classes=4)
    rng = np.random.default_rng(0)
    centres = [int(sampler.draw(rng)[2][4, 4, 4]) for _ in range(300)]
    for value in (1, 2, 3):
        assert centres.count(value) == pytest.approx(100, abs=30)


def test_a_patch_is_a_cube_of_the_case_wherever_it_lies() -> None:
    sampler = PatchSampler([two_voxel_case()], 16, 0.5, classes=4)
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


def test_patches_at_half_the_resolution_hold_means_and_the_most_frequent_class() -> None:
    image = torch.arange(8.0).reshape(1, 2, 2, 2)
    classes = torch.tensor([0, 0, 1, 1, 3, 3, 3, 2]).reshape(2, 2, 2)
    halved, most = at_half_resolution(image, classes, 4)
    assert (halved.item(), most.item()) == (3.5, 3)
    ramp = np.broadcast_to(np.arange(64.0), (1, 64, 64, 64)).astype(np.float16)
    case = TrainingCase("c", ramp, np.zeros((64, 64, 64), np.uint8))
    for share, step in ((1.0, 2.0), (0.0, 1.0)):
        sampler = PatchSampler([case], 8, 0.5, classes=4, half_resolution_share=share)
        _, found, labels = sampler.draw(np.random.default_rng(0))
        assert (found.shape, labels.shape) == ((1, 8, 8, 8), (8, 8, 8))
        assert (found.diff(dim=3) == step).all()


def test_a_case_smaller_than_the_patch_is_padded_with_zeros() -> None:
    case = TrainingCase("c", np.ones((1, 4, 9, 9), np.float16), np.ones((4, 9, 9), np.uint8))
    _, image, classes = PatchSampler([case], 8, 1.0, classes=4).draw(np.random.default_rng(0))
    assert image.shape == (1, 8, 8, 8)
    assert classes.sum() == 4 * 8 * 8
    assert (image[0, 2:6] == 1).all()
    assert not image[0, :2].any()


def test_the_same_seed_draws_the_same_patches() -> None:
    sampler = PatchSampler([two_voxel_case()], 8, 0.5, classes=4)
    first, second = (
        [sampler.draw(np.random.default_rng(3))[1].sum().item() for _ in range(3)] for _ in range(2)
    )
    assert first == second


@contextmanager
def open_feed(rng: np.random.Generator) -> Iterator[BatchFeed]:
    feed = BatchFeed(PatchSampler([two_voxel_case()], 8, 0.5, classes=4), 2, rng)
    try:
        yield feed
    finally:
        feed.close()


def test_a_feed_gives_the_batches_that_the_sampler_draws() -> None:
    sampler, rng = PatchSampler([two_voxel_case()], 8, 0.5, classes=4), np.random.default_rng(5)
    with open_feed(np.random.default_rng(5)) as feed:
        for _ in range(3):
            batch, drawn = feed.take(), [sampler.draw(rng) for _ in range(2)]
            assert batch.names == ("case", "case")
            assert torch.equal(batch.images, torch.stack([d[1] for d in drawn]))
            assert torch.equal(batch.labels, torch.stack([d[2] for d in drawn]))


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_the_state_of_a_feed_draws_the_next_batch_again(taken: int) -> None:
    with open_feed(np.random.default_rng(7)) as feed:
        for _ in range(taken):
            feed.take()
        state = feed.state
        after = [feed.take() for _ in range(2)]
    rng = np.random.default_rng(99)
    rng.bit_generator.state = state
    with open_feed(rng) as again:
        for batch in after:
            assert torch.equal(again.take().images, batch.images)


def test_what_goes_wrong_while_drawing_is_raised_where_the_batch_is_taken() -> None:
    empty = PatchSampler([], 8, 0.5, classes=4)
    feed = BatchFeed(empty, 2, np.random.default_rng(0))
    with pytest.raises(ValueError, match="high <= 0"):
        feed.take()
    feed.close()
