"""Metrics of the BraTS evaluation: Dice, HD95, sensitivity, specificity, lesion-wise Dice.

Sources: Menze et al., "The Multimodal Brain Tumor Image Segmentation Benchmark" (2015), and
Bakas et al., "Identifying the best machine learning algorithms for brain tumor segmentation"
(2018), for the scores of a whole region and for what an empty mask scores; the BraTS 2023
evaluation (github.com/rachitsaluja/BraTS-2023-Metrics) for the lesion-wise Dice.

Every array is `(X, Y, Z)`; `prediction` and `truth` have one shape.
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

EMPTY_HD95_MM = 373.13  # the diagonal of 240x240x155 voxels of 1 mm; BraTS 2023 took 374

_NEIGHBOURS_26 = ndimage.generate_binary_structure(3, 3)
_NEIGHBOURS_18 = ndimage.generate_binary_structure(3, 2)

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Scores:
    """What a predicted mask scores against the true one.

    Attributes:
        dice: as `dice`.
        hd95_mm: as `hd95_mm`; lower is better, unlike the others.
        sensitivity: as `sensitivity`.
        specificity: as `specificity`.
        lesion_wise_dice: as `lesion_wise_dice`, with its usual dilation.
    """

    dice: float
    hd95_mm: float
    sensitivity: float
    specificity: float
    lesion_wise_dice: float


def _check_shapes(prediction: NDArray[Any], truth: NDArray[Any]) -> None:
    if prediction.shape != truth.shape:
        raise TrainingError(
            f"prediction and truth must have one shape, got {prediction.shape} and {truth.shape}; "
            "bring both onto one grid"
        )


def _joint_box(prediction: NDArray[Any], truth: NDArray[Any]) -> tuple[slice, ...]:
    """Smallest box of all voxels that are not 0 in either; one voxel if there are none."""
    joint = (prediction != 0) | (truth != 0)
    hits = [np.flatnonzero(joint.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    return tuple(slice(int(h[0]), int(h[-1]) + 1) if len(h) else slice(1) for h in hits)


def dice(prediction: Mask, truth: Mask) -> float:
    """Dice of two masks: 1 when both are empty, 0 when one is.

    Raises:
        TrainingError: the shapes differ.
    """
    _check_shapes(prediction, truth)
    size = int(np.count_nonzero(prediction)) + int(np.count_nonzero(truth))
    return 2 * int(np.count_nonzero(prediction & truth)) / size if size else 1.0


def region_dice(
    prediction: NDArray[Any], truth: NDArray[Any], regions: Mapping[str, Sequence[int]]
) -> dict[str, float]:
    """Dice per region.

    Args:
        prediction: `(X, Y, Z)` labels.
        truth: the same shape and labels.
        regions: name to the labels that make it up, such as `{"WT": [1, 2, 4]}`.
    """
    return {
        name: dice(np.isin(prediction, labels), np.isin(truth, labels))
        for name, labels in regions.items()
    }


def sensitivity(prediction: Mask, truth: Mask) -> float:
    """Share of the truth that was predicted.

    With an empty truth there is nothing to find, so nothing was missed: 1, whatever was
    predicted. (BraTS 2023's code gives 0 there unless the prediction is empty too.)

    Raises:
        TrainingError: the shapes differ.
    """
    _check_shapes(prediction, truth)
    size = int(np.count_nonzero(truth))
    return int(np.count_nonzero(prediction & truth)) / size if size else 1.0


def specificity(prediction: Mask, truth: Mask) -> float:
    """Share of the voxels outside the truth that were left out of the prediction.

    With a truth that fills the array there is nothing to leave out: 1.

    Raises:
        TrainingError: the shapes differ.
    """
    return _specificity(prediction, truth, truth.size)


def _specificity(prediction: Mask, truth: Mask, voxels: int) -> float:
    """Specificity in an array of `voxels` voxels, from which the masks may be cropped."""
    _check_shapes(prediction, truth)
    negatives = voxels - int(np.count_nonzero(truth))
    false_positives = int(np.count_nonzero(prediction > truth))
    return (negatives - false_positives) / negatives if negatives else 1.0


def _surface(mask: Mask) -> Mask:
    """Voxels of the mask with one of their 6 neighbours outside it or outside the array."""
    padded = np.pad(mask, 1)
    inner = mask.copy()
    for axis in range(mask.ndim):
        for start in (0, 2):
            neighbour = [slice(1, -1)] * mask.ndim
            neighbour[axis] = slice(start, start + mask.shape[axis])
            inner &= padded[tuple(neighbour)]
    return mask ^ inner


def _grid_tree(points_mm: NDArray[np.floating[Any]]) -> cKDTree:
    # Halving cells, not points: on a voxel grid, where coordinates repeat, medians cost more
    # to find than they save, threefold between concentric spheres.
    return cKDTree(points_mm, balanced_tree=False, compact_nodes=False)


def hd95_mm(prediction: Mask, truth: Mask, spacing_mm: Sequence[float]) -> float:
    """95th percentile, in mm, of the distances between the surfaces of two masks.

    The distances of both directions are pooled before the percentile is taken, as
    `medpy.metric.binary.hd95` does. BraTS 2023 instead takes the larger percentile of the two
    directions, of distances weighted by surface area.

    Args:
        prediction: `(X, Y, Z)` mask.
        truth: `(X, Y, Z)` mask.
        spacing_mm: voxel size along X, Y and Z.

    Returns:
        The distance; 0 when both masks are empty, `EMPTY_HD95_MM` when one is.

    Raises:
        TrainingError: the shapes differ.
    """
    _check_shapes(prediction, truth)
    box = _joint_box(prediction, truth)
    surfaces = [np.argwhere(_surface(mask[box])) * spacing_mm for mask in (prediction, truth)]
    if not all(map(len, surfaces)):
        return EMPTY_HD95_MM if any(map(len, surfaces)) else 0.0
    here, there = surfaces
    forth, _ = _grid_tree(there).query(here)
    back, _ = _grid_tree(here).query(there)
    return float(np.percentile(np.concatenate([forth, back]), 95))


def _lesions(truth: Mask, dilation_voxels: int) -> NDArray[np.int32]:
    """Number of the lesion around every voxel, 0 where there is none: the dilated truth's."""
    if dilation_voxels < 0:
        raise TrainingError(f"dilation_voxels must be 0 or more, got {dilation_voxels}")
    if dilation_voxels:  # scipy takes 0 iterations as "until nothing changes"
        truth = ndimage.binary_dilation(truth, _NEIGHBOURS_18, dilation_voxels)
    numbers: NDArray[np.int32] = ndimage.label(truth, _NEIGHBOURS_26)[0]
    return numbers


def _match_lesions(
    components: NDArray[np.int32], truth: Mask, lesions: NDArray[np.int32]
) -> Iterator[tuple[float, NDArray[np.int32]]]:
    """Per lesion, its Dice and the numbers of the predicted components that reach into it."""
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

    As in BraTS 2023's published code: parts of the truth whose dilations touch are one lesion;
    a lesion, undilated, is scored against all predicted components (26 neighbours), whole, that
    reach into its dilation, so one component may serve several lesions; a component that reaches
    into none scores 0. Unlike it: no lesion is left out for its volume (the challenge drops
    those of up to 50 mm3 from the mean, of up to 2 mm3 for metastases), and there is no
    lesion-wise HD95.

    Args:
        prediction: `(X, Y, Z)` mask.
        truth: `(X, Y, Z)` mask.
        dilation_voxels: iterations of the dilation with 18 neighbours. The challenge takes 3
            for gliomas, 1 for meningiomas and metastases.

    Returns:
        The mean; 1 when both masks are empty, 0 when one is.

    Raises:
        TrainingError: the shapes differ, or `dilation_voxels` is negative.
    """
    _check_shapes(prediction, truth)
    box = _joint_box(prediction, truth)
    prediction, truth = prediction[box], truth[box]
    lesions = _lesions(truth, dilation_voxels)
    components, count = ndimage.label(prediction, _NEIGHBOURS_26)
    matches = list(_match_lesions(components, truth, lesions))
    matched = {int(number) for _, numbers in matches for number in numbers}
    total = len(matches) + count - len(matched)
    return float(sum(value for value, _ in matches) / total) if total else 1.0


def _score(prediction: Mask, truth: Mask, spacing_mm: Sequence[float], voxels: int) -> Scores:
    """Scores in an array of `voxels` voxels, from which the masks may be cropped."""
    return Scores(
        dice=dice(prediction, truth),
        hd95_mm=hd95_mm(prediction, truth, spacing_mm),
        sensitivity=sensitivity(prediction, truth),
        specificity=_specificity(prediction, truth, voxels),
        lesion_wise_dice=lesion_wise_dice(prediction, truth),
    )


def score(prediction_mask: Mask, truth_mask: Mask, spacing_mm: Sequence[float]) -> Scores:
    """All scores of one mask.

    Args:
        prediction_mask: `(X, Y, Z)` mask.
        truth_mask: `(X, Y, Z)` mask.
        spacing_mm: voxel size along X, Y and Z.

    Raises:
        TrainingError: the shapes differ.
    """
    return _score(prediction_mask, truth_mask, spacing_mm, truth_mask.size)


def score_structures(
    prediction: NDArray[Any],
    truth: NDArray[Any],
    structures: Mapping[str, Sequence[int]],
    spacing_mm: Sequence[float],
) -> dict[str, Scores]:
    """All scores of every structure.

    Args:
        prediction: `(X, Y, Z)` labels, 0 is background.
        truth: the same shape and labels.
        structures: name to the labels that make it up, such as `{"WT": [1, 2, 4]}`.
        spacing_mm: voxel size along X, Y and Z.

    Raises:
        TrainingError: the shapes differ, or a structure holds the background.
    """
    _check_shapes(prediction, truth)
    for name, labels in structures.items():
        if 0 in labels:
            raise TrainingError(f"structure {name} holds label 0, the background; leave it out")
    box = _joint_box(prediction, truth)
    return {
        name: _score(
            np.isin(prediction[box], labels), np.isin(truth[box], labels), spacing_mm, truth.size
        )
        for name, labels in structures.items()
    }
