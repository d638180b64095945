from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from attnseg import Bundle, Volume
from attnseg.runtime.results.picture import _largest_section, _outline, _plane, render_picture

OEDEMA, ENHANCING = (70, 200, 110), (255, 210, 60)


def test_the_section_is_where_most_is_labelled() -> None:
    labels = np.zeros((5, 6, 7), np.uint8)
    labels[1, 2:4, 5] = 1
    labels[1, 3, 6] = 2
    assert _largest_section(labels) == (1, 3, 5)
    assert _largest_section(np.zeros((5, 6, 7), np.uint8)) == (2, 3, 3)


def test_planes_show_front_up_and_head_up() -> None:
    array = np.arange(2 * 3 * 4).reshape(2, 3, 4)  # X to the left, Y to the back, Z up
    axial, coronal = _plane(array, 2, 1), _plane(array, 1, 0)
    assert axial.shape == (3, 2)
    assert axial[0, 0] == array[0, 0, 1]  # front row first
    assert coronal.shape == (4, 2)
    assert coronal[0, 0] == array[0, 0, 3]  # top of the head first


def test_an_outline_is_the_rim_of_a_mask() -> None:
    mask = np.zeros((5, 5), bool)
    mask[1:4, 1:4] = True
    rim = _outline(mask)
    assert rim.sum() == 8
    assert not rim[2, 2]
    assert not (rim & ~mask).any()


def colours_above_the_legend(stored: bytes) -> dict[tuple[int, int, int], int]:
    picture = Image.open(io.BytesIO(stored)).convert("RGB")
    panels = picture.crop((0, 0, picture.width, picture.height - 20))
    return {colour: count for count, colour in panels.getcolors(1 << 24) or []}


def test_each_label_is_outlined_in_its_colour_and_no_other() -> None:
    images = np.random.default_rng(0).integers(1, 900, (4, 40, 44, 36)).astype(np.int16)
    volume, manifest = Volume(images, np.diag([-1.0, -1, 1, 1])), Bundle.default().manifest
    labels = np.zeros((40, 44, 36), np.uint8)
    labels[10:20, 10:20, 10:20] = 2
    colours = colours_above_the_legend(render_picture(volume, labels, manifest, "x"))
    # The longest edge, of 44 voxels, is drawn 300 pixels long: a square of 10 voxels has 68 pixels
    # along an edge, and a rim of 268; two rows of three panels.
    assert colours[OEDEMA] == 6 * 268
    assert ENHANCING not in colours
    empty = colours_above_the_legend(render_picture(volume, labels * 0, manifest, "x"))
    assert OEDEMA not in empty


def test_the_picture_does_not_depend_on_the_scans_orientation() -> None:
    images = np.random.default_rng(0).integers(1, 900, (4, 40, 44, 36)).astype(np.int16)
    volume, manifest = Volume(images, np.diag([-1.0, -1, 1, 1])), Bundle.default().manifest
    labels = (images[0] > 700).astype(np.uint8)
    turned = volume.oriented("SAR")
    other = Volume([labels], volume.affine).oriented("SAR").channels[0]
    first = render_picture(volume, labels, manifest, "x")
    assert render_picture(turned, np.asarray(other), manifest, "x") == first


def test_voxels_are_drawn_in_their_shape() -> None:
    images = np.random.default_rng(0).integers(1, 900, (4, 150, 150, 30)).astype(np.int16)
    manifest, labels = Bundle.default().manifest, np.zeros((150, 150, 30), np.uint8)
    sizes = [
        Image.open(io.BytesIO(render_picture(Volume(images, affine), labels, manifest, "x"))).size
        for affine in (np.diag([-1.0, -1, 1, 1]), np.diag([-1.0, -1, 6, 1]))
    ]
    # Two rows of panels 300 pixels high; 6 mm slices make the coronal and sagittal ones 360 high.
    assert sizes[1][1] - sizes[0][1] == 2 * 60


@pytest.mark.parametrize("spacing_mm", [(1, 1, 1), (1e-3, 1, 1), (20, 1, 0.05)])
@pytest.mark.parametrize("shape", [(6, 8, 7), (40, 44, 36), (400, 300, 20)])
def test_no_picture_is_tiny_or_huge(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> None:
    images = np.random.default_rng(0).integers(1, 900, (4, *shape)).astype(np.int16)
    volume = Volume(images, np.diag([*spacing_mm, 1.0]))
    stored = render_picture(volume, np.zeros(shape, np.uint8), Bundle.default().manifest, "x")
    width, height = Image.open(io.BytesIO(stored)).size
    assert max(width, height) >= 300
    assert width <= 3 * 640 + 16
    assert height <= 2 * (640 + 18) + 36


def test_warnings_are_written_below_the_title_and_wrapped() -> None:
    images = np.random.default_rng(0).integers(1, 900, (4, 40, 44, 36)).astype(np.int16)
    volume, labels = Volume(images, np.eye(4)), np.zeros((40, 44, 36), np.uint8)
    manifest = Bundle.default().manifest
    plain = Image.open(io.BytesIO(render_picture(volume, labels, manifest, "x")))
    warned = render_picture(volume, labels, manifest, "x", warnings=["short", "very long " * 40])
    picture = Image.open(io.BytesIO(warned)).convert("RGB")
    lines, rest = divmod(picture.height - plain.height, 18)
    assert rest == 0
    assert lines > 3  # the long one takes several
    red, _, blue = np.moveaxis(np.asarray(picture).astype(int), -1, 0)
    amber = red - blue > 80
    for line in range(1, lines + 1):
        assert amber[18 * line : 18 * line + 18].any()
    assert not amber[18 * (lines + 1) : -20].any()  # down to the legend
