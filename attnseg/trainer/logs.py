"""What a run tells of itself: a CSV file, events for TensorBoard, a picture of its curves."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from attnseg.runtime.errors import TrainingError
from attnseg.trainer.curves import draw_curves

log = logging.getLogger(__name__)

LOG, CURVES, EVENTS = "log.csv", "curves.png", "tensorboard"


def _write_events(folder: Path, row: Mapping[str, Any]) -> None:
    """The row of the log for TensorBoard."""
    with SummaryWriter(str(folder), purge_step=row["epoch"]) as writer:
        for name, value in row.items():
            if name != "epoch":
                writer.add_scalar(name.replace("_", "/", 1), value, row["epoch"])


def log_epoch(output: Path, row: dict[str, Any]) -> None:
    """Add an epoch to the log and to TensorBoard. Raises `TrainingError` on a full disk."""
    try:
        _append_log(output / LOG, row)
        _write_events(output / EVENTS, row)
    except OSError as error:
        raise TrainingError(
            f"{output}: could not be written to ({error.strerror or error}); free some space and "
            "use --resume"
        ) from error
    log.info("%s", "  ".join(f"{k} {v}" for k, v in row.items()))


def draw_log(output: Path) -> None:
    """The picture of the log. That it cannot be drawn must not hide what ended the run."""
    try:
        draw_curves(output / LOG, output / CURVES, output.resolve().name)
    except (OSError, ValueError) as error:  # a full disk, or a row that it cut short
        log.warning("%s: could not be drawn (%s)", output / CURVES, error)


def _append_log(path: Path, row: dict[str, Any]) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def cut_log(output: Path, epochs: int) -> None:
    """Drop the rows after `epochs`: of an epoch whose checkpoint was never finished."""
    path = output / LOG
    if epochs == 0:
        path.unlink(missing_ok=True)
    elif path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[: epochs + 1]), encoding="utf-8")
