"""The paper's loss (section 3.3): cross-entropy and soft Dice with equal weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def dice_loss(logits: Tensor, labels: Tensor, epsilon: float = 1e-6) -> Tensor:
    """One minus the soft Dice, averaged over the foreground classes.

    Sums run over batch and space, so a class that is absent from one patch only is not scored
    as a miss there.

    Args:
        logits: `(B, K, X, Y, Z)` floating-point tensor.
        labels: `(B, X, Y, Z)` int64, class indices.
        epsilon: Term added to numerator and denominator; an absent class then has loss 0.

    Returns:
        Scalar float32 tensor.
    """
    probabilities = logits.float().softmax(dim=1)
    truth = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(probabilities.dtype)
    space = (0, 2, 3, 4)
    overlap = (probabilities * truth).sum(space)[1:]
    size = (probabilities.sum(space) + truth.sum(space))[1:]
    return 1 - ((2 * overlap + epsilon) / (size + epsilon)).mean()


def segmentation_loss(
    logits: Tensor,
    labels: Tensor,
    cross_entropy_weight: float = 0.5,
    epsilon: float = 1e-6,
) -> Tensor:
    """`w * cross-entropy + (1 - w) * Dice loss`, `w` being `cross_entropy_weight`.

    See `dice_loss` for the other arguments.
    """
    cross_entropy = F.cross_entropy(logits.float(), labels)
    dice = dice_loss(logits, labels, epsilon)
    return torch.lerp(dice, cross_entropy, cross_entropy_weight)
