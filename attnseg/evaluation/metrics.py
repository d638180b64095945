"""Metrics of the BraTS evaluation: Dice, HD95, sensitivity, specificity, lesion-wise Dice.

Sources: Menze et al., "The Multimodal Brain Tumor Image Segmentation Benchmark" (2015), and
Bakas et al., "Identifying the best machine learning algorithms for brain tumor segmentation"
(2018), for the scores of a whole region and of empty masks; the BraTS 2023 evaluation
(github.com/rachitsaluja/BraTS-2023-Metrics) for the lesion-wise Dice.

Every array is `(X, Y, Z)`; `prediction` and `truth` have the same shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from attnseg.runtime.errors import TrainingError

EMPTY_HD95_MM = 373.13  # diagonal of 240x240x155 voxels of 1 mm; BraTS 2023 uses 374

_NEIGHBOURS_26 = ndimage.generate_binary_structure(3, 3)
_NEIGHBOURS_18 = ndimage.generate_binary_structure(3, 2)

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Scores:
    """Scores of a predicted mask against the true one.

    Attributes:
        dice: Dice coefficient, see `dice`.
        hd95_mm: 95th percentile of the surface distances in mm, see `hd95_mm`; unlike for the
            other scores, lower is better.
        sensitivity: True positive rate, see `sensitivity`.
        specificity: True negative rate, see `specificity`.
        lesion_wise_dice: Mean Dice over lesions, see `lesion_wise_dice`, with its default
            dilation.
    """

    dice: float
    hd95_mm: float
    sensitivity: float
    specificity: float
    lesion_wise_dice: float


def check_shapes(prediction: NDArray[Any], truth: NDArray[Any]) -> None:
    """Raise `TrainingError` unless both arrays have the same shape."""
    if prediction.shape != truth.shape:
        raise TrainingError(
            f"prediction and truth must have one shape, got {prediction.shape} and {truth.shape}",
            "resample one to the grid of the other",
        )


def _joint_box(prediction: NDArray[Any], truth: NDArray[Any]) -> tuple[slice, ...]:
    """Smallest box around the non-zero voxels of both; one voxel if there are none."""
    joint = (prediction != 0) | (truth != 0)
    hits = [np.flatnonzero(joint.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    return tuple(slice(int(h[0]), int(h[-1]) + 1) if len(h) else slice(1) for h in hits)


def dice(prediction: Mask, truth: Mask) -> float:
    """Dice coefficient of two masks: 1 if both are empty, 0 if only one is.

    Raises:
        TrainingError: The shapes differ.
    """
    check_shapes(prediction, truth)
    size = int(np.count_nonzero(prediction)) + int(np.count_nonzero(truth))
    return 2 * int(np.count_nonzero(prediction & truth)) / size if size else 1.0


def region_dice(
    prediction: NDArray[Any], truth: NDArray[Any], regions: Mapping[str, Sequence[int]]
) -> dict[str, float]:
    """Dice coefficient of each region.

    Args:
        prediction: `(X, Y, Z)` predicted labels.
        truth: `(X, Y, Z)` true labels.
        regions: Labels of each region by name, such as `{"WT": [1, 2, 4]}`.

    Raises:
        TrainingError: The shapes differ.
    """
    return {
        name: dice(np.isin(prediction, labels), np.isin(truth, labels))
        for name, labels in regions.items()
    }


def sensitivity(prediction: Mask, truth: Mask) -> float:
    """Share of the truth that was predicted.

    An empty truth scores 1, whatever was predicted. (BraTS 2023's code returns 0 there unless
    the prediction is empty too.)

    Raises:
        TrainingError: The shapes differ.
    """
    check_shapes(prediction, truth)
    size = int(np.count_nonzero(truth))
    return int(np.count_nonzero(prediction & truth)) / size if size else 1.0


def specificity(prediction: Mask, truth: Mask) -> float:
    """Share of the voxels outside the truth that are outside the prediction too.

    A truth that fills the array scores 1.

    Raises:
        TrainingError: The shapes differ.
    """
    return _specificity(prediction, truth, truth.size)


def _specificity(prediction: Mask, truth: Mask, voxels: int) -> float:
    """Specificity in an array of `voxels` voxels; the masks may be crops of it."""
    check_shapes(prediction, truth)
    negatives = voxels - int(np.count_nonzero(truth))
    false_positives = int(np.count_nonzero(prediction > truth))
    return (negatives - false_positives) / negatives if negatives else 1.0


def _surface(mask: Mask) -> Mask:
    """Voxels of the mask with at least one of 6 neighbours outside it or outside the array."""
    padded = np.pad(mask, 1)
    inner = mask.copy()
    for axis in range(mask.ndim):
        for start in (0, 2):
            neighbour = [slice(1, -1)] * mask.ndim
            neighbour[axis] = slice(start, start + mask.shape[axis])
            inner &= padded[tuple(neighbour)]
    return mask ^ inner


def _grid_tree(points_mm: NDArray[np.floating[Any]]) -> cKDTree:
    # Split cells at their midpoint: on a voxel grid, where coordinates repeat, median splits cost
    # more than they save (three times the run time between concentric spheres).
    return cKDTree(points_mm, balanced_tree=False, compact_nodes=False)


def hd95_mm(prediction: Mask, truth: Mask, spacing_mm: Sequence[float]) -> float:
    """95th percentile, in mm, of the distances between the surfaces of two masks.

    The distances of both directions are pooled before computing the percentile, as in
    `medpy.metric.binary.hd95`. BraTS 2023 instead uses the larger of the two directions'
    percentiles, of distances weighted by surface area.

    Args:
        prediction: `(X, Y, Z)` predicted mask.
        truth: `(X, Y, Z)` true mask.
        spacing_mm: Voxel size along X, Y and Z.

    Returns:
        Distance in mm; 0 if both masks are empty, `EMPTY_HD95_MM` if only one is.

    Raises:
        TrainingError: The shapes differ.
    """
    check_shapes(prediction, truth)
    box = _joint_box(prediction, truth)
    surfaces = [np.argwhere(_surface(mask[box])) * spacing_mm for mask in (prediction, truth)]
    if not all(map(len, surfaces)):
        return EMPTY_HD95_MM if any(map(len, surfaces)) else 0.0
    here, there = surfaces
    forth, _ = _grid_tree(there).query(here)
    back, _ = _grid_tree(here).query(there)
    return float(np.percentile(np.concatenate([forth, back]), 95))


def _lesions(truth: Mask, dilation_voxels: int) -> NDArray[np.int32]:
    """Number the lesions, the components of the dilated truth: int32, 0 for background."""
    if dilation_voxels < 0:
        raise TrainingError(f"dilation_voxels must be 0 or more, got {dilation_voxels}")
    if dilation_voxels:  # scipy repeats until nothing changes for 0 iterations
        truth = ndimage.binary_dilation(truth, _NEIGHBOURS_18, dilation_voxels)
    numbers: NDArray[np.int32] = ndimage.label(truth, _NEIGHBOURS_26)[0]
    return numbers


def _match_lesions(
    components: NDArray[np.int32], truth: Mask, lesions: NDArray[np.int32]
) -> Iterator[tuple[float, NDArray[np.int32]]]:
    """Yield, per lesion, its Dice and the numbers of the predicted components that overlap it."""
    sizes = np.bincount(components.ravel())
    for number, box in enumerate(ndimage.find_objects(lesions), start=1):
        around = lesions[box] == number
        near = np.unique(components[box][around])
        near = near[near > 0]
        lesion = truth[box] & around
        found = np.count_nonzero(components[box][lesion])
        yield 2 * found / (np.count_nonzero(lesion) + sizes[near].sum()), near


def lesion_wise_dice(prediction: Mask, truth: Mask, dilation_voxels: int = 3) -> float:
    """Mean Dice over the lesions of the truth and the false components of the prediction.

    As in BraTS 2023's published code, parts of the truth whose dilations touch are one lesion.
    The undilated lesion is scored against all whole predicted components (26 neighbours) that
    overlap its dilation, so one component may match several lesions; a component that matches
    none scores 0. Unlike in that code, no lesion is excluded for its volume (the challenge
    excludes lesions of up to 50 mm3, for metastases of up to 2 mm3), and there is no lesion-wise
    HD95.

    Args:
        prediction: `(X, Y, Z)` predicted mask.
        truth: `(X, Y, Z)` true mask.
        dilation_voxels: Iterations of the dilation with 18 neighbours. The challenge uses 3
            for gliomas, and 1 for meningiomas and metastases.

    Returns:
        Mean Dice; 1 if both masks are empty, 0 if only one is.

    Raises:
        TrainingError: The shapes differ, or `dilation_voxels` is negative.
    """
    check_shapes(prediction, truth)
    box = _joint_box(prediction, truth)
    prediction, truth = prediction[box], truth[box]
    lesions = _lesions(truth, dilation_voxels)
    components, count = ndimage.label(prediction, _NEIGHBOURS_26)
    matches = list(_match_lesions(components, truth, lesions))
    matched = {int(number) for _, numbers in matches for number in numbers}
    total = len(matches) + count - len(matched)
    return float(sum(value for value, _ in matches) / total) if total else 1.0


def _score(prediction: Mask, truth: Mask, spacing_mm: Sequence[float], voxels: int) -> Scores:
    """Scores in an array of `voxels` voxels; the masks may be crops of it."""
    return Scores(
        dice=dice(prediction, truth),
        hd95_mm=hd95_mm(prediction, truth, spacing_mm),
        sensitivity=sensitivity(prediction, truth),
        specificity=_specificity(prediction, truth, voxels),
        lesion_wise_dice=lesion_wise_dice(prediction, truth),
    )


def score(prediction_mask: Mask, truth_mask: Mask, spacing_mm: Sequence[float]) -> Scores:
    """Compute all scores of one mask.

    Args:
        prediction_mask: `(X, Y, Z)` predicted mask.
        truth_mask: `(X, Y, Z)` true mask.
        spacing_mm: Voxel size along X, Y and Z.

    Raises:
        TrainingError: The shapes differ.
    """
    return _score(prediction_mask, truth_mask, spacing_mm, truth_mask.size)


def score_structures(
    prediction: NDArray[Any],
    truth: NDArray[Any],
    structures: Mapping[str, Sequence[int]],
    spacing_mm: Sequence[float],
) -> dict[str, Scores]:
    """Compute all scores of every structure.

    Args:
        prediction: `(X, Y, Z)` predicted labels; 0 is background.
        truth: `(X, Y, Z)` true labels.
        structures: Labels of each structure by name, such as `{"WT": [1, 2, 4]}`.
        spacing_mm: Voxel size along X, Y and Z.

    Raises:
        TrainingError: The shapes differ, or a structure includes the background.
    """
    check_shapes(prediction, truth)
    for name, labels in structures.items():
        if 0 in labels:
            raise TrainingError(f"structure {name} holds label 0, the background", "leave it out")
    box = _joint_box(prediction, truth)
    return {
        name: _score(
            np.isin(prediction[box], labels), np.isin(truth[box], labels), spacing_mm, truth.size
        )
        for name, labels in structures.items()
    }
