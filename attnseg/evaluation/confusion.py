"""Voxel-wise confusion matrices of labels: counts, file, tables and picture.

A matrix is `(labels, labels)` int64: the number of voxels by true label (rows) and predicted label
(columns), both in the order of the task. Its diagonal holds the voxels that are correct; the others
of a column are the false positives of its label.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray

from attnseg.evaluation.metrics import check_shapes
from attnseg.evaluation.tables import markdown_table
from attnseg.runtime.errors import TrainingError
from attnseg.runtime.text import csv_cell

MATRICES, MATRIX_PICTURE = "confusion.csv", "confusion.png"
"""File names in an evaluation's folder."""

Counts = NDArray[np.int64]

_CHUNK_VOXELS = 1 << 18  # counted at once, so that a large case takes no memory beside its labels
_VALUES = 256  # of uint8
_MOST_WRITTEN = 30  # labels of a picture with numbers in its cells
_WRITTEN_IN, _PLAIN_IN = 0.85, 0.15  # width of a cell with and without numbers, in inches


def confusion_matrix(
    prediction: NDArray[np.uint8], truth: NDArray[np.uint8], label_values: Sequence[int]
) -> Counts:
    """Count the voxels of each true and each predicted label.

    Args:
        prediction: `(X, Y, Z)` uint8 predicted label values.
        truth: `(X, Y, Z)` uint8 true label values.
        label_values: Values of the task's labels.

    Returns:
        `(labels, labels)` int64, with rows for true and columns for predicted labels, in the order
        of `label_values`.

    Raises:
        TrainingError: The shapes differ, or a voxel has a value that is no label.
    """
    check_shapes(prediction, truth)
    counts = np.zeros(_VALUES**2, np.int64)
    chunks = np.nditer(
        (truth, prediction),
        ("buffered", "external_loop", "zerosize_ok"),
        buffersize=_CHUNK_VOXELS,
    )
    for rows, columns in chunks:
        pairs = rows.astype(np.uint16) * _VALUES + columns
        counts += np.bincount(pairs, minlength=counts.size)
    table = counts.reshape(_VALUES, _VALUES)
    labels = list(label_values)
    unknown = np.setdiff1d(np.flatnonzero(table.any(axis=0) | table.any(axis=1)), labels)
    if unknown.size:
        raise TrainingError(f"a voxel has label {unknown[0]}; the task has labels {labels}")
    return table[np.ix_(labels, labels)]


def total(matrices: Mapping[str, Counts]) -> Counts:
    """Sum of the matrices of all cases."""
    return np.asarray(np.sum(list(matrices.values()), axis=0))


def encode_matrices(names: Sequence[str], matrices: Mapping[str, Counts]) -> bytes:
    """Return the content of the file of matrices, CSV in UTF-8.

    Args:
        names: Names of the labels.
        matrices: Matrix of each case, by name. Their sum stands before them, with an empty name.
    """
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    cells = [csv_cell(name) for name in names]
    writer.writerow(("case", "true label", *cells))
    for case, matrix in {"": total(matrices), **matrices}.items():
        for cell, row in zip(cells, matrix.tolist(), strict=True):
            writer.writerow((csv_cell(case), cell, *row))
    return stream.getvalue().encode()


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _matrix_table(names: Sequence[str], matrix: Counts) -> str:
    rows = [
        (name, *(f"{count} ({_percent(count, sum(row))})" for count in row))
        for name, row in zip(names, matrix.tolist(), strict=True)
    ]
    return markdown_table(("true label", *names), rows)


def _false_positives_table(names: Sequence[str], matrix: Counts) -> str:
    """One row per label but the background, whose false positives are missed voxels."""
    rows = []
    for label, name in list(enumerate(names))[1:]:
        column: list[int] = matrix[:, label].tolist()
        false = sum(column) - column[label]
        origins = sorted(set(range(len(names))) - {label}, key=lambda i: -column[i])
        parts = [f"{names[i]} {_percent(column[i], false)}" for i in origins if column[i]]
        share = _percent(false, sum(column))
        rows.append((name, str(sum(column)), str(false), share, ", ".join(parts) or "-"))
    header = ("label", "predicted voxels", "false positives", "share", "their true labels")
    return markdown_table(header, rows)


def describe_matrix(names: Sequence[str], matrix: Counts) -> str:
    """Format two sections of the summary: the sum of all matrices, and the false positives."""
    return (
        "\n## Confusion matrix\n\nVoxels of all cases by true label (rows) and predicted label "
        f"(columns), and their share of the true label. {MATRICES} has those of each case.\n\n"
        f"{_matrix_table(names, matrix)}\n"
        "## False positives\n\nVoxels that are predicted as a label and have another true label, "
        "their share of the voxels predicted as it, and their true labels.\n\n"
        f"{_false_positives_table(names, matrix)}"
    )


@rc_context({"text.parse_math": False})  # a name may hold dollar signs
def draw_matrix(names: Sequence[str], matrix: Counts, title: str) -> bytes:
    """Draw a PNG file: each count, and its share of the true label in percent and as colour.

    With more than 30 labels it is the colour only.
    """
    sizes = matrix.sum(axis=1, keepdims=True)
    shares = matrix / np.maximum(sizes, 1)
    written = len(names) <= _MOST_WRITTEN
    edge = (_WRITTEN_IN if written else _PLAIN_IN) * len(names)
    figure = Figure(figsize=(max(edge, 3) + 2.5, max(edge * 0.7, 2) + 2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares if written else ()):
        count = int(matrix[row, column])
        colour = "white" if share > 0.5 else "black"
        text = f"{_percent(count, int(sizes[row, 0]))}\n{count}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
    places = range(len(names))
    size = "medium" if written else "xx-small"
    axes.set_xticks(places, names, size=size, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(places, names, size=size)
    axes.set(xlabel="predicted label", ylabel="true label")
    figure.colorbar(image, label="share of the true label")
    figure.suptitle(title)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()
