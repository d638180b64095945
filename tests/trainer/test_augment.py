from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from attnseg.trainer.augment import _displacement, _rotation, augment, margin_voxels
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.model import NetworkConfig

STILL = TrainConfig(
    network=NetworkConfig(widths=(4, 8), bottleneck=8),
    patch=16,
    rotation_degrees=0,
    elastic_voxels=0,
    intensity_scale=0,
    gamma=(1.0, 1.0),
)


def batch(edge: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 4, edge, edge, edge, generator=generator)
    return images, torch.randint(0, 4, (2, edge, edge, edge), generator=generator)


def run(config: TrainConfig, images: torch.Tensor, labels: torch.Tensor, seed: int = 0):
    return augment(images, labels, config, torch.Generator().manual_seed(seed))


def test_a_third_of_the_patches_is_zoomed_and_its_margin_is_read() -> None:
    """A ball of radius 5 in the middle, at twice the distance of voxels: radius 2.5."""
    config = replace(STILL, zoom=(2.0, 2.0))
    assert margin_voxels(config) == 8  # half a patch
    index = torch.stack(torch.meshgrid(*[torch.arange(32.0)] * 3, indexing="ij")) - 15.5
    labels = ((index**2).sum(0) < 25).long()[None]
    sizes = []
    for seed in range(60):
        _, moved = run(config, labels[:, None].float(), labels, seed)
        sizes.append(int(moved.sum()))
    whole = int(labels.sum())
    small = [size for size in sizes if size < whole / 4]
    assert 10 <= len(small) <= 30 and {size for size in sizes if size not in small} == {whole}
    assert small[0] == pytest.approx(whole / 8, rel=0.25)


def test_with_every_range_at_zero_nothing_changes() -> None:
    images, labels = batch(16)
    assert margin_voxels(STILL) == 0
    changed, moved = run(STILL, images, labels)
    torch.testing.assert_close(changed, images, atol=1e-4, rtol=0)
    assert torch.equal(moved, labels)


def test_image_and_labels_move_together() -> None:
    config = replace(STILL, rotation_degrees=10, elastic_voxels=2.0, elastic_spacing_voxels=8)
    margin = margin_voxels(config)
    edge = 16 + 2 * margin
    labels = torch.zeros(2, edge, edge, edge, dtype=torch.long)
    labels[:, : edge // 2 + 2] = 1
    images = labels[:, None].float().expand(-1, 4, -1, -1, -1)
    changed, moved = run(config, images, labels)
    assert changed.shape == (2, 4, 16, 16, 16)
    # Away from blurred label borders, the image agrees with the labels.
    clear = (changed - 0.5).abs() > 0.45
    assert clear.float().mean() > 0.6
    assert torch.equal((changed > 0.5)[clear], (moved == 1)[:, None].expand_as(clear)[clear])
    assert not torch.equal(moved[:, :, 0, 0], moved[:, :, 15, 15])


def test_intensities_stay_within_the_ranges_and_background_stays_zero() -> None:
    config = replace(STILL, intensity_scale=0.1, gamma=(1.0, 1.0))
    images, labels = batch(16)
    images[:, :, :4] = 0
    changed, _ = run(config, images, labels)
    assert (changed[:, :, :4] == 0).all()
    factor = (changed / images)[:, :, 4:].flatten(2)
    assert (factor.std(dim=2) < 1e-2).all()
    assert ((factor.median(dim=2).values - 1).abs() <= 0.101).all()


def test_gamma_keeps_the_ends_of_the_range() -> None:
    config = replace(STILL, gamma=(0.8, 0.8))
    images, labels = batch(16)
    changed, _ = run(config, images, labels)
    for reduce in (torch.amin, torch.amax):
        before, after = reduce(images, (2, 3, 4)), reduce(changed, (2, 3, 4))
        torch.testing.assert_close(after, before, atol=1e-3, rtol=0)
    assert (changed.mean() - images.mean()) > 0.05  # an exponent below 1 raises intermediate values


def test_mirrors_reorder_voxels_and_labels_alike() -> None:
    config = replace(STILL, mirror=True)
    labels = torch.arange(16**3).reshape(1, 16, 16, 16)
    images = labels[:, None].float().expand(-1, 4, -1, -1, -1)
    changed, moved = run(config, images, labels, seed=1)
    assert not torch.equal(moved, labels)
    assert torch.equal(moved.flatten().sort().values, labels.flatten())
    torch.testing.assert_close(changed[:, 0], moved.float(), atol=0.6, rtol=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_gives_the_same_batch(seed: int) -> None:
    config = replace(STILL, rotation_degrees=10, elastic_voxels=2.0, mirror=True)
    images, labels = batch(16 + 2 * margin_voxels(config))
    first, second = (run(config, images, labels, seed)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, run(config, images, labels, seed + 1)[0])


def test_the_margin_keeps_the_patch_away_from_the_edge() -> None:
    config = TrainConfig()
    edge = config.patch + 2 * margin_voxels(config)
    images = torch.ones(1, 4, edge, edge, edge)
    labels = torch.ones(1, edge, edge, edge, dtype=torch.long)
    still = replace(config, intensity_scale=0, gamma=(1.0, 1.0))
    changed, _ = run(still, images, labels)
    assert (changed > 0.99).float().mean() > 0.995


def test_the_elastic_grid_has_the_spacing_asked_for() -> None:
    config = TrainConfig()  # 20 voxels
    field = _displacement(config, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert field.shape == (3, 64, 64, 64)
    slope = field.diff(dim=1)[:, :, 0, 0]
    # Between knots the displacement is linear: the slope changes at 20, 40 and 60 only.
    changes = (slope.diff(dim=1).abs() > 1e-4).any(dim=0).nonzero().flatten() + 1
    assert changes.tolist() == [20, 40, 60]


def test_rotation_turns_by_the_angle_asked_for() -> None:
    config = replace(STILL, rotation_degrees=10)
    matrices = [_rotation(config, torch.Generator().manual_seed(s)) for s in range(50)]
    largest = 0.0
    for matrix in matrices:
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(3))
        assert torch.det(matrix) > 0
        angle = math.degrees(math.acos(min(1.0, (float(matrix.trace()) - 1) / 2)))
        assert angle <= 10 * 3**0.5 + 0.1  # one turn of at most 10 degrees around each axis
        largest = max(largest, angle)
    assert largest > 8


@pytest.mark.parametrize("change", [{"rotation_degrees": 10.0}, {"elastic_voxels": 2.0}])
def test_rotation_and_deformation_each_move_the_labels(change: dict[str, float]) -> None:
    config = replace(STILL, **change)
    images, labels = batch(16 + 2 * margin_voxels(config))
    margin = margin_voxels(config)
    inner = labels[:, margin : margin + 16, margin : margin + 16, margin : margin + 16]
    assert not torch.equal(run(config, images, labels)[1], inner)


def test_each_modality_is_scaled_by_itself() -> None:
    config = replace(STILL, intensity_scale=0.1)
    images, labels = batch(16)
    changed, _ = run(config, images, labels)
    factors = (changed / images).flatten(2).median(dim=2).values
    assert factors.std() > 0.02


@pytest.mark.parametrize("degrees", [0.0, 45.0, 90.0, 180.0])
def test_the_margin_never_shrinks_with_the_angle(degrees: float) -> None:
    config = replace(STILL, rotation_degrees=degrees)
    assert margin_voxels(config) == (4 if degrees else 0)  # 8 * (sqrt(2) - 1), rounded up
    images, labels = batch(16 + 2 * margin_voxels(config))
    assert run(config, images, labels)[0].shape == (2, 4, 16, 16, 16)
