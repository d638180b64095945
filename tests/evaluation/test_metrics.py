from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from medpy.metric import binary as medpy
from monai.metrics import (
    compute_confusion_matrix_metric,
    compute_dice,
    compute_hausdorff_distance,
    get_confusion_matrix,
)
from monai.metrics.utils import get_edge_surface_distance
from scipy import ndimage

from attnseg.data.task import BRATS
from attnseg.evaluation.metrics import (
    EMPTY_HD95_MM,
    Scores,
    dice,
    hd95_mm,
    lesion_wise_dice,
    region_dice,
    score,
    score_structures,
    sensitivity,
    specificity,
)
from attnseg.runtime.case.scans import LABEL_SUFFIXES, find_cases, find_siblings
from attnseg.runtime.errors import TrainingError

Voxel = tuple[int, int, int]
MM = (1.0, 1.0, 1.0)

masks = hnp.arrays(bool, (4, 4, 4), elements=st.booleans())
shapes = st.sampled_from([(6, 6, 6), (24, 17, 9), (3, 40, 11), (1, 12, 30)])
spacings = st.sampled_from([MM, (0.5, 0.5, 5.0), (2.0, 0.7, 1.3), (0.9375, 0.9375, 1.2)])


def mask_of(*voxels: Voxel, shape: Voxel = (20, 20, 20)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for voxel in voxels:
        mask[voxel] = True
    return mask


@st.composite
def blobs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Two masks of one shape, never empty: smooth noise above a quantile."""
    shape = draw(shapes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    fields = [
        ndimage.gaussian_filter(rng.normal(size=shape), draw(st.sampled_from([0, 1, 2.5])))
        for _ in range(2)
    ]
    first, second = (f > np.quantile(f, draw(st.sampled_from([0.5, 0.8, 0.99]))) for f in fields)
    return first, second


def monais(mask: np.ndarray) -> torch.Tensor:
    """The mask as MONAI's `(B, C, X, Y, Z)`."""
    return torch.from_numpy(mask)[None, None].float()


# Dice


@given(masks, masks)
def test_dice_is_medpys(prediction: np.ndarray, truth: np.ndarray) -> None:
    if prediction.any() or truth.any():
        assert dice(prediction, truth) == pytest.approx(medpy.dc(prediction, truth))


@given(blobs())
def test_dice_sensitivity_and_specificity_are_monais(pair: tuple[np.ndarray, np.ndarray]) -> None:
    prediction, truth = (monais(mask) for mask in pair)
    assert dice(*pair) == pytest.approx(compute_dice(prediction, truth).item())
    counts = get_confusion_matrix(prediction, truth)
    for ours in (sensitivity, specificity):
        theirs = compute_confusion_matrix_metric(ours.__name__, counts).item()
        assert ours(*pair) == pytest.approx(theirs)


def test_dice_of_empty_masks_follows_brats() -> None:
    empty, one = np.zeros((2, 2, 2), bool), np.ones((2, 2, 2), bool)
    assert dice(empty, empty) == 1
    assert dice(empty, one) == dice(one, empty) == 0


def test_regions_join_their_labels_by_hand() -> None:
    truth = np.array([0, 1, 2, 4]).reshape(1, 2, 2)
    prediction = np.array([0, 2, 2, 4]).reshape(1, 2, 2)
    result = region_dice(prediction, truth, {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)})
    assert result == {"WT": 1, "TC": pytest.approx(2 / 3), "ET": 1}


# Sensitivity and specificity


def test_sensitivity_and_specificity_by_hand() -> None:
    truth = np.array([1, 1, 1, 1, 0, 0, 0, 0], bool).reshape(2, 2, 2)
    prediction = np.array([1, 1, 1, 0, 1, 1, 0, 0], bool).reshape(2, 2, 2)
    assert sensitivity(prediction, truth) == 3 / 4
    assert specificity(prediction, truth) == 2 / 4


def test_nothing_to_find_is_nothing_missed() -> None:
    empty, full = np.zeros((2, 2, 2), bool), np.ones((2, 2, 2), bool)
    assert sensitivity(empty, empty) == sensitivity(full, empty) == 1
    assert specificity(empty, full) == specificity(full, full) == 1
    assert sensitivity(empty, full) == specificity(full, empty) == 0


