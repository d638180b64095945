from __future__ import annotations

import logging
from pathlib import Path

import pytest

from attnseg.runtime.errors import TrainingError
from attnseg.trainer.logs import cut_log, draw_log, log_epoch

HEADER = "epoch,train_loss\n"


@pytest.mark.parametrize(
    ("epochs", "left"), [(1, HEADER + "1,0.5\n"), (2, HEADER + "1,0.5\n2,0.4\n"), (0, None)]
)
def test_rows_after_the_last_finished_epoch_are_dropped(
    tmp_path: Path, epochs: int, left: str | None
) -> None:
    file = tmp_path / "log.csv"
    file.write_text(HEADER + "1,0.5\n2,0.4\n3,0.")
    cut_log(tmp_path, epochs)
    assert (file.read_text() if file.exists() else None) == left


def test_a_log_that_is_not_there_is_left_so(tmp_path: Path) -> None:
    for epochs in (0, 3):
        cut_log(tmp_path, epochs)
    assert list(tmp_path.iterdir()) == []


def test_each_epoch_is_a_row_under_one_header(tmp_path: Path) -> None:
    for epoch in (1, 2):
        log_epoch(tmp_path, {"epoch": epoch, "train_loss": 0.5})
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert rows == ["epoch,train_loss", "1,0.5", "2,0.5"]


def test_a_folder_that_cannot_be_written_to_says_what_to_do(tmp_path: Path) -> None:
    message = r"gone: could not be written to \(No such file or directory\); free some space"
    with pytest.raises(TrainingError, match=message):
        log_epoch(tmp_path / "gone", {"epoch": 1})


def test_a_picture_that_cannot_be_drawn_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "log.csv").write_text("epoch,train_loss,validation_loss\n1,0.5")
    with caplog.at_level(logging.WARNING):
        draw_log(tmp_path)
    assert "curves.png: could not be drawn" in caplog.text
