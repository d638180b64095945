"""Geometry against nibabel and numpy, on arrays whose every voxel is its own number."""

from __future__ import annotations

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from attnseg.runtime.errors import ConfigError
from attnseg.runtime.geometry import (
    AxisTransform,
    Box,
    Layout,
    check_orientation,
    reorient,
    shape_of,
)

CODES = ["".join(codes) for axes in permutations(("LR", "PA", "IS")) for codes in product(*axes)]
orientations = st.sampled_from(CODES)
shapes = st.tuples(*[st.integers(1, 5)] * 3)


@given(orientations, orientations, shapes)
def test_an_orientation_is_reached_as_nibabel_reaches_it(
    source: str, target: str, shape: tuple[int, int, int]
) -> None:
    array = np.arange(np.prod(shape)).reshape(shape)
    change = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt(source), nib.orientations.axcodes2ornt(target)
    )
    expected = nib.orientations.apply_orientation(array, change)
    np.testing.assert_array_equal(reorient(array, source, target), expected)


@given(orientations, orientations, shapes)
def test_a_transform_is_undone_exactly_and_copies_nothing(
    source: str, target: str, shape: tuple[int, int, int]
) -> None:
    array = np.arange(2 * np.prod(shape)).reshape(2, *shape)
    transform = AxisTransform.between(source, target)
    applied = transform.apply(array)
    assert applied.base is not None
    assert shape_of(applied.shape[1:]) == transform.shape(shape)
    np.testing.assert_array_equal(transform.invert(applied), array)


@given(orientations, orientations, shapes)
def test_the_layout_of_a_transform_is_that_of_numpys_view(
    source: str, target: str, shape: tuple[int, int, int]
) -> None:
    array = np.asfortranarray(np.arange(np.prod(shape), dtype=np.int64).reshape(shape))
    transform = AxisTransform.between(source, target)
    layout = transform.layout(Layout.fortran(shape))
    memory = array.ravel(order="K")
    steps = tuple(s * memory.itemsize for s in layout.strides)
    seen = as_strided(memory[layout.offset :], layout.shape, steps, writeable=False)
    np.testing.assert_array_equal(seen, transform.apply(array))


@given(orientations, orientations, shapes)
def test_the_matrix_of_a_transform_names_the_voxel_it_shows(
    source: str, target: str, shape: tuple[int, int, int]
) -> None:
    array = np.arange(np.prod(shape)).reshape(shape)
    transform = AxisTransform.between(source, target)
    applied, matrix = transform.apply(array), transform.matrix(shape)
    for voxel in np.ndindex(applied.shape):
        x, y, z, _ = (matrix @ (*voxel, 1)).astype(int)
        assert applied[voxel] == array[x, y, z]


@given(orientations, orientations, shapes, st.data())
def test_a_box_is_transformed_with_its_voxels(
    source: str, target: str, shape: tuple[int, int, int], data: st.DataObject
) -> None:
    ends = [sorted(data.draw(st.tuples(*[st.integers(0, n - 1)] * 2))) for n in shape]
    box = Box(shape_of([a for a, _ in ends]), shape_of([b + 1 for _, b in ends]))
    marked = np.zeros(shape, bool)
    marked[box.slices()] = True
    transform = AxisTransform.between(source, target)
    found = np.zeros(transform.shape(shape), bool)
    found[transform.box(box, shape).slices()] = True
    np.testing.assert_array_equal(found, transform.apply(marked))


def test_a_transform_that_is_computed_by_hand() -> None:
    """LPS to RAS reverses X and Y; of 2 x 3 x 1 voxels the first is then the last."""
    transform = AxisTransform.between("LPS", "RAS")
    assert transform == AxisTransform((0, 1, 2), (0, 1))
    array = np.arange(6).reshape(2, 3, 1)
    assert transform.apply(array).ravel().tolist() == [5, 4, 3, 2, 1, 0]
    assert transform.layout(Layout((2, 3, 1), (3, 1, 1))) == Layout((2, 3, 1), (-3, -1, 1), 5)


def test_a_box_indexes_its_voxels() -> None:
    box = Box((1, 0, 2), (3, 4, 3))
    array = np.arange(60).reshape(4, 5, 3)
    assert box.shape == (2, 4, 1)
    np.testing.assert_array_equal(array[box.slices()], array[1:3, 0:4, 2:3])
    assert Box.whole(array.shape) == Box((0, 0, 0), (4, 5, 3))


@pytest.mark.parametrize("orientation", ["LPX", "LRS", "LP", "LPSA", "", "lps"])
def test_an_orientation_that_is_none_is_refused(orientation: str) -> None:
    with pytest.raises(ConfigError, match="does not name each axis once, as LPS does"):
        check_orientation(orientation)


@pytest.mark.parametrize("orientation", CODES)
def test_every_orientation_is_known(orientation: str) -> None:
    check_orientation(orientation)
