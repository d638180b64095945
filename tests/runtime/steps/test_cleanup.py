from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from attnseg.runtime.steps.cleanup import remove_small_components


def reference(classes: np.ndarray, min_voxels: int) -> np.ndarray:
    """Component by component, over the whole volume."""
    result = classes.copy()
    for value in range(1, int(classes.max()) + 1):
        components, count = ndimage.label(classes == value, np.ones((3, 3, 3)))
        for component in range(1, count + 1):
            mask = components == component
            if mask.sum() < min_voxels:
                result[mask] = 0
    return result


@settings(max_examples=150)
@given(
    hnp.arrays(
        np.uint8,
        st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7)),
        elements=st.sampled_from([0, 0, 0, 1, 2, 3]),
    ),
    st.integers(0, 8),
    st.sampled_from(["C", "F"]),
)
def test_removal_is_that_of_a_plain_reference(
    classes: np.ndarray, min_voxels: int, order: str
) -> None:
    classes = np.array(classes, order=order)
    before = classes.copy()
    cleaned, _ = remove_small_components(classes, min_voxels)
    np.testing.assert_array_equal(cleaned, reference(classes, min_voxels))
    np.testing.assert_array_equal(classes, before)


def test_corners_connect_and_the_limit_itself_stays() -> None:
    classes = np.zeros((6, 6, 6), np.uint8)
    classes[0, 0, 0] = classes[1, 1, 1] = classes[2, 2, 2] = 1  # three, touching at corners
    classes[4, 4, 4] = classes[4, 4, 5] = 1  # two
    cleaned, removed = remove_small_components(classes, 3)
    assert cleaned.sum() == 3
    assert removed == 1


def test_neighbouring_classes_are_components_of_their_own() -> None:
    classes = np.ones((4, 4, 4), np.uint8)
    classes[1, 1, 1] = 3
    cleaned, removed = remove_small_components(classes, 2)
    assert cleaned[1, 1, 1] == 0
    assert removed == 1
    assert np.count_nonzero(cleaned == 1) == 63


@pytest.mark.parametrize("min_voxels", [0, 1])
def test_nothing_is_removed_below_two_voxels(min_voxels: int) -> None:
    classes = np.eye(3, dtype=np.uint8)[None]
    cleaned, removed = remove_small_components(classes, min_voxels)
    np.testing.assert_array_equal(cleaned, classes)
    assert removed == 0


def test_an_empty_volume_stays_empty() -> None:
    cleaned, removed = remove_small_components(np.zeros((3, 3, 3), np.uint8), 150)
    assert not cleaned.any()
    assert removed == 0
