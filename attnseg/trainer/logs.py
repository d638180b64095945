"""Logs of a run: a CSV file, TensorBoard events, and a picture of the learning curves."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from attnseg.runtime.errors import TrainingError
from attnseg.runtime.files import write_file
from attnseg.trainer.checkpoint import FREE_SPACE_AND_RESUME
from attnseg.trainer.curves import draw_curves

log = logging.getLogger(__name__)

LOG, CURVES, EVENTS = "log.csv", "curves.png", "tensorboard"


def _write_events(folder: Path, row: Mapping[str, Any]) -> None:
    """Write a row of the log as TensorBoard events."""
    with SummaryWriter(str(folder), purge_step=row["epoch"]) as writer:
        for name, value in row.items():
            if name != "epoch":
                writer.add_scalar(name.replace("_", "/", 1), value, row["epoch"])


def log_epoch(output: Path, row: dict[str, Any]) -> None:
    """Append an epoch to the log and to TensorBoard.

    Raises:
        TrainingError: A file cannot be written.
    """
    try:
        _append_log(output / LOG, row)
        _write_events(output / EVENTS, row)
    except OSError as error:
        raise TrainingError(
            f"{output}: could not be written to ({error.strerror or error})",
            *FREE_SPACE_AND_RESUME,
        ) from error
    log.info("%s", "  ".join(f"{k} {v}" for k, v in row.items()))


def draw_log(output: Path) -> None:
    """Draw the learning curves; a failure is only logged, so that it hides no other error."""
    try:
        draw_curves(output / LOG, output / CURVES, output.resolve().name)
    except (OSError, ValueError) as error:  # a full disk, or a row that it truncated
        log.warning("%s: could not be drawn (%s)", output / CURVES, error)


def _append_log(path: Path, row: dict[str, Any]) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def cut_log(output: Path, epochs: int) -> None:
    """Drop the rows after `epochs`: those of an epoch whose checkpoint was not written."""
    path = output / LOG
    if epochs == 0:
        path.unlink(missing_ok=True)
    elif path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_file(path, "".join(lines[: epochs + 1]).encode())
