"""A synthetic four-modality brain with a glioma, generated from a seed.

It is a phantom with the contrasts of the BraTS modalities, not a simulation of MR physics, so that
the whole pipeline can be tried without a download. White and grey matter, cortical folds and
ventricles are derived from smooth random fields; the tumour is a necrotic core in an enhancing rim,
surrounded by oedema that spreads through white matter. Bias field, blur and Rician noise are added.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

MODALITIES = ("t1", "t1ce", "t2", "flair")
BRATS_SHAPE = (240, 240, 155)
BRATS_AFFINE = np.array([[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]], float)

_TISSUES = ("grey", "white", "csf", "oedema", "necrosis", "enhancing")
_CONTRAST = {  # mean intensity per tissue, in the order of _TISSUES
    "t1": (0.72, 1.00, 0.32, 0.66, 0.45, 0.70),
    "t1ce": (0.74, 1.00, 0.34, 0.68, 0.46, 1.45),
    "t2": (0.62, 0.48, 1.50, 1.05, 1.30, 0.85),
    "flair": (0.66, 0.56, 0.22, 1.20, 0.72, 1.00),
}
_LABEL_OF = {"necrosis": 1, "oedema": 2, "enhancing": 4}


@dataclass(frozen=True)
class SyntheticCase:
    """A synthetic case.

    Attributes:
        images: Intensities `(4, X, Y, Z)`, int16, ordered like `MODALITIES`; 0 outside the brain.
        labels: BraTS labels `(X, Y, Z)`, uint8.
        affine: Voxel-to-world transform `(4, 4)`, float64, in mm.
    """

    images: NDArray[np.int16]
    labels: NDArray[np.uint8]
    affine: NDArray[np.float64]


def _spline_basis(size: int, knots: int) -> NDArray[np.float32]:
    """Cubic B-spline weights `(size, knots)` of each voxel over the knots."""
    position = np.linspace(1, knots - 2, size)[:, None] - np.arange(knots)
    t = np.abs(position)
    near = 2 / 3 - t**2 + t**3 / 2
    far = np.clip(2 - t, 0, None) ** 3 / 6
    return np.where(t < 1, near, far).astype(np.float32)


def _smooth_field(
    rng: np.random.Generator, shape: tuple[int, ...], scale_voxels: float
) -> NDArray[np.float32]:
    """Random field of unit variance whose features are about `scale_voxels` wide."""
    knots = [int(np.ceil(s / scale_voxels)) + 3 for s in shape]
    field = rng.standard_normal(knots, np.float32)
    for size, n in zip(shape, knots, strict=True):  # each pass moves its axis to the end
        field = np.tensordot(field, _spline_basis(size, n), axes=(0, 1))
    return np.asarray(field / field.std(), np.float32)


def _ellipsoid(
    grid: list[NDArray[np.float32]],
    centre: NDArray[np.float64],
    radii: NDArray[np.float64],
) -> NDArray[np.float32]:
    """Distance from `centre` in units of the radii: below 1 inside, above 1 outside."""
    squares = [((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)]
    return np.asarray(np.sqrt(squares[0] + squares[1] + squares[2]), np.float32)


def _tissue_map(rng: np.random.Generator, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Tissue map of `shape`: 0 outside the brain, else 1 + index into `_TISSUES`."""
    size = np.array(shape, float)
    grid = list(np.ogrid[tuple(slice(0, s) for s in shape)])
    grid = [np.asarray(g, np.float32) for g in grid]
    centre = size * rng.uniform(0.48, 0.52, 3)
    radii = size * np.array([0.28, 0.35, 0.44]) * rng.uniform(0.94, 1.04, 3)

    folds = _smooth_field(rng, shape, size.mean() / 26)
    waves = _smooth_field(rng, shape, size.mean() / 8)
    depth = _ellipsoid(grid, centre, radii) + 0.025 * waves
    tissue = np.zeros(shape, np.uint8)
    brain = depth < 1.0
    tissue[brain] = 1
    tissue[brain & (depth + 0.10 * folds < 0.83)] = 2
    tissue[brain & (depth > 0.84) & (folds > 1.1)] = 3  # sulci
    for side in (-1, 1):  # lateral ventricles, then the deep grey nuclei beside them
        offset = radii * np.array([side * 0.16, 0.05, 0.08])
        horn = _ellipsoid(grid, centre + offset, radii * np.array([0.11, 0.42, 0.17]))
        tissue[horn + 0.08 * waves < 1] = 3
        offset = radii * np.array([side * 0.30, -0.02, -0.06])
        nuclei = _ellipsoid(grid, centre + offset, radii * np.array([0.13, 0.22, 0.20]))
        tissue[(nuclei + 0.08 * waves < 1) & (tissue == 2)] = 1

    side = rng.choice([-1, 1])
    place = np.array([side * rng.uniform(0.38, 0.52), rng.uniform(-0.45, 0.45), 0.0])
    place[2] = rng.uniform(-0.1, 0.4)
    core_radius = size.mean() * rng.uniform(0.075, 0.115)
    lobes = _smooth_field(rng, shape, size.mean() / 11)
    ragged = _smooth_field(rng, shape, size.mean() / 34)
    mass = _ellipsoid(grid, centre + radii * place, core_radius * rng.uniform(0.85, 1.15, 3))
    mass += 0.16 * lobes + 0.05 * ragged
    # Oedema spreads through white matter more readily than through grey matter.
    spread = mass + 0.22 * (tissue == 1) + 0.10 * lobes
    tissue[(spread < rng.uniform(1.65, 2.0)) & brain & (tissue != 3)] = 4
    tissue[(mass < 1.0) & brain] = 6
    tissue[(mass + 0.10 * ragged < rng.uniform(0.62, 0.74)) & brain] = 5
    return tissue