@given(blobs())
def test_sensitivity_and_specificity_are_medpys(pair: tuple[np.ndarray, np.ndarray]) -> None:
    assert sensitivity(*pair) == pytest.approx(medpy.sensitivity(*pair))
    assert specificity(*pair) == pytest.approx(medpy.specificity(*pair))


# HD95


@pytest.mark.parametrize(
    ("other", "distance_mm"), [((7, 2, 2), 5), ((2, 7, 2), 10), ((2, 2, 7), 15), ((5, 4, 2), 5)]
)
def test_two_single_voxels_are_as_far_apart_as_their_spacing_says(
    other: Voxel, distance_mm: float
) -> None:
    prediction, truth = mask_of((2, 2, 2)), mask_of(other)
    assert hd95_mm(prediction, truth, (1, 2, 3)) == pytest.approx(distance_mm)
    assert hd95_mm(truth, prediction, (1, 2, 3)) == pytest.approx(distance_mm)


def test_the_distances_of_both_directions_are_pooled() -> None:
    # Two voxels against one of them: forward 0 and 10 mm, backward 0 mm, so the 95th percentile
    # of 0, 0, 10 lies at 0.95 * 2 = 1.9, nine tenths of the way from 0 to 10. The larger
    # percentile of the two directions would be 9.5.
    prediction, truth = mask_of((2, 2, 2), (12, 2, 2)), mask_of((2, 2, 2))
    assert hd95_mm(prediction, truth, MM) == pytest.approx(9)


def test_the_inside_of_a_mask_is_no_surface() -> None:
    cube = np.ones((3, 3, 3), bool)
    centre = mask_of((1, 1, 1), shape=(3, 3, 3))
    # Forward: 6 faces at 1 mm, 12 edges at sqrt 2, 8 corners at sqrt 3; backward: 1 mm.
    distances = [1] * 6 + [2**0.5] * 12 + [3**0.5] * 8 + [1]
    assert hd95_mm(cube, centre, MM) == pytest.approx(np.percentile(distances, 95))


def test_hd95_of_empty_masks_follows_brats() -> None:
    empty, one = mask_of(), mask_of((3, 3, 3))
    assert hd95_mm(empty, empty, MM) == 0
    assert hd95_mm(empty, one, MM) == hd95_mm(one, empty, MM) == EMPTY_HD95_MM
    assert pytest.approx(np.hypot(np.hypot(240, 240), 155), abs=5e-3) == EMPTY_HD95_MM


@given(blobs(), spacings)
def test_hd95_is_medpys(
    pair: tuple[np.ndarray, np.ndarray], spacing_mm: tuple[float, float, float]
) -> None:
    expected = medpy.hd95(*pair, voxelspacing=spacing_mm)
    assert hd95_mm(*pair, spacing_mm) == pytest.approx(expected)


@given(masks, masks)
def test_hd95_of_any_small_masks_is_medpys(prediction: np.ndarray, truth: np.ndarray) -> None:
    if prediction.any() and truth.any():
        expected = medpy.hd95(prediction, truth, voxelspacing=(1, 2, 3))
        assert hd95_mm(prediction, truth, (1, 2, 3)) == pytest.approx(expected)


# MONAI's percentile is the larger of the two directions, not that of the pooled distances. Its
# distances, pooled here, and its maximum, which bounds every percentile, can be compared.
# MONAI 1.5 and 1.6 warn about an argument that they pass themselves.
@pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges:FutureWarning")
@given(blobs(), spacings)
@settings(max_examples=30)
def test_hd95_pools_the_distances_that_monai_finds(
    pair: tuple[np.ndarray, np.ndarray], spacing_mm: tuple[float, float, float]
) -> None:
    prediction, truth = (monais(mask) for mask in pair)
    _, distances, _ = get_edge_surface_distance(
        prediction[0, 0], truth[0, 0], spacing=spacing_mm, symmetric=True
    )
    ours = hd95_mm(*pair, spacing_mm)
    assert ours == pytest.approx(np.percentile(torch.cat(distances).numpy(), 95), rel=1e-5)
    maximum = compute_hausdorff_distance(
        prediction, truth, include_background=True, spacing=spacing_mm
    )
    assert ours <= maximum.item() * (1 + 1e-6)


