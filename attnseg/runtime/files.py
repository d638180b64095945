"""Atomic writing of files and folders.

A file is written under a temporary name in the folder of its target and renamed when it is
complete. attnseg writes every permanent file through this module.

Files are written under a lock of their folder, and a new folder is locked until it has its place.
Locks are those of `flock` on the folders themselves: there are no lock files, and a lock ends with
its process. Whoever holds the lock of a folder may therefore remove files with temporary names, and
folders with temporary names that are not locked: killed processes have left them. Where folders
cannot be locked (Windows, some network file systems), nothing is removed, and processes that write
to one folder are not kept apart.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".part"
"""Suffix of incomplete files."""

_RANDOM_BYTES = 8
LONGEST_NAME = 255 - len(f"..{PARTIAL}") - 2 * _RANDOM_BYTES
"""Longest name of a file that can be written, in bytes; temporary names may have 255."""

_TEMPORARY = re.compile(rf"\.(.+)\.[0-9a-f]{{{2 * _RANDOM_BYTES}}}{re.escape(PARTIAL)}", re.DOTALL)
_WAIT_S, _POLL_S = 60.0, 0.01
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux

Content = bytes | Callable[[IO[bytes]], object]
"""Content of a file, or a function that writes it to a stream."""


def read_file(path: Path) -> bytes:
    """Read a file that a user has named.

    Raises:
        OSError: The file cannot be read, or its name holds a null character.
    """
    try:
        return path.read_bytes()
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), str(path)) from error


def _temporary_beside(target: Path) -> Path:
    """An unpredictable file name in the folder of `target`."""
    return target.with_name(f".{target.name}.{secrets.token_hex(_RANDOM_BYTES)}{PARTIAL}")


def _lock(folder: Path, held: ExitStack) -> bool | None:
    """Lock a folder until `held` is closed.

    Returns:
        True if it is locked now, False if another process holds the lock, None if the folder cannot
        be locked at all.
    """
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        held.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # such as EBADF of NFS
        return None
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Keep other processes from writing to a folder in the block, which takes seconds at most.

    Yields:
        Whether the folder can be locked.

    Raises:
        TimeoutError: Another process kept the lock.
    """
    folder, last = Path(os.path.realpath(folder)), time.monotonic() + _WAIT_S
    while True:
        with ExitStack() as held:
            locked = _lock(folder, held)
            if locked is not False:
                yield bool(locked)
                return
        if time.monotonic() > last:
            raise TimeoutError(errno.ETIMEDOUT, "another process keeps it locked", str(folder))
        time.sleep(_POLL_S)


def remove_partial(folder: Path, target: str | None = None) -> None:
    """Remove files and folders that killed processes left incomplete.

    What a living process writes is left alone, and links are not followed.

    Args:
        folder: Folder to look in; may be absent.
        target: Name of the file or folder that was not completed; None for all of them.
    """
    with suppress(OSError), _locked(folder) as locked:
        if locked:
            _clear(folder, target)


def _clear(folder: Path, target: str | None) -> None:
    """`remove_partial` of a folder that is locked."""
    for path in folder.iterdir():
        found = _TEMPORARY.fullmatch(path.name)
        if found and target in (None, found[1]):
            _remove_left(path)


def _remove_left(path: Path) -> None:
    """Remove a file, or a folder that nobody has locked."""
    mode = path.lstat().st_mode
    if stat.S_ISREG(mode):
        _remove(path)
    elif stat.S_ISDIR(mode):
        with ExitStack() as held:
            if _lock(path, held):
                shutil.rmtree(path, ignore_errors=True)


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


def is_file(path: Path) -> bool:
    """Whether `path` is a file; false for one that cannot exist, such as a name that is too long.

    Use this for paths that a file of others names: `Path.is_file` raises `OSError` for some.
    """
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def write_file(target: Path, content: Content) -> None:
    """Write a file atomically; on failure an existing file is left unchanged.

    What killed processes left of the same file is removed.

    Raises:
        OSError: The file cannot be written; no partial file remains.
    """
    with _locked(target.parent) as locked:
        if locked:
            _clear(target.parent, target.name)
        temporary = _write_temporary(target, content)
        try:
            os.replace(temporary, target)
        finally:
            _remove(temporary)


def write_files(
    folder: Path, files: Mapping[str, bytes], check: Callable[[], None] = lambda: None
) -> None:
    """Write a set of files whose last file marks the set as complete.

    An existing last file is removed before the first rename, and the new one is renamed last, so
    that an interrupted set is never considered complete.

    Args:
        folder: Folder of the files; must exist.
        files: Content by file name.
        check: Function called before anything is written, while no other process can write; its
            exceptions are raised.

    Raises:
        OSError: A file cannot be written. No partial file remains, and on a failure before the
            first rename, existing files are unchanged.
    """
    written: dict[Path, Path] = {}
    with _locked(folder):
        check()
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
    remove_partial(target.parent, target.name)
    temporary = _temporary_beside(target)

    def finish() -> None:
        if replace and target.exists():
            _exchange(temporary, target)
        else:
            os.replace(temporary, target)  # fails if there is a file, or a folder with content

    with ExitStack() as held:
        with _locked(target.parent):
            temporary.mkdir()
            _lock(temporary, held)
        try:
            yield temporary, finish
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            for parent in made:
                with suppress(OSError):  # not empty: it contains the target
                    parent.rmdir()


def _exchange(new: Path, old: Path) -> None:
    """Exchange two folders, at once where the system can, so that `old` is never missing."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        names = (_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old))
        if libc.renameat2(*names, _RENAME_EXCHANGE) == 0:
            return
    except (AttributeError, OSError, TypeError):  # not Linux
        pass
    aside = old.with_name(f"{new.name}.old")  # no temporary name: it may be the only copy
    os.replace(old, aside)
    try:
        os.replace(new, old)
    except OSError:
        os.replace(aside, old)
        raise
    os.replace(aside, new)
