from __future__ import annotations

import io

import numpy as np
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
    # A square of 10 voxels, doubled, has a rim of 76 pixels; two rows of three panels.
    assert colours[OEDEMA] == 6 * 76
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
    images = np.random.default_rng(0).integers(1, 900, (4, 40, 44, 10)).astype(np.int16)
    manifest, labels = Bundle.default().manifest, np.zeros((40, 44, 10), np.uint8)
    sizes = [
        Image.open(io.BytesIO(render_picture(Volume(images, affine), labels, manifest, "x"))).size
        for affine in (np.diag([-1.0, -1, 1, 1]), np.diag([-1.0, -1, 5, 1]))
    ]
    # Two rows of panels 88 pixels high; 5 mm slices make the coronal and sagittal ones 100 high.
    assert sizes[1][1] - sizes[0][1] == 2 * 12