# Lesion-wise Dice


def test_every_lesion_counts_the_same() -> None:
    # A lesion of 8 voxels found whole, one of 1 voxel missed.
    truth = mask_of((15, 15, 15))
    truth[2:4, 2:4, 2:4] = True
    prediction = truth & ~mask_of((15, 15, 15))
    assert lesion_wise_dice(prediction, truth) == 1 / 2
    assert dice(prediction, truth) == 16 / 17


def test_a_component_that_reaches_no_lesion_scores_zero() -> None:
    truth = mask_of((2, 2, 2))
    prediction = mask_of((2, 2, 2), (15, 15, 15), (15, 2, 2))
    assert lesion_wise_dice(prediction, truth) == pytest.approx(1 / 3)
    assert lesion_wise_dice(prediction, mask_of()) == 0


@pytest.mark.parametrize(("gap", "lesions"), [(7, 1), (8, 2)])
def test_parts_whose_dilations_touch_are_one_lesion(gap: int, lesions: int) -> None:
    # Dilated by 3, two voxels 7 apart are neighbours; 8 apart, a voxel stays between them.
    truth = mask_of((2, 2, 2), (2 + gap, 2, 2))
    prediction = mask_of((2, 2, 2))
    expected = {1: 2 / 3, 2: (1 + 0) / 2}[lesions]
    assert lesion_wise_dice(prediction, truth) == pytest.approx(expected)


@pytest.mark.parametrize(("gap", "expected"), [(3, 2 / 3), (4, 1 / 2)])
def test_a_component_serves_the_lesion_into_whose_dilation_it_reaches(
    gap: int, expected: float
) -> None:
    # Near, it adds to the lesion's prediction: 2 * 1 / (1 + 2). Far, it is a false positive.
    truth = mask_of((2, 2, 2))
    prediction = mask_of((2, 2, 2), (2 + gap, 2, 2))
    assert lesion_wise_dice(prediction, truth) == pytest.approx(expected)


def test_a_component_may_serve_two_lesions() -> None:
    truth = mask_of((2, 2, 2), (12, 2, 2))
    prediction = mask_of(*((x, 2, 2) for x in range(2, 13)))
    assert lesion_wise_dice(prediction, truth) == pytest.approx(2 * 1 / (1 + 11))


def test_without_dilation_only_neighbours_are_one_lesion() -> None:
    corners = mask_of((2, 2, 2), (3, 3, 3))
    assert lesion_wise_dice(mask_of((2, 2, 2)), corners, 0) == pytest.approx(2 / 3)
    apart = mask_of((2, 2, 2), (4, 4, 4))
    assert lesion_wise_dice(mask_of((2, 2, 2)), apart, 0) == 1 / 2
    with pytest.raises(TrainingError, match="dilation_voxels must be 0 or more, got -1"):
        lesion_wise_dice(corners, corners, -1)


def test_lesion_wise_dice_of_empty_masks_follows_brats() -> None:
    empty, one = mask_of(), mask_of((3, 3, 3))
    assert lesion_wise_dice(empty, empty) == lesion_wise_dice(one, one) == 1
    assert lesion_wise_dice(empty, one) == lesion_wise_dice(one, empty) == 0


def published_lesion_wise_dice(
    prediction: np.ndarray, truth: np.ndarray, dilation_voxels: int
) -> float:
    """The steps of BraTS 2023's evaluation, one by one on the whole array, no volume left out."""

    def dilated(mask: np.ndarray) -> np.ndarray:
        structure = ndimage.generate_binary_structure(3, 2)
        return ndimage.binary_dilation(mask, structure, dilation_voxels)

    lesions, lesion_count = ndimage.label(dilated(truth), np.ones((3, 3, 3)))
    components, component_count = ndimage.label(prediction, np.ones((3, 3, 3)))
    false, scores = set(range(1, component_count + 1)), []
    for number in range(1, lesion_count + 1):
        lesion = truth & (lesions == number)
        near = set(components[dilated(lesion)].tolist()) - {0}
        false -= near
        scores.append(medpy.dc(np.isin(components, list(near)), lesion))
    return float(np.mean(scores + [0] * len(false)))


