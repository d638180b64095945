from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss

from attnseg.trainer.loss import dice_loss, segmentation_loss


def logits_of(probabilities: list[list[float]]) -> torch.Tensor:
    """Rows of class probabilities per voxel to logits `(1, K, voxels, 1, 1)`."""
    return torch.tensor(probabilities).log().T.reshape(1, -1, len(probabilities), 1, 1)


def test_values_by_hand() -> None:
    # Two voxels, two classes; truth 0 then 1; probabilities of class 1: 0.25 and 0.5.
    logits = logits_of([[0.75, 0.25], [0.5, 0.5]])
    labels = torch.tensor([0, 1]).view(1, 2, 1, 1)
    dice = 1 - 2 * 0.5 / (0.75 + 1)
    cross_entropy = -(math.log(0.75) + math.log(0.5)) / 2
    assert dice_loss(logits, labels).item() == pytest.approx(dice, abs=1e-6)
    result = segmentation_loss(logits, labels).item()
    assert result == pytest.approx(0.5 * dice + 0.5 * cross_entropy, abs=1e-6)


def test_the_cross_entropy_weight_moves_between_the_two() -> None:
    logits, labels = logits_of([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 1]).view(1, 2, 1, 1)
    assert segmentation_loss(logits, labels, 0.0).item() == pytest.approx(
        dice_loss(logits, labels).item()
    )
    assert segmentation_loss(logits, labels, 1.0).item() == pytest.approx(
        -(math.log(0.75) + math.log(0.5)) / 2
    )


def test_the_dice_loss_of_regions_by_hand() -> None:
    """Two voxels, classes 0 to 2, probabilities 1/3: of the region {1, 2} 2/3 each."""
    logits, labels = torch.zeros(1, 3, 2, 1, 1), torch.tensor([1, 0]).reshape(1, 2, 1, 1)
    whole = 2 * (2 / 3) / (4 / 3 + 1)  # overlap 2/3, sizes 4/3 and 1
    second = 0.0  # of class 2 there is no voxel: overlap 0, size 2/3
    loss = dice_loss(logits, labels, regions=[[1, 2], [2]]).item()
    assert loss == pytest.approx(1 - (whole + second) / 2, abs=1e-5)


def test_the_dice_loss_is_monais() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, 6, 7, generator=generator)
    labels = torch.randint(0, 4, (2, 5, 6, 7), generator=generator)
    oracle = DiceLoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        batch=True,
        smooth_nr=1e-6,
        smooth_dr=1e-6,
    )
    expected = oracle(logits, labels[:, None]).item()
    assert dice_loss(logits, labels).item() == pytest.approx(expected, abs=1e-6)


def test_a_class_that_is_nowhere_costs_nothing() -> None:
    sure = torch.tensor([30.0, 0.0]).view(1, 2, 1, 1, 1).expand(1, 2, 3, 3, 3)
    labels = torch.zeros(1, 3, 3, 3, dtype=torch.long)
    assert dice_loss(sure, labels).item() == pytest.approx(0, abs=1e-4)


def test_the_gradient_is_finite_in_half_precision_logits() -> None:
    logits = torch.randn(1, 4, 4, 4, 4).to(torch.bfloat16).requires_grad_()
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 4, (1, 4, 4, 4)))
    segmentation_loss(logits, labels).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
