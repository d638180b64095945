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
_SCALE = 2.0  # pixels per smallest voxel edge, within the limits of a panel's longest edge
_LEAST_PIXELS, _MOST_PIXELS = 300, 640
_MARGIN = 18
_GAP = 8
_NARROWEST = 480
_WHITE, _GREY, _AMBER = (255, 255, 255), (200, 200, 200), (255, 176, 0)


def _largest_section(labels: NDArray[np.uint8]) -> tuple[int, int, int]:
    """Index along X, Y and Z of the slice with most labelled voxels; the middle if none."""
    if not labels.any():
        return (labels.shape[0] // 2, labels.shape[1] // 2, labels.shape[2] // 2)
    marked = labels > 0
    x, y, z = (int(np.argmax(marked.sum(axis=axes))) for axes in ((1, 2), (0, 2), (0, 1)))
    return x, y, z


def _plane(array: NDArray[Any], axis: int, index: int) -> NDArray[Any]:
    """One slice as (rows, columns), with the head up where Z runs along the rows."""
    plane: NDArray[Any] = np.moveaxis(array, axis, 0)[index].T  # numpy.take copies the array first
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
    pixels: tuple[float, float],
) -> Image.Image:
    """Grey slice with the outline of each label in its colour.

    `pixels` is the height and the width of a voxel.
    """
    rows, columns = (
        np.minimum(np.arange(max(1, round(size * each))) / each, size - 1).astype(int)
        for size, each in zip(image.shape, pixels, strict=True)
    )
    rgb = np.stack([image[rows][:, columns]] * 3, axis=-1)
    big = labels[rows][:, columns]
    for order, value in enumerate(values):
        rgb[_outline(big == value)] = _COLOURS[order % len(_COLOURS)]
    return Image.fromarray(rgb)


def _pixels(shape: Sequence[int], spacing_mm: Sequence[float]) -> list[float]:
    """Pixels per voxel along X, Y and Z, so that no panel is tiny or huge."""
    edges = np.array(spacing_mm) / min(spacing_mm)
    longest = float((edges * shape).max())
    scale = np.clip(_SCALE, _LEAST_PIXELS / longest, _MOST_PIXELS / longest)
    return [float(edge * scale) for edge in edges]


def _legend(draw: ImageDraw.ImageDraw, manifest: Manifest, top: int) -> None:
    x = 4
    for order, label in enumerate(manifest.task.labels[1:]):
        colour = _COLOURS[order % len(_COLOURS)]
        draw.rectangle((x, top + 4, x + 9, top + 13), fill=colour)
        draw.text((x + 14, top + 3), label.name, fill=(220, 220, 220))
        x += 30 + int(draw.textlength(label.name))
    draw.text((x, top + 3), f"{manifest.name}: {manifest.intended_use}", fill=(150, 150, 150))


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of `text` that are at most `width` pixels wide, broken between words."""
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and ruler.textlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


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
    warnings: Sequence[str] = (),
) -> bytes:
    """A PNG file: one row per channel in the manifest's `display`, one column per plane.

    Args:
        volume: The segmented volume.
        labels: `(X, Y, Z)` uint8 in the volume's grid.
        manifest: Manifest with the names and values of the labels and the channels to show.
        title: Text above the picture.
        truth: Expert labels, `(X, Y, Z)` uint8 in the volume's grid, drawn below on the same
            slices; unless they are all 0, the slices are those with most expert labels.
        warnings: Warnings of the result, which are written below the title.
    """
    focus = truth if truth is not None and truth.any() else labels
    parts = [_draw(volume, labels, manifest, (title, *warnings), focus)]
    if truth is not None:
        parts.append(_draw(volume, truth, manifest, ("truth",), focus))
    canvas = Image.new("RGB", (parts[0].width, sum(part.height for part in parts)))
    top = 0
    for part in parts:
        canvas.paste(part, (0, top))
        top += part.height
    return _encode(canvas)


def _draw(
    volume: Volume,
    labels: NDArray[np.uint8],
    manifest: Manifest,
    texts: Sequence[str],
    focus: NDArray[np.uint8],
) -> Image.Image:
    """The picture of `labels`, on the slices with most voxels of `focus`.

    `texts` are the title and the warnings.
    """
    turned = volume.oriented(_DISPLAY_ORIENTATION)
    box = foreground_box(turned.channels, manifest.preprocessing.crop)
    labels, focus = (
        reorient(array, volume.orientation, _DISPLAY_ORIENTATION)[box.slices()]
        for array in (labels, focus)
    )
    section = _largest_section(focus)
    names = manifest.task.channel_names
    channels = [turned.channels[names.index(n)][box.slices()] for n in manifest.task.display]
    pixels = _pixels(box.shape, turned.spacing_mm)
    values = manifest.task.label_values[1:]
    rows = [_panels(channel, labels, section, values, pixels) for channel in channels]
    slices = [index + start for index, start in zip(section, box.start, strict=True)]
    return _compose(rows, manifest, texts, slices)


_AXES = (2, 1, 0)  # axial, coronal, sagittal from left to right


def _panels(
    channel: NDArray[Any],
    labels: NDArray[np.uint8],
    section: Sequence[int],
    values: Sequence[int],
    pixels: Sequence[float],
) -> list[Image.Image]:
    """The panels of one channel, one per plane."""
    planes = [_plane(channel, axis, section[axis]) for axis in _AXES]
    top = max(float(np.percentile(p[p != 0], 99.5)) if p.any() else 0.0 for p in planes)
    panels = []
    for plane, axis in zip(planes, _AXES, strict=True):
        width, height = (pixels[other] for other in range(3) if other != axis)
        marked = _plane(labels, axis, section[axis])
        panels.append(_panel(_grey(plane, top), marked, values, (height, width)))
    return panels


def _compose(
    rows: Sequence[Sequence[Image.Image]],
    manifest: Manifest,
    texts: Sequence[str],
    slices: Sequence[int],
) -> Image.Image:
    """Put title, warnings, panels and legend on one canvas."""
    width = max(_NARROWEST, sum(panel.width + _GAP for panel in rows[0]) - _GAP)
    lines = [
        (line, _AMBER if order else _WHITE)
        for order, text in enumerate(texts)
        for line in _wrapped(f"warning: {text}" if order else text, width - 8)
    ]
    height = sum(max(p.height for p in row) + _MARGIN for row in rows) + _MARGIN
    canvas = Image.new("RGB", (width, height + _MARGIN * len(lines)))
    draw = ImageDraw.Draw(canvas)
    for order, (line, colour) in enumerate(lines):
        draw.text((4, order * _MARGIN + 3), line, fill=colour)
    y = _MARGIN * len(lines)
    for name, row in zip(manifest.task.display, rows, strict=True):
        x = 0
        for panel, axis in zip(row, _AXES, strict=True):
            draw.text((x + 4, y + 3), f"{name}, {_PLANES[axis]} slice {slices[axis]}", fill=_GREY)
            canvas.paste(panel, (x, y + _MARGIN))
            if axis != 0:  # seen from below or in front: the patient's right is on the left
                bottom = y + panel.height + 3  # a corner, where the head is not
                draw.text((x + 3, bottom), "R", fill=_WHITE)
                draw.text((x + panel.width - 10, bottom), "L", fill=_WHITE)
            x += panel.width + _GAP
        y += max(panel.height for panel in row) + _MARGIN
    _legend(draw, manifest, y)
    return canvas
