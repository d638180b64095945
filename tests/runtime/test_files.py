"""Files are written whole or not at all."""

from __future__ import annotations

import ctypes
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from attnseg.runtime import files
from attnseg.runtime.files import new_folder, remove_partial, write_file, write_files


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


RANDOM = "0123456789abcdef"


@contextmanager
def locked_by_another(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Hold the lock of a folder in another process."""
    code = (
        "import fcntl, os, sys; fd = os.open(sys.argv[1], os.O_RDONLY); "
        "fcntl.flock(fd, fcntl.LOCK_EX); print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        try:
            yield process
        finally:
            process.kill()


def leave(folder: Path) -> list[str]:
    """Make what killed processes leave in a folder, and other files; return the names of those."""
    (folder / f".a.nii.gz.{RANDOM}.part").write_bytes(b"half")
    (folder / f".model.{RANDOM}.part").mkdir()
    (folder / f".model.{RANDOM}.part" / "graph").write_bytes(b"half")
    (folder / "precious").mkdir()
    (folder / "precious" / "text").write_bytes(b"text")
    (folder / f".link.{RANDOM}.part").symlink_to(folder / "precious")
    (folder / f".model.{RANDOM}.part" / "link").symlink_to(folder / "precious")
    others = [".a.part", f".a.{RANDOM[1:]}.part", f"a.{RANDOM}.part", f".a.{RANDOM}.part.old"]
    for name in others:
        (folder / name).touch()
    return sorted(["precious", f".link.{RANDOM}.part", *others])


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = leave(tmp_path)
    remove_partial(tmp_path)
    assert names(tmp_path) == kept
    assert names(tmp_path / "precious") == ["text"]
    remove_partial(tmp_path / "absent")


def test_only_what_was_meant_for_a_target_is_removed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f".{name}.{RANDOM}.part").touch()
    remove_partial(tmp_path, "a")
    assert names(tmp_path) == [f".b.{RANDOM}.part"]


def test_a_file_removes_what_was_left_of_itself(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f".{name}.{RANDOM}.part").touch()
    write_file(tmp_path / "a", b"text")
    assert names(tmp_path) == [f".b.{RANDOM}.part", "a"]


def test_nothing_is_removed_while_a_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_WAIT_S", 0.05)
    during: list[list[str]] = []

    def write(stream: IO[bytes]) -> None:
        stream.write(b"half")
        remove_partial(tmp_path)
        during.append(names(tmp_path))

    write_file(tmp_path / "a", write)
    assert len(during[0]) == 1 and during[0][0].endswith(".part")
    assert names(tmp_path) == ["a"]


def test_a_folder_under_construction_is_not_removed_until_its_process_ends(tmp_path: Path) -> None:
    draft = tmp_path / f".model.{RANDOM}.part"
    draft.mkdir()
    with locked_by_another(draft):
        remove_partial(tmp_path)
        assert names(tmp_path) == [draft.name]
    remove_partial(tmp_path)
    assert names(tmp_path) == []


def test_a_new_folder_is_locked_and_removes_what_was_left_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / f".model.{RANDOM}.part").mkdir()
    (tmp_path / f".other.{RANDOM}.part").mkdir()
    with new_folder(tmp_path / "model") as (temporary, finish):
        remove_partial(tmp_path)
        assert names(tmp_path) == [temporary.name]
        finish()
    assert names(tmp_path) == ["model"]


def test_a_writer_waits_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[list[str]] = []
    with locked_by_another(tmp_path) as process:

        def wait(_: float) -> None:
            waited.append(names(tmp_path))
            process.kill()
            process.wait()

        monkeypatch.setattr(files.time, "sleep", wait)
        write_files(tmp_path, {"a": b"text"})
    assert waited == [[]]
    assert names(tmp_path) == ["a"]


def test_a_writer_does_not_wait_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_WAIT_S", 0.05)
    with locked_by_another(tmp_path):
        with pytest.raises(TimeoutError, match="another process keeps it locked"):
            write_file(tmp_path / "a", b"text")
        with pytest.raises(TimeoutError, match="another process keeps it locked"):
            write_files(tmp_path, {"a": b"text"})
        remove_partial(tmp_path)
    assert names(tmp_path) == []


def test_a_check_that_fails_leaves_everything(tmp_path: Path) -> None:
    write_files(tmp_path, {"labels": b"old", "report": b"old"})

    def check() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        write_files(tmp_path, {"labels": b"new", "report": b"new"}, check)
    assert {file.read_bytes() for file in tmp_path.iterdir()} == {b"old"}
    write_file(tmp_path / "labels", b"unlocked again")


def no_locks(*_: object) -> None:
    raise OSError(9, "Bad file descriptor")  # as NFS does for a folder


@pytest.mark.parametrize("way", ["platform", "file system"])
def test_without_locks_files_are_written_and_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    kept = leave(tmp_path)
    if way == "platform":
        monkeypatch.setattr(files, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    before = names(tmp_path)
    write_file(tmp_path / "a.nii.gz", b"text")
    with new_folder(tmp_path / "folder") as (_, finish):
        finish()
    remove_partial(tmp_path)
    assert names(tmp_path) == sorted([*before, "a.nii.gz", "folder"])
    assert set(kept) < set(before)


def refused(*_: object) -> int:
    return -1


class OtherLibrary:
    """A C library without `renameat2`, or whose file system refuses it."""

    def __init__(self, *_: object, **__: object) -> None:
        self.renameat2 = refused


class OldLibrary:
    def __init__(self, *_: object, **__: object) -> None:
        pass


@pytest.mark.parametrize("library", [ctypes.CDLL, OtherLibrary, OldLibrary])
def test_a_folder_is_replaced_with_and_without_an_exchange_by_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Callable[..., Any]
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", library)
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    with new_folder(target, replace=True) as (temporary, finish):
        (temporary / "new").touch()
        finish()
    assert names(target) == ["new"]
    assert names(tmp_path) == ["model"]


def test_a_folder_that_is_replaced_is_never_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("two renames")

    target = tmp_path / "model"
    target.mkdir()
    with new_folder(target, replace=True) as (_, finish):
        monkeypatch.setattr(os, "replace", fail)
        finish()


def test_a_folder_that_cannot_be_replaced_keeps_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", OldLibrary)
    target, replace = tmp_path / "model", os.replace
    target.mkdir()
    (target / "old").touch()

    def fail_at_second(source: Path, destination: Path) -> None:
        if source.name.endswith(".part"):
            raise OSError("refused")
        replace(source, destination)

    with new_folder(target, replace=True) as (_, finish):
        monkeypatch.setattr(os, "replace", fail_at_second)
        with pytest.raises(OSError, match="refused"):
            finish()
    assert names(target) == ["old"]
    assert names(tmp_path) == ["model"]
