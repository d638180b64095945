"""Files are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

import pytest

from attnseg.runtime.files import new_folder, write_file, write_files


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def fail(stream: IO[bytes]) -> None:
    stream.write(b"half")
    raise OSError("no space left")


def test_a_file_replaces_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "a"
    write_file(file, b"first")
    write_file(file, lambda stream: stream.write(b"second"))
    assert file.read_bytes() == b"second"
    assert names(tmp_path) == ["a"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a"
    write_file(file, b"first")
    with pytest.raises(OSError, match="no space left"):
        write_file(file, fail)
    assert file.read_bytes() == b"first"
    assert names(tmp_path) == ["a"]


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    monkeypatch.setattr("attnseg.runtime.files.secrets.token_hex", lambda _: "guessed")
    (tmp_path / ".a.guessed.part").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "a", b"text")
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "a").exists()


def test_a_link_in_the_place_of_the_target_is_replaced_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "a").symlink_to(victim)
    write_file(tmp_path / "a", b"text")
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "a").is_symlink()


def test_the_mark_of_a_set_comes_last_and_is_never_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, {"labels": b"old", "report": b"old"})
    replace, done = os.replace, []

    def interrupt(source: Path, target: Path) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(target.name)
        replace(source, target)

    monkeypatch.setattr("attnseg.runtime.files.os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_files(tmp_path, {"labels": b"new", "report": b"new"})
    assert done == ["labels"]
    assert names(tmp_path) == ["labels"]


def test_a_set_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    write_files(tmp_path, {"labels": b"old", "report": b"old"})
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError):
        write_files(tmp_path, {"labels": b"new", "nowhere/report": b"new"})
    assert (tmp_path / "labels").read_bytes() == b"old"
    assert names(tmp_path) == ["folder", "labels", "report"]


def test_a_folder_appears_when_it_is_finished(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with new_folder(target) as (temporary, finish):
        (temporary / "a").write_bytes(b"text")
        assert not target.exists()
        finish()
    assert names(target) == ["a"]
    assert names(target.parent) == ["model"]


def test_a_folder_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "model") as (folder, _):
        (folder / "a").write_bytes(b"text")
    assert names(tmp_path) == []


def test_a_folder_with_content_is_never_replaced(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "precious").write_bytes(b"text")
    with pytest.raises(OSError, match="not empty"), new_folder(target) as (_, finish):
        finish()
    assert names(target) == ["precious"]
    assert names(tmp_path) == ["model"]
