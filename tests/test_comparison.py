"""The comparison of training runs, on runs whose files are written by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from attnseg.evaluation.metrics import Scores
from attnseg.evaluation.scores import encode_scores
from attnseg.trainer.checkpoint import save_checkpoint
from attnseg.trainer.config import TrainConfig
from benchmarks import comparison
from tests.trainer.states import SMALL, state_of

HEADER = "epoch,train_loss,validation_loss,validation_WT,validation_TC,validation_ET,learning_rate"


def write_run(folder: Path, name: str, cross_entropy_weight: float) -> Path:
    """Two epochs with a mean Dice of 0.5 and 0.6; scores 0.9, 0.6 and 0.3 of one case."""
    run = folder / name
    (run / "evaluation").mkdir(parents=True)
    (run / "log.csv").write_text(f"{HEADER}\n1,1,1,0.7,0.5,0.3,0.1\n2,0.5,0.9,0.8,0.6,0.4,0.1\n")
    config = TrainConfig(SMALL, patch=8, cross_entropy_weight=cross_entropy_weight)
    state = state_of(config=config.to_dict(), epoch=2, seconds=120.0)
    for file in ("best.pt", "last.pt"):
        save_checkpoint(run / file, state)
    scores = {
        region: Scores(dice, 2.0, 1, 1, 1)
        for region, dice in {"WT": 0.9, "TC": 0.6, "ET": 0.3}.items()
    }
    (run / "evaluation" / "cases.csv").write_bytes(encode_scores({"a": scores}))
    return run


def test_the_mean_dice_of_an_epoch_is_that_of_its_regions(tmp_path: Path) -> None:
    rows = comparison.read_log(write_run(tmp_path, "a", 0.5))
    assert [row["validation_mean"] for row in rows] == pytest.approx([0.5, 0.6])


@pytest.mark.parametrize(
    ("weights", "panels", "width"),
    [
        ((0.5, 0.5), ["WT", "TC", "ET", "mean", "train loss"], 1800),
        ((0, 1), ["WT", "TC", "ET", "mean"], 1200),
    ],
    ids=["one loss", "two losses"],
)
def test_training_losses_are_drawn_only_if_they_are_the_same_loss(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    weights: tuple[float, float],
    panels: list[str],
    width: int,
) -> None:
    titles = []
    real = comparison.Figure.savefig

    def save(figure: comparison.Figure, *args: object, **options: object) -> None:
        titles.extend(axes.get_title().removeprefix("validation ") for axes in figure.axes)
        assert [line.get_label() for line in figure.axes[0].lines] == ["a", "b"]
        assert figure.axes[3].lines[0].get_ydata() == pytest.approx([0.5, 0.6])
        real(figure, *args, **options)

    monkeypatch.setattr(comparison.Figure, "savefig", save)
    runs = [write_run(tmp_path, name, w) for name, w in zip("ab", weights, strict=True)]
    comparison.draw(runs, tmp_path / "a.png")
    assert [title for title in titles if title] == panels
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (width, 800)


def test_logs_and_picture_are_written_and_the_table_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, "hybrid", 0.5)
    out = tmp_path / "results"
    monkeypatch.setattr(sys, "argv", ["comparison", str(run), "-o", str(out), "--picture", "x.png"])
    comparison.main()
    assert {file.name for file in out.iterdir()} == {"hybrid.csv", "x.png"}
    assert (out / "hybrid.csv").read_bytes() == (run / "log.csv").read_bytes()
    row = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert row[0] == "hybrid"
    assert row[3:] == ["0.900", "0.600", "0.300", "0.600", "2.0", "2.0", "2.0", "2", "2"]