@given(blobs(), st.integers(1, 3))
def test_lesion_wise_dice_is_that_of_the_published_steps(
    pair: tuple[np.ndarray, np.ndarray], dilation_voxels: int
) -> None:
    expected = published_lesion_wise_dice(*pair, dilation_voxels)
    assert lesion_wise_dice(*pair, dilation_voxels) == pytest.approx(expected)


# All together


def test_scores_are_those_of_the_functions() -> None:
    prediction, truth = mask_of((2, 2, 2), (3, 2, 2)), mask_of((2, 2, 2))
    assert score(prediction, truth, (2, 1, 1)) == Scores(
        dice=2 / 3,
        hd95_mm=pytest.approx(1.8),
        sensitivity=1,
        specificity=7998 / 7999,
        lesion_wise_dice=2 / 3,
    )


def test_an_empty_pair_scores_full_marks() -> None:
    assert astuple(score(mask_of(), mask_of(), MM)) == (1, 0, 1, 1, 1)


@given(blobs(), blobs(), spacings)
@settings(max_examples=30)
def test_cropping_changes_no_score(
    pair: tuple[np.ndarray, np.ndarray],
    other: tuple[np.ndarray, np.ndarray],
    spacing_mm: Sequence[float],
) -> None:
    prediction, truth = (np.pad(2 * mask.astype(np.uint8), (4, 1)) for mask in pair)
    for labels, inner in ((prediction, other[0]), (truth, other[1])):
        corner = labels[tuple(map(slice, inner.shape))]
        corner[inner[tuple(map(slice, corner.shape))] & (corner > 0)] = 4
    structures = {"whole": (2, 4), "inner": [4], "none": (1,)}
    assert score_structures(prediction, truth, structures, spacing_mm) == {
        name: score(np.isin(prediction, labels), np.isin(truth, labels), spacing_mm)
        for name, labels in structures.items()
    }


def test_all_background_scores_full_marks() -> None:
    labels = np.zeros((4, 5, 6), np.int16)
    scores = score_structures(labels, labels, BRATS.task.regions, BRATS.spacing_mm)
    assert {name: astuple(s) for name, s in scores.items()} == dict.fromkeys(
        ("WT", "TC", "ET"), (1, 0, 1, 1, 1)
    )


def test_a_structure_of_background_is_refused() -> None:
    labels = np.zeros((2, 2, 2), np.int16)
    with pytest.raises(TrainingError, match="structure air holds label 0"):
        score_structures(labels, labels, {"air": (0,)}, MM)


def test_shapes_that_differ_are_named_in_one_line() -> None:
    first, second = np.zeros((4, 4, 4), bool), np.zeros((4, 4, 5), bool)
    message = r"^prediction and truth must have one shape, got \(4, 4, 4\) and \(4, 4, 5\); .*$"
    for metric in (dice, sensitivity, specificity, lesion_wise_dice):
        with pytest.raises(TrainingError, match=message):
            metric(first, second)
    for metric in (hd95_mm, score):
        with pytest.raises(TrainingError, match=message):
            metric(first, second, MM)
    with pytest.raises(TrainingError, match=message):
        score_structures(first, second, {"WT": (1,)}, MM)


# Real cases


def test_scores_of_two_cases_are_medpys(integration_data: Path) -> None:
    """On the first cases that have a truth: it as one mask, and it eroded or moved as prediction.

    A spacing that is not the cases' own makes the axes differ.
    """
    damages = (
        lambda mask: ndimage.binary_erosion(mask, iterations=2),
        lambda mask: np.roll(mask, (9, -4, 2), (0, 1, 2)),
    )
    labels = find_siblings(find_cases(integration_data).cases, LABEL_SUFFIXES)
    files = [file for found in labels.values() for file in found]
    truths = [np.asarray(nib.load(file).dataobj) > 0 for file in files[:2]]
    assert truths
    for truth, damage in zip(truths, damages, strict=False):
        prediction = damage(truth)
        result = score(prediction, truth, (1, 1, 1.5))
        assert result.hd95_mm == pytest.approx(medpy.hd95(prediction, truth, (1, 1, 1.5)))
        assert result.dice == pytest.approx(medpy.dc(prediction, truth))
        assert result.sensitivity == pytest.approx(medpy.sensitivity(prediction, truth))
        assert result.specificity == pytest.approx(medpy.specificity(prediction, truth))
