"""Output folders: checked before any work, and written with errors that say what to do."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from attnseg.runtime import files
from attnseg.runtime.errors import OutputError

_CHOOSE_ANOTHER = "choose another output folder"
_MENDS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ETIMEDOUT: "end that process",
}
"""Mend of an error of the file system, by its number."""


def prepare_folder(folder: Path) -> None:
    """Create a folder, check that files can be written to it, and remove what killed runs left.

    Raises:
        OutputError: The path is a file, or the folder cannot be created or written to.
    """
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"attnseg")
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written to ({error.strerror})", _CHOOSE_ANOTHER
        ) from error
    files.remove_partial(folder)


def check_folder(folder: Path) -> None:
    """Check, before any work, that a path is a folder or can become one.

    Raises:
        OutputError: The path or one of its parents is a file or a dangling link, or it holds a null
            character.
    """
    if "\0" in str(folder):
        raise OutputError(f"{folder}: holds a null character", _CHOOSE_ANOTHER)
    for path in (folder, *folder.parents):
        if path.is_dir():
            return
        if path.is_symlink() and not path.exists():
            target = path.readlink()
            raise OutputError(
                f"{path}: is a link to {target}, which does not exist",
                f"create {target}, or {_CHOOSE_ANOTHER}",
            )
        if path.exists():
            raise OutputError(f"{path}: is a file, not a folder", _CHOOSE_ANOTHER)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Convert an `OSError` in the block to an `OutputError` with a mend."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{target}: results could not be written ({error.strerror})",
            f"{_MENDS.get(error.errno or 0, 'check the folder')} and run again",
        ) from error


def write_results(
    folder: Path, contents: Mapping[str, bytes], check: Callable[[], None] = lambda: None
) -> None:
    """Write a set of files whose last one marks it as finished; see `files.write_files`.

    Raises:
        OutputError: A file could not be written. No partial file remains, and before the first
            rename nothing has changed.
    """
    with _explained(folder):
        files.write_files(folder, contents, check)
