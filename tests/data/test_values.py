from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from attnseg.data.values import distinct, some_values, whole_labels
from attnseg.runtime.case.nifti import read_labels
from attnseg.runtime.errors import TrainingError

FILE = Path("a_seg.nii.gz")


@given(
    arrays.arrays(
        st.sampled_from([np.uint8, np.int16, np.int32, np.int64]),
        st.tuples(*[st.integers(1, 4)] * 3),
    )
)
def test_distinct_values_are_numpys(labels: NDArray[Any]) -> None:
    assert distinct(labels) == np.unique(labels).tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_are_labels_within_rounding(dtype: type) -> None:
    labels = np.array([0, 1, 2, 4], dtype) * dtype(1 + 1e-6)
    assert whole_labels(FILE, labels).tolist() == [0, 1, 2, 4]


def test_a_scaled_label_file_is_read_as_its_labels(tmp_path: Path) -> None:
    stored = np.zeros((2, 3, 4), np.uint8)
    stored[0, 0] = [0, 10, 20, 40]
    image = nib.Nifti1Image(stored, np.eye(4))
    image.header.set_slope_inter(0.1, 0)
    nib.save(image, tmp_path / "a_seg.nii")
    labels = read_labels(tmp_path / "a_seg.nii").channels[0]
    assert whole_labels(FILE, labels)[0, 0].tolist() == [0, 1, 2, 4]


def test_interpolated_labels_are_refused_with_their_values() -> None:
    labels = np.array([0, 1, 4], np.float32) * np.float32(0.98823529)
    with pytest.raises(TrainingError, match=r"a_seg\.nii\.gz: .*not whole numbers, \[0.988235, 3."):
        whole_labels(FILE, labels)


def test_numbers_too_large_for_a_label_stay_too_large() -> None:
    assert distinct(whole_labels(FILE, np.array([0, 3e9, -1e30]))) == [-65536, 0, 65536]


def test_of_many_values_the_first_eight_are_shown() -> None:
    assert some_values({2, 1}) == "[1, 2]"
    assert some_values(range(100)) == "[0, 1, 2, 3, 4, 5, 6, 7, ...]"
