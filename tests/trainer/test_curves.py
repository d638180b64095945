from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import pytest
from matplotlib.figure import Figure
from PIL import Image

from attnseg.trainer.curves import draw_curves

HEADER = "epoch,train_loss,validation_loss,validation_liver,learning_rate,seconds\n"


def test_the_picture_has_a_line_per_loss_and_per_region(tmp_path: Path) -> None:
    log, picture = tmp_path / "log.csv", tmp_path / "curves.png"
    log.write_text(HEADER + "1,0.9,1.0,0.1,1e-3,5\n2,0.7,0.8,0.5,1e-3,5\n")
    draw_curves(log, picture, "run")
    with Image.open(picture) as image:
        assert (image.format, image.size) == ("PNG", (1200, 480))
        halves = [image.convert("RGB").crop((x, 0, x + 600, 480)) for x in (0, 600)]
    first, second = (31, 119, 180), (255, 127, 14)  # matplotlib's first two colours
    colours = [{colour for _, colour in half.getcolors(1 << 20)} for half in halves]
    assert {first, second} <= colours[0]
    assert first in colours[1] and second not in colours[1]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["curves.png", "log.csv"]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 40])
def test_ticks_are_whole_epochs(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []

    def savefig(figure: Figure, stream: BinaryIO, **options: Any) -> None:
        drawn.append(figure)
        real(figure, stream, **options)

    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", savefig)
    rows = "".join(f"{epoch},0.9,1.0,0.1,1e-3,5\n" for epoch in range(1, count + 1))
    (tmp_path / "log.csv").write_text(HEADER + rows)
    draw_curves(tmp_path / "log.csv", tmp_path / "curves.png", "run")
    for axes in drawn[0].axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == round(tick) for tick in ticks)


def test_a_log_without_epochs_gives_no_picture(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(HEADER)
    draw_curves(tmp_path / "log.csv", tmp_path / "curves.png", "run")
    assert not (tmp_path / "curves.png").exists()


def test_a_log_cut_short_gives_no_picture_and_leaves_no_rest(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(HEADER + "1,0.9,1.0,0.1,1e-3,5\n2,0.7")
    with pytest.raises(ValueError, match="could not convert"):
        draw_curves(tmp_path / "log.csv", tmp_path / "curves.png", "run")
    assert [f.name for f in tmp_path.iterdir()] == ["log.csv"]
