from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from attnseg.trainer.config import TrainConfig
from attnseg.trainer.intensities import (
    at_low_resolution,
    blurred,
    change_intensities,
    with_contrast,
    with_gamma,
)

STRONG = TrainConfig(augmentation="strong")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_the_blur_is_scipys(sigma: float) -> None:
    channel = noise(9, 10, 11)
    reach = int(np.ceil(3 * sigma))
    expected = ndimage.gaussian_filter(channel.numpy(), sigma, mode="nearest", radius=reach)
    np.testing.assert_allclose(blurred(channel, sigma).numpy(), expected, atol=1e-5)


def test_contrast_moves_values_from_the_mean_within_their_range() -> None:
    channel = torch.tensor([0.0, 1, 2, 5]).reshape(1, 1, 4)  # mean 2
    assert with_contrast(channel, 0.5).ravel().tolist() == [1, 1.5, 2, 3.5]
    assert with_contrast(channel, 2.0).ravel().tolist() == [0, 0, 2, 5]


def test_low_resolution_of_all_voxels_changes_nothing_and_of_half_averages_pairs() -> None:
    channel = noise(8, 8, 8)
    torch.testing.assert_close(at_low_resolution(channel, 1.0), channel)
    half = at_low_resolution(channel, 0.5)
    assert half.shape == channel.shape and half.std() < channel.std()


def test_gamma_keeps_mean_and_deviation() -> None:
    channel = noise(8, 8, 8)
    changed = with_gamma(channel, 1.4)
    assert not torch.allclose(changed, channel, atol=0.05)
    torch.testing.assert_close(changed.mean(), channel.mean(), atol=1e-5, rtol=0)
    torch.testing.assert_close(changed.std(), channel.std(), atol=1e-5, rtol=0)


def test_the_background_stays_0_and_a_seed_repeats_the_changes() -> None:
    images = noise(3, 4, 12, 12, 12)
    images[:, :, :4] = 0

    def changed(seed: int) -> torch.Tensor:
        return change_intensities(images, STRONG, torch.Generator().manual_seed(seed))

    drawn = [changed(seed) for seed in range(12)]
    assert all(not own[:, :, :4].any() and own.isfinite().all() for own in drawn)
    assert sum(not torch.equal(own, images) for own in drawn) >= 10
    assert torch.equal(changed(3), drawn[3])


def test_each_kind_of_change_happens() -> None:
    """Of 200 images, some are noisy, some dimmed in one modality only, some not changed."""
    image = noise(1, 4, 6, 6, 6)
    same, single = 0, 0
    for seed in range(200):
        own = change_intensities(image, STRONG, torch.Generator().manual_seed(seed))
        differ = [not torch.allclose(own[0, c], image[0, c]) for c in range(4)]
        same, single = same + (not any(differ)), single + (sum(differ) == 1)
    # None of eight changes: 0.9 x 0.8 x 0.85 x 0.85 x 0.75 x 0.9 x 0.7 x 0.8 = 0.20
    assert 20 <= same <= 70
    assert single >= 10


def test_the_papers_changes_are_the_default() -> None:
    still = replace(TrainConfig(), intensity_scale=0.0, gamma=(1.0, 1.0))
    images = noise(2, 4, 6, 6, 6)
    changed = change_intensities(images, still, torch.Generator().manual_seed(0))
    torch.testing.assert_close(changed, images, atol=1e-5, rtol=0)