def make_case(seed: int, shape: tuple[int, int, int] = BRATS_SHAPE) -> SyntheticCase:
    """Generate a case of `shape` voxels at 1 mm, deterministically from the seed.

    A shape below about 48 voxels along an axis is too small for all components of the tumour.
    """
    rng = np.random.default_rng(seed)
    tissue = _tissue_map(rng, shape)
    inside = tissue > 0
    texture = _smooth_field(rng, shape, 3.0)
    images = np.zeros((len(MODALITIES), *shape), np.int16)
    for channel, modality in enumerate(MODALITIES):
        means = np.array((0.0, *_CONTRAST[modality]), np.float32)
        means[1:] *= rng.uniform(0.95, 1.05, len(_TISSUES))
        image = ndimage.gaussian_filter(means[tissue], 0.7)
        bias = 1 + 0.07 * _smooth_field(rng, shape, max(shape) / 2.5)
        image = image * bias * (1 + 0.03 * texture)
        noise = rng.standard_normal((2, *shape), np.float32) * np.float32(0.025)
        image = np.hypot(image + noise[0], noise[1]) * rng.uniform(300, 600)
        images[channel][inside] = np.clip(image[inside], 1, 32767).astype(np.int16)
    values = np.zeros(len(_TISSUES) + 1, np.uint8)
    for name, value in _LABEL_OF.items():
        values[1 + _TISSUES.index(name)] = value
    return SyntheticCase(images, values[tissue], BRATS_AFFINE.copy())


def write_case(case: SyntheticCase, folder: Path, name: str, truth: bool = True) -> Path:
    """Write `case` in the BraTS 2018 layout as `folder/name/name_t1.nii.gz` and so on.

    Returns the folder of the case. With `truth` the labels are written as `name_seg.nii.gz`.
    """
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    for modality, image in zip(MODALITIES, case.images, strict=True):
        nib.save(nib.Nifti1Image(image, case.affine), target / f"{name}_{modality}.nii.gz")
    if truth:
        nib.save(nib.Nifti1Image(case.labels, case.affine), target / f"{name}_seg.nii.gz")
    return target
