"""Learning curves of a run, as a PNG file."""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from attnseg.runtime.files import write_file


def draw_curves(log: Path, picture: Path, title: str) -> None:
    """Draw a run's `log.csv`: losses on the left, Dice per region on the right, by epoch.

    Nothing is written if the log has no epochs.
    """
    with log.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream, restval="")
        rows = [{key: float(value) for key, value in row.items()} for row in reader]
    if not rows:
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    for name in ("train_loss", "validation_loss"):
        losses.plot(epochs, [row[name] for row in rows], label=name.split("_")[0])
    for name in [n for n in rows[0] if n.startswith("validation_") and n != "validation_loss"]:
        scores.plot(epochs, [row[name] for row in rows], label=name.removeprefix("validation_"))
    losses.set(xlabel="epoch", ylabel="loss")
    scores.set(xlabel="epoch", ylabel="Dice on the validation cases", ylim=(0, 1))
    for axes in (losses, scores):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    write_file(picture, lambda stream: figure.savefig(stream, format="png", dpi=120))
