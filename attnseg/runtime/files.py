"""Atomic writing of files and folders.

A file is written under a temporary name in the folder of its target and renamed when it is
complete. attnseg writes every permanent file through this module.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

PARTIAL = ".part"
"""Suffix of incomplete files."""

_RANDOM_BYTES = 8
LONGEST_NAME = 255 - len(f"..{PARTIAL}") - 2 * _RANDOM_BYTES
"""Longest name of a file that can be written, in bytes; temporary names may have 255."""

Content = bytes | Callable[[IO[bytes]], object]
"""Content of a file, or a function that writes it to a stream."""


def _temporary_beside(target: Path) -> Path:
    """An unpredictable file name in the folder of `target`."""
    return target.with_name(f".{target.name}.{secrets.token_hex(_RANDOM_BYTES)}{PARTIAL}")


def _write_temporary(target: Path, content: Content) -> Path:
    """Write `content` beside `target`; the temporary file is removed on failure."""
    temporary = _temporary_beside(target)
    try:
        with temporary.open("xb") as stream:  # fails on an existing file or link
            if callable(content):
                content(stream)
            else:
                stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        _remove(temporary)
        raise
    return temporary


def _remove(file: Path) -> None:
    with suppress(OSError):
        file.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Remove files that killed processes left incomplete; nobody else may write to `folder`."""
    for file in folder.glob(f".*{PARTIAL}"):
        if file.is_file():
            _remove(file)


def write_file(target: Path, content: Content) -> None:
    """Write a file atomically; on failure an existing file is left unchanged.

    Raises:
        OSError: The file cannot be written; no partial file remains.
    """
    temporary = _write_temporary(target, content)
    try:
        os.replace(temporary, target)
    finally:
        _remove(temporary)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a set of files whose last file marks the set as complete.

    An existing last file is removed before the first rename, and the new one is renamed last, so
    that an interrupted set is never considered complete.

    Args:
        folder: Folder of the files; must exist.
        files: Content by file name.

    Raises:
        OSError: A file cannot be written. No partial file remains, and on a failure before the
            first rename, existing files are unchanged.
    """
    written: dict[Path, Path] = {}
    try:
        for name, content in files.items():
            written[_write_temporary(folder / name, content)] = folder / name
        list(written.values())[-1].unlink(missing_ok=True)
        for temporary, target in written.items():
            os.replace(temporary, target)
    finally:
        for temporary in written:
            _remove(temporary)


@contextmanager
def new_folder(target: Path, replace: bool = False) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Context manager for a temporary folder and a function that renames it to `target`.

    Unless it was renamed, the folder is removed on exit, together with the parent folders
    created for it. With `replace`, an existing `target` is removed once the new folder has its
    place; without, only an empty one.

    Raises:
        OSError: The folder cannot be created or renamed.
    """
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(target)
    temporary.mkdir()

    def finish() -> None:
        if not (replace and target.exists()):
            os.replace(temporary, target)  # fails if there is a file, or a folder with content
            return
        old = _temporary_beside(target)
        os.replace(target, old)
        try:
            os.replace(temporary, target)
        except OSError:
            os.replace(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)

    try:
        yield temporary, finish
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # not empty: it contains the target
                parent.rmdir()
