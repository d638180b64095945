"""Augmentation of intensities: the paper's, and a stronger one.

The stronger one has the transforms, chances and ranges of nnU-Net 2 (Isensee et al. 2021,
supplementary note 2), and dims one modality, as faint oedema is in scans of low contrast. Voxels of
0, the background, stay 0 in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from attnseg.trainer.config import TrainConfig


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Random float32 numbers from `low` to `high`."""
    return torch.rand(shape, generator=generator) * (high - low) + low


def change_intensities(images: Tensor, config: TrainConfig, generator: torch.Generator) -> Tensor:
    """Change the intensities of each image and modality at random.

    Args:
        images: `(B, C, X, Y, Z)` float32.
        config: Configuration with the kind of augmentation and its ranges.
        generator: Random number generator on the CPU.
    """
    if config.augmentation == "strong":
        changed = torch.stack([_strong(image, generator) for image in images])
    else:
        changed = _paper(images, config, generator)
    return torch.where(images == 0, images, changed)


def _paper(images: Tensor, config: TrainConfig, generator: torch.Generator) -> Tensor:
    """Gamma and scale per modality."""
    shape = (*images.shape[:2], 1, 1, 1)
    gamma = uniform(shape, *config.gamma, generator).to(images.device)
    scale = uniform(shape, 1 - config.intensity_scale, 1 + config.intensity_scale, generator)
    low = images.amin((2, 3, 4), keepdim=True)
    span = (images.amax((2, 3, 4), keepdim=True) - low).clamp_min(1e-6)
    return (((images - low) / span) ** gamma * span + low) * scale.to(images.device)


def _strong(image: Tensor, generator: torch.Generator) -> Tensor:
    """Change an image `(C, X, Y, Z)`; each transform has a chance of its own."""

    def chance(share: float) -> bool:
        return float(torch.rand((), generator=generator)) < share

    def draw(low: float, high: float) -> float:
        return float(uniform((), low, high, generator))

    if chance(0.1):
        noise = torch.randn(image.shape, generator=generator) * math.sqrt(draw(0, 0.1))
        image = image + noise.to(image.device)
    if chance(0.2):
        image = _each(image, 0.5, chance, lambda c: blurred(c, draw(0.5, 1.0)))
    if chance(0.15):
        image = _each(image, 1.0, chance, lambda c: c * draw(0.75, 1.25))
    if chance(0.15):
        image = _each(image, 1.0, chance, lambda c: with_contrast(c, draw(0.75, 1.25)))
    if chance(0.25):
        image = _each(image, 0.5, chance, lambda c: at_low_resolution(c, draw(0.5, 1.0)))
    if chance(0.1):
        image = _each(image, 1.0, chance, lambda c: -with_gamma(-c, draw(0.7, 1.5)))
    if chance(0.3):
        image = _each(image, 1.0, chance, lambda c: with_gamma(c, draw(0.7, 1.5)))
    if chance(0.2):
        dimmed = int(torch.randint(len(image), (), generator=generator))
        image = image.clone()
        image[dimmed] = with_contrast(image[dimmed], draw(0.3, 0.8))
    return image


def _each(
    image: Tensor, share: float, chance: Callable[[float], bool], change: Callable[[Tensor], Tensor]
) -> Tensor:
    """Change a share of the channels."""
    return torch.stack([change(channel) if chance(share) else channel for channel in image])


def blurred(channel: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of `(X, Y, Z)`; `sigma` in voxels, edges are repeated."""
    reach = math.ceil(3 * sigma)
    at = torch.arange(-reach, reach + 1, dtype=torch.float32, device=channel.device)
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    for axis in range(3):
        lines = channel.movedim(axis, -1)
        padded = F.pad(lines.reshape(-1, 1, lines.shape[-1]), (reach, reach), mode="replicate")
        channel = F.conv1d(padded, kernel[None, None]).reshape(lines.shape).movedim(-1, axis)
    return channel


def with_contrast(channel: Tensor, factor: float) -> Tensor:
    """Distances from the mean times `factor`, clipped to the range of the channel."""
    mean = channel.mean()
    return ((channel - mean) * factor + mean).clamp(channel.min(), channel.max())


def at_low_resolution(channel: Tensor, share: float) -> Tensor:
    """`(X, Y, Z)` at a share of its voxels along each axis, and back."""
    size = [max(1, round(edge * share)) for edge in channel.shape]
    low = F.interpolate(channel[None, None], size, mode="nearest-exact")
    return F.interpolate(low, channel.shape, mode="trilinear", align_corners=False)[0, 0]


def with_gamma(channel: Tensor, gamma: float) -> Tensor:
    """Power of the intensities scaled to [0, 1], with the mean and deviation that they had."""
    low, mean, std = channel.min(), channel.mean(), channel.std()
    span = (channel.max() - low).clamp_min(1e-6)
    changed = ((channel - low) / span) ** gamma
    return (changed - changed.mean()) / changed.std().clamp_min(1e-6) * std + mean
