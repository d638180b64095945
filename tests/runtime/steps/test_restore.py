"""Restoration of outputs by hand, on columns of voxels along one axis."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from attnseg import Volume
from attnseg.runtime.geometry import Box, Shape
from attnseg.runtime.steps.preprocess import Preprocessed, Preprocessing, preprocess
from attnseg.runtime.steps.resample import Grid
from attnseg.runtime.steps.restore import restored
from attnseg.runtime.steps.schemes import Unchanged

OUTSIDE = np.array([-2], np.float32)
"""Output of a voxel outside the image."""


def column(values: list[float], axis: int) -> np.ndarray:
    """One channel of voxels along an axis, `(1, X, Y, Z)`."""
    shape = [1, 1, 1, 1]
    shape[1 + axis] = len(values)
    return np.array(values, np.float32).reshape(shape)


def there(values: list[float], spacing_mm: float, grid: Grid, axis: int = 0) -> Preprocessed:
    """A scan of one column, which nothing but resampling changes."""
    affine = np.diag([*(spacing_mm if own == axis else 1.0 for own in range(3)), 1.0])
    (channel,) = column(values, axis)
    steps = Preprocessing("RAS", grid, "all", (Unchanged(),))
    return preprocess(Volume([channel], affine), steps)


def back(planes: np.ndarray, scan: Preprocessed, half: bool = False) -> list[float]:
    found = np.concatenate(list(restored([planes], scan, OUTSIDE, half)), axis=1)
    assert (found.shape[1:], found.dtype) == (scan.result_box.shape, np.float32)
    values: list[float] = found.ravel().tolist()
    return values


def spaced(axis: int, spacing_mm: float, **fields: object) -> Grid:
    x, y, z = (spacing_mm if own == axis else 1.0 for own in range(3))
    return Grid(spacing_mm=(x, y, z), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_grids_with_the_same_faces(axis: int) -> None:
    # Pairs of voxels are averaged; on the way back the outermost quarters have one neighbour.
    # `separate_above` permits a single voxel along the axes that have one.
    scan = there([0, 2, 4, 6], 1.0, spaced(axis, 2.0, separate_above=9.0), axis)
    np.testing.assert_allclose(scan.image.ravel(), [1, 5])
    assert back(column([1, 5], axis), scan) == [1, 2, 4, 5]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_grids_with_the_same_first_centre(axis: int) -> None:
    # Of 5 voxels of 1 mm, those at 0, 2 and 4 mm are the centres of voxels of 2 mm.
    scan = there([0, 1, 5, 3, 4], 1.0, spaced(axis, 2.0, alignment="centres"), axis)
    assert scan.image.ravel().tolist() == [0, 5, 4]
    assert back(column([0, 4, 2], axis), scan) == [0, 2, 4, 3, 2]


def test_beyond_the_last_centre_the_last_plane_is_repeated() -> None:
    # 4 voxels of 1 mm have centres up to 3 mm, and round(3 / 2 + 1) = 2 of 2 mm up to 2 mm.
    scan = there([0, 1, 2, 3], 1.0, spaced(0, 2.0, alignment="centres"))
    assert scan.image.ravel().tolist() == [0, 2]
    assert back(column([0, 4], 0), scan) == [0, 2, 4, 4]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_axis_of_thick_slices_takes_the_nearest_both_ways(axis: int) -> None:
    # Slices of 5 mm are more than 3 times as thick as voxels of 1 mm. Halved, each is taken twice;
    # back, slices 1, 3, 5 and 7 of 8 are the nearest (0.5 is rounded up).
    scan = there([3, 1, 4, 2], 5.0, spaced(axis, 2.5, separate_above=3.0), axis)
    assert scan.image.ravel().tolist() == [3, 3, 1, 1, 4, 4, 2, 2]
    assert back(column([0, 1, 2, 3, 4, 5, 6, 7], axis), scan) == [1, 3, 5, 7]


def test_slices_that_are_not_that_thick_are_interpolated() -> None:
    scan = there([0, 4, 8, 12], 2.9, spaced(2, 1.45, separate_above=3.0), 2)
    np.testing.assert_allclose(scan.image.ravel(), [0, 1, 3, 5, 7, 9, 11, 12], rtol=1e-6)
    assert back(column([0, 1, 2, 3, 4, 5, 6, 7], 2), scan) == [0.5, 2.5, 4.5, 6.5]


def test_values_are_rounded_to_float16_where_the_model_does() -> None:
    """From 2048 to 4096 float16 has steps of 2; 2049 and 2051 are rounded to multiples of 4."""
    scan = there([0, 0, 0, 0], 1.0, Grid(shape=(2, 1, 1)))
    planes = column([2048, 2052], 0)
    assert back(planes, scan) == [2048, 2049, 2051, 2052]
    assert back(planes, scan, half=True) == [2048, 2048, 2052, 2052]


def parts_of(channel: np.ndarray, order: tuple[str, ...]) -> Preprocessed:
    steps = Preprocessing("RAS", Grid(shape=(4, 1, 1)), "nonzero", (Unchanged(),), order)  # type: ignore[arg-type]
    return preprocess(Volume([channel], np.eye(4)), steps)


def test_a_crop_on_the_grid_is_surrounded_before_and_one_of_the_scan_after() -> None:
    """Of 8 voxels 4 are not 0: they are 2 of 4 on the grid of the whole, or 4 on their own."""
    channel = np.array([0, 0, 0, 0, 6, 6, 6, 6], np.float32).reshape(8, 1, 1)
    first = parts_of(channel, ("resample", "crop", "normalise"))
    assert (first.box, first.result_box) == (Box((2, 0, 0), (4, 1, 1)), Box.whole((8, 1, 1)))
    assert back(column([4, 8], 0), first) == [-2, -2, -2, -0.5, 2.5, 5, 7, 8]
    last = parts_of(channel, ("crop", "normalise", "resample"))
    assert last.box == last.result_box == Box((4, 0, 0), (8, 1, 1))
    assert back(column([4, 8, 4, 8], 0), last) == [4, 8, 4, 8]


def test_planes_are_read_as_they_are_needed() -> None:
    """So that not more of the outputs is held than two planes, and one part of them."""
    scan = there([0] * 16, 1.0, Grid(shape=(8, 1, 1)))
    read = []

    def planes() -> Iterator[np.ndarray]:
        for index in range(8):
            read.append(index)
            yield column([float(index)], 0)

    given = [(len(read), plane.item()) for plane in restored(planes(), scan, OUTSIDE)]
    # Planes 2 i + 1 and 2 i + 2 of the scan lie between planes i and i + 1 of the grid.
    assert [value for _, value in given[:4]] == [0, 0.25, 0.75, 1.25]
    assert [count for count, _ in given] == [2, *(2 + i // 2 for i in range(14)), 8]


def test_without_a_grid_the_planes_are_handed_on() -> None:
    (channel,) = column([1, 2, 3], 0)
    shape: Shape = (3, 1, 1)
    scan = preprocess(
        Volume([channel], np.eye(4)), Preprocessing("RAS", None, "all", (Unchanged(),))
    )
    assert scan.result_box.shape == shape
    assert back(column([7, 8, 9], 0), scan) == [7, 8, 9]
