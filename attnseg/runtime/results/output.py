"""Output folders: checked before any work, and written with errors that say what to do."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from attnseg.runtime import files
from attnseg.runtime.errors import OutputError

_CHOOSE_ANOTHER = "choose another output folder"


def prepare_folder(folder: Path) -> None:
    """Create a folder, and check that files can be written to it.

    Raises:
        OutputError: The path is a file, or the folder cannot be created or written to.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file, not a folder", _CHOOSE_ANOTHER)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"attnseg")
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written to ({error.strerror})", _CHOOSE_ANOTHER
        ) from error


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Convert an `OSError` in the block to an `OutputError` with a mend."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise OutputError(
            f"{target}: results could not be written ({error.strerror})",
            "free some space and run again" if full else "check the folder and run again",
        ) from error


def write_results(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write a set of files whose last one marks it as finished; see `files.write_files`.

    Raises:
        OutputError: A file could not be written. No partial file remains, and before the first
            rename nothing has changed.
    """
    with _explained(folder):
        files.write_files(folder, contents)
