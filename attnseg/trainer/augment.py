"""Augmentation with the paper's ranges (section 3.3), of batches, on their device.

Rotation and elastic deformation are applied in one resampling, so images are blurred only once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from attnseg.trainer.config import TrainConfig
from attnseg.trainer.intensities import change_intensities, uniform

_ZOOMED = 1 / 3  # share of the patches


def margin_voxels(config: TrainConfig) -> int:
    """Margin around a patch, in voxels per side, that rotation and deformation may read from."""
    half = config.patch / 2
    angle = math.radians(min(config.rotation_degrees, 45.0))  # corners reach farthest at 45
    turn = half * (math.cos(angle) + math.sin(angle) - 1)
    larger = max(1.0, config.zoom[1])  # patches of smaller structures read from farther
    return math.ceil(larger * (half + turn) - half + 2 * config.elastic_voxels)


def _rotation(config: TrainConfig, generator: torch.Generator) -> Tensor:
    """Random `(3, 3)` rotation matrix, the product of one rotation about each axis."""
    limit = math.radians(config.rotation_degrees)
    matrix = torch.eye(3)
    for axis, angle in enumerate(uniform((3,), -limit, limit, generator).tolist()):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn = torch.eye(3)
        turn[a, a] = turn[b, b] = math.cos(angle)
        turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ turn
    return matrix


def _zoom(config: TrainConfig, generator: torch.Generator) -> float:
    """Distance of neighbouring voxels of a patch, in voxels of the image."""
    if config.zoom == (1.0, 1.0):
        return 1.0  # without a random number, as before there was this setting
    chosen, factor = torch.rand(2, generator=generator).tolist()
    low, high = (math.log(end) for end in config.zoom)
    return math.exp(low + factor * (high - low)) if chosen < _ZOOMED else 1.0


def _displacement(config: TrainConfig, generator: torch.Generator, device: torch.device) -> Tensor:
    """Smooth random displacement in voxels, `(3, P, P, P)` float32 for patch size P."""
    patch, spacing = config.patch, config.elastic_spacing_voxels
    pieces = math.ceil((patch - 1) / spacing)
    shape = (1, 3, pieces + 1, pieces + 1, pieces + 1)
    coarse = torch.randn(shape, generator=generator) * config.elastic_voxels
    size = (pieces * spacing + 1,) * 3
    whole = F.interpolate(coarse.to(device), size, mode="trilinear", align_corners=True)[0]
    return whole[:, :patch, :patch, :patch]


def _sampling_grid(images: Tensor, config: TrainConfig, generator: torch.Generator) -> Tensor:
    """Sampling position of each output voxel, `(P, P, P, 3)` in the coordinates of `grid_sample`.

    Random numbers are drawn on the CPU; everything else is computed on the device of `images`.
    """
    device = images.device
    steps = torch.arange(config.patch, dtype=torch.float32, device=device)
    steps = steps - (config.patch - 1) / 2
    position = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"))
    turn = _rotation(config, generator) * _zoom(config, generator)
    position = torch.einsum("ij,jxyz->ixyz", turn.to(device), position)
    position = position + _displacement(config, generator, device)
    sizes = [s - 1 for s in images.shape[2:]]
    scale = 2 / torch.tensor(sizes, device=device).view(3, 1, 1, 1)
    return (position * scale).flip(0).movedim(0, -1)  # grid_sample expects the last axis first


def _deform(
    images: Tensor, labels: Tensor, config: TrainConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    grid = torch.stack([_sampling_grid(images, config, generator) for _ in images])
    images = F.grid_sample(images, grid, align_corners=True)
    moved = F.grid_sample(labels[:, None].float(), grid, mode="nearest", align_corners=True)
    return images, moved[:, 0].round().long()


def _mirror(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    pairs = []
    for image, label in zip(images, labels, strict=True):
        choices = torch.rand(4, generator=generator) < 0.5
        axes = [axis for axis in range(3) if choices[axis]]
        image, label = image.flip([a + 1 for a in axes]), label.flip(axes)
        if choices[3]:
            image, label = image.transpose(1, 2), label.transpose(0, 1)
        pairs.append((image, label))
    return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])


def augment(
    images: Tensor, labels: Tensor, config: TrainConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Deform, change intensities, and mirror if `config.mirror` is set.

    Args:
        images: `(B, C, X, Y, Z)` float32, `margin_voxels` larger than the patch on each side.
        labels: `(B, X, Y, Z)` class indices.
        config: Configuration with the ranges of the augmentation.
        generator: Random number generator on the CPU.

    Returns:
        Images `(B, C, P, P, P)` float32 and labels `(B, P, P, P)` int64 of patch size P.
    """
    images, labels = _deform(images, labels, config, generator)
    images = change_intensities(images, config, generator)
    return _mirror(images, labels, generator) if config.mirror else (images, labels)
