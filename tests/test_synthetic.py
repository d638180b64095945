from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from attnseg.synthetic import MODALITIES, SyntheticCase, make_case, write_case


def test_the_same_seed_gives_the_same_case() -> None:
    first, second, other = (make_case(seed, (48, 48, 48)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.labels, second.labels)
    assert not np.array_equal(first.labels, other.labels)


def test_the_tumour_lies_in_a_skull_stripped_brain(small_synthetic: SyntheticCase) -> None:
    assert set(np.unique(small_synthetic.labels)) == {0, 1, 2, 4}
    brain = small_synthetic.images > 0
    np.testing.assert_array_equal(brain[0], brain.all(axis=0))
    assert brain[0][small_synthetic.labels > 0].all()
    assert 0.1 < brain[0].mean() < 0.5


def test_contrasts_are_those_of_the_modalities(small_synthetic: SyntheticCase) -> None:
    images = dict(zip(MODALITIES, small_synthetic.images, strict=True))
    labels = small_synthetic.labels
    healthy = (labels == 0) & (images["t1"] > 0)

    def mean(modality: str, where: np.ndarray) -> float:
        return float(images[modality][where].mean())

    assert mean("flair", labels == 2) > 1.5 * mean("flair", healthy)
    assert mean("t1ce", labels == 4) > 1.2 * mean("t1ce", healthy)
    assert mean("t1ce", labels == 1) < mean("t1ce", labels == 4)
    assert mean("t2", labels == 1) > mean("t2", healthy)


def test_cases_are_written_in_the_brats_layout(
    tmp_path: Path, small_synthetic: SyntheticCase
) -> None:
    folder = write_case(small_synthetic, tmp_path, "x", truth=False)
    names = sorted(f.name for f in folder.iterdir())
    assert names == [f"x_{m}.nii.gz" for m in sorted(MODALITIES)]
    image = nib.load(folder / "x_t2.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), small_synthetic.images[2])
