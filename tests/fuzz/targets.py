"""Targets of the fuzzer: each takes the content of a file, and raises `Fault` for a broken promise.

The inputs are read and judged as those of `tests.hostile` are.
"""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from attnseg.runtime.model.manifest import MANIFEST
from tests.hostile.bundles import Manifests, Reports, match_manifest
from tests.hostile.drive import Reader, judge
from tests.hostile.nifti import FILE, Nifti

CORPUS = Path(__file__).parent / "corpus"
_MEMORY = Path("/dev/shm")  # files are written in memory where the system has such a folder


class Fault(Exception):  # noqa: N818 - what the fuzzer looks for
    """A promise that an input broke."""


class Target:
    """Judges the content of one file of a reader's input."""

    def __init__(self, open_reader: Callable[[Path], Reader], file: str) -> None:
        """Open the reader; `file` is the path of the content within the folder of an input."""
        where = _MEMORY if _MEMORY.is_dir() else None
        self.folder = Path(tempfile.mkdtemp(prefix="attnseg-fuzz-", dir=where))
        self.reader, self.file = open_reader(self.folder / "seeds"), file
        self.input = self.folder / "input"

    def __call__(self, content: bytes) -> str:
        """Read one content; return `accepted` or `refused`.

        Raises:
            Fault: The reader raised another exception than it documents, gave no line of text, or
                read the content as what it is not.
        """
        file = self.input / self.file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(self.stored(content))
        self.complete(file)
        outcome, fault = judge(self.reader, self.input)
        if fault:
            raise Fault(f"{outcome}: {fault}")
        return outcome

    def stored(self, content: bytes) -> bytes:
        """The bytes of the file that `content` stands for."""
        return content

    def complete(self, file: Path) -> None:
        """Write what else belongs to an input."""

    def close(self) -> None:
        """Remove the folder of the inputs."""
        shutil.rmtree(self.folder)


class _Gzip(Target):
    """A gzip stream: of an image, with checksums that match, or as it is after its first bytes.

    The fuzzer does not find checksums by itself. The first byte of the content decides.
    """

    def stored(self, content: bytes) -> bytes:
        """See `Target.stored`."""
        kind, rest = content[:1], content[1:]
        return gzip.compress(rest, 1, mtime=0) if kind == b"\0" else b"\x1f\x8b\x08" + rest


class _Golden(Target):
    """A golden window in a bundle whose manifest matches it."""

    def complete(self, file: Path) -> None:
        """See `Target.complete`."""
        if not (file.parent / MANIFEST).exists():
            shutil.copytree(
                self.folder / "seeds" / "bundle",
                file.parent,
                ignore=lambda *_: [file.name],
                dirs_exist_ok=True,
            )
        match_manifest(file.parent)


TARGETS: dict[str, Callable[[], Target]] = {
    "nifti": lambda: Target(Nifti, FILE),
    "gzip": lambda: _Gzip(Nifti, FILE),
    "manifest": lambda: Target(Manifests, MANIFEST),
    "golden": lambda: _Golden(Reports, "bundle/golden.npz"),
}
"""Constructor of each target."""
