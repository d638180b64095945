"""A picture of a segmentation: three planes through the largest section, labels as outlines."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from attnseg.runtime.case.volume import Volume
from attnseg.runtime.geometry import reorient
from attnseg.runtime.model.manifest import Manifest
from attnseg.runtime.steps.foreground import foreground_box

_DISPLAY_ORIENTATION = "LPS"  # rows grow downwards: the radiological view
_PLANES = ("sagittal", "coronal", "axial")
_COLOURS = (
    (230, 80, 70),
    (70, 200, 110),
    (255, 210, 60),
    (90, 160, 255),
    (220, 120, 230),
)
_SCALE = 2
_MARGIN = 18


def _largest_section(labels: NDArray[np.uint8]) -> tuple[int, int, int]:
    """Index along X, Y and Z of the slice with most labelled voxels; the middle if none."""
    if not labels.any():
        return (labels.shape[0] // 2, labels.shape[1] // 2, labels.shape[2] // 2)
    marked = labels > 0
    x, y, z = (int(np.argmax(marked.sum(axis=axes))) for axes in ((1, 2), (0, 2), (0, 1)))
    return x, y, z


def _plane(array: NDArray[Any], axis: int, index: int) -> NDArray[Any]:
    """One slice as (rows, columns), with the head up where Z runs along the rows."""
    plane: NDArray[Any] = np.take(array, index, axis=axis).T
    return plane if axis == 2 else plane[::-1]


def _grey(plane: NDArray[Any], top: float) -> NDArray[np.uint8]:
    return np.asarray(np.clip(plane / max(top, 1e-6), 0, 1) * 255, np.uint8)


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of the mask with one of four neighbours outside it."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.asarray(mask & ~inside)


def _panel(
    image: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    values: Sequence[int],
    aspect: tuple[float, float],
) -> Image.Image:
    """Grey slice with the outline of each label in its colour.

    `aspect` is the height and the width of a voxel in units of the smallest spacing.
    """
    rows, columns = (
        (np.arange(round(size * _SCALE * factor)) / (_SCALE * factor)).astype(int)
        for size, factor in zip(image.shape, aspect, strict=True)
    )
    rgb = np.stack([image[rows][:, columns]] * 3, axis=-1)
    big = labels[rows][:, columns]
    for order, value in enumerate(values):
        rgb[_outline(big == value)] = _COLOURS[order % len(_COLOURS)]
    return Image.fromarray(rgb)


def _aspect(spacing_mm: Sequence[float], axis: int) -> tuple[float, float]:
    """Height and width of a voxel in the plane normal to `axis`; the smallest spacing is 1."""
    across = [s / min(spacing_mm) for i, s in enumerate(spacing_mm) if i != axis]
    return across[1], across[0]


def _legend(draw: ImageDraw.ImageDraw, manifest: Manifest, top: int) -> None:
    x = 4
    for order, label in enumerate(manifest.task.labels[1:]):
        colour = _COLOURS[order % len(_COLOURS)]
        draw.rectangle((x, top + 4, x + 9, top + 13), fill=colour)
        draw.text((x + 14, top + 3), label.name, fill=(220, 220, 220))
        x += 30 + int(draw.textlength(label.name))
    draw.text((x, top + 3), f"{manifest.name}: {manifest.intended_use}", fill=(150, 150, 150))


def _encode(canvas: Image.Image) -> bytes:
    stream = io.BytesIO()
    canvas.save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def render_picture(
    volume: Volume,
    labels: NDArray[np.uint8],
    manifest: Manifest,
    title: str,
    truth: NDArray[np.uint8] | None = None,
) -> bytes:
    """A PNG file: one row per channel in the manifest's `display`, one column per plane.

    Args:
        volume: The segmented volume.
        labels: `(X, Y, Z)` uint8 in the volume's grid.
        manifest: Manifest with the names and values of the labels and the channels to show.
        title: Text above the picture.
        truth: Expert labels, `(X, Y, Z)` uint8 in the volume's grid, drawn below on the same
            slices; unless they are all 0, the slices are those with most expert labels.
    """
    if truth is None:
        return _encode(_draw(volume, labels, manifest, title, labels))
    focus = truth if truth.any() else labels
    parts = [
        _draw(volume, labels, manifest, title, focus),
        _draw(volume, truth, manifest, "truth", focus),
    ]
    canvas = Image.new("RGB", (parts[0].width, sum(part.height for part in parts)))
    canvas.paste(parts[0], (0, 0))
    canvas.paste(parts[1], (0, parts[0].height))
    return _encode(canvas)


def _draw(
    volume: Volume,
    labels: NDArray[np.uint8],
    manifest: Manifest,
    title: str,
    focus: NDArray[np.uint8],
) -> Image.Image:
    """The picture of `labels`, on the slices with most voxels of `focus`."""
    turned = volume.oriented(_DISPLAY_ORIENTATION)
    box = foreground_box(turned.channels, manifest.preprocessing.crop)
    labels, focus = (
        reorient(array, volume.orientation, _DISPLAY_ORIENTATION)[box.slices()]
        for array in (labels, focus)
    )
    section = _largest_section(focus)
    names = manifest.task.channel_names
    values = manifest.task.label_values[1:]
    rows = []
    for name in manifest.task.display:
        channel = turned.channels[names.index(name)][box.slices()]
        planes = [_plane(channel, axis, section[axis]) for axis in (2, 1, 0)]
        top = max(float(np.percentile(p[p != 0], 99.5)) if p.any() else 0.0 for p in planes)
        rows.append(
            [
                _panel(
                    _grey(p, top),
                    _plane(labels, axis, section[axis]),
                    values,
                    _aspect(turned.spacing_mm, axis),
                )
                for p, axis in zip(planes, (2, 1, 0), strict=True)
            ]
        )
    width = sum(panel.width for panel in rows[0])
    height = sum(max(p.height for p in row) + _MARGIN for row in rows) + 2 * _MARGIN
    canvas = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(canvas)
    draw.text((4, 3), title, fill=(255, 255, 255))
    y = _MARGIN
    for name, row in zip(manifest.task.display, rows, strict=True):
        x = 0
        for panel, axis in zip(row, (2, 1, 0), strict=True):
            text = f"{name}, {_PLANES[axis]} slice {section[axis] + box.start[axis]}"
            draw.text((x + 4, y + 3), text, fill=(200, 200, 200))
            canvas.paste(panel, (x, y + _MARGIN))
            if axis != 0:  # seen from below or in front: the patient's right is on the left
                middle = y + _MARGIN + panel.height // 2
                draw.text((x + 3, middle), "R", fill=(200, 200, 200))
                draw.text((x + panel.width - 10, middle), "L", fill=(200, 200, 200))
            x += panel.width
        y += max(panel.height for panel in row) + _MARGIN
    _legend(draw, manifest, y)
    return canvas
