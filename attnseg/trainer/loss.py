"""The paper's loss (section 3.3): cross-entropy and soft Dice with equal weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from attnseg.trainer.config import TrainConfig

Regions = Sequence[Sequence[int]]
"""Class indices of each region."""


def loss_regions(config: TrainConfig, regions: Mapping[str, Sequence[int]]) -> Regions | None:
    """Regions that the Dice loss is averaged over; None for classes."""
    return list(regions.values()) if config.dice_of == "regions" else None


def dice_loss(
    logits: Tensor, labels: Tensor, epsilon: float = 1e-6, regions: Regions | None = None
) -> Tensor:
    """One minus the soft Dice, averaged over the foreground classes, or over regions.

    Sums run over batch and space, so a class that is absent from one patch only is not scored
    as a miss there.

    Args:
        logits: `(B, K, X, Y, Z)` floating-point tensor.
        labels: `(B, X, Y, Z)` int64, class indices.
        epsilon: Term added to numerator and denominator; an absent class then has loss 0.
        regions: Regions, whose probability is the sum of that of their classes; None for classes.

    Returns:
        Scalar float32 tensor.
    """
    probabilities = logits.float().softmax(dim=1)
    truth = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(probabilities.dtype)
    space = (0, 2, 3, 4)
    if regions is None:
        probabilities, truth = probabilities[:, 1:], truth[:, 1:]
    else:
        probabilities, truth = (
            torch.stack([values[:, list(own)].sum(1) for own in regions], 1)
            for values in (probabilities, truth)
        )
    overlap = (probabilities * truth).sum(space)
    size = probabilities.sum(space) + truth.sum(space)
    return 1 - ((2 * overlap + epsilon) / (size + epsilon)).mean()


def segmentation_loss(
    logits: Tensor,
    labels: Tensor,
    cross_entropy_weight: float = 0.5,
    epsilon: float = 1e-6,
    regions: Regions | None = None,
) -> Tensor:
    """`w * cross-entropy + (1 - w) * Dice loss`, `w` being `cross_entropy_weight`.

    See `dice_loss` for the other arguments.
    """
    cross_entropy = F.cross_entropy(logits.float(), labels)
    dice = dice_loss(logits, labels, epsilon, regions)
    return torch.lerp(dice, cross_entropy, cross_entropy_weight)
