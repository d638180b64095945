"""Bundle: a model and all metadata that the runtime needs.

A bundle is a folder with `manifest.json` and the files that it lists with their checksums. The
format is specified field by field in `docs/bundle.md`. Bundles contain data only: the runtime does
not unpickle or execute anything in them (exception: version-compatible TensorRT engines).
"""

from __future__ import annotations

import hashlib
import os
import shlex
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Self

from attnseg.runtime.errors import BundleError, ConfigError, Setting
from attnseg.runtime.files import new_folder
from attnseg.runtime.model.graph import check_graph
from attnseg.runtime.model.manifest import (
    MANIFEST,
    SIGNATURE,
    EngineBuild,
    FileEntry,
    Manifest,
    Precision,
    Role,
)

_MODEL_FILES = {
    ".onnx": "an ONNX file",
    ".pt": "a checkpoint",
    ".safetensors": "a file of weights",
}


_LARGEST_MANIFEST = 16 << 20  # bytes; the shipped one has 7,000
_COPY_AGAIN = "copy the bundle again"


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file, or a link to one; a pipe or device is refused and not waited for.

    Raises:
        BundleError: The file is missing or of another kind, or reading it fails.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise BundleError(f"{path}: is not a regular file", _COPY_AGAIN)
            yield stream
    except (OSError, ValueError) as error:  # a name with a null character is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise BundleError(f"{path}: cannot be read ({reason})", _COPY_AGAIN) from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # not on Windows


def read_bounded(path: Path, largest: int) -> bytes:
    """Read a regular file of at most `largest` bytes.

    Raises:
        BundleError: The file is larger or of another kind, or cannot be read.
    """
    with _opened(path) as stream:
        size = _size_of(stream)
        if size > largest:
            raise BundleError(f"{path}: has {size} bytes, more than {largest}", _COPY_AGAIN)
        return stream.read(size)


def _size_of(stream: BufferedReader) -> int:
    return os.fstat(stream.fileno()).st_size


@dataclass(frozen=True)
class BundleFile:
    """A file of a bundle, whose content is compared with its checksum whenever it is read.

    Attributes:
        path: Path of the file.
        entry: Its entry in the manifest.
    """

    path: Path
    entry: FileEntry

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """Name of the file within the bundle."""
        return self.path.name

    def read_bytes(self) -> bytes:
        """Content of the file; the bytes returned are those that match the checksum.

        Raises:
            BundleError: The file cannot be read, or does not match its checksum.
        """
        with _opened(self.path) as stream:
            same_size = _size_of(stream) == self.entry.size_bytes
            content = stream.read(self.entry.size_bytes) if same_size else b""
        self._compare(hashlib.sha256(content).hexdigest() if same_size else "")
        return content

    def check(self) -> None:
        """Compare the file with its checksum, without holding its content in memory.

        Raises:
            BundleError: See `read_bytes`.
        """
        with _opened(self.path) as stream:
            same_size = _size_of(stream) == self.entry.size_bytes
            digest = hashlib.file_digest(stream, "sha256").hexdigest() if same_size else ""
        self._compare(digest)

    def _compare(self, sha256: str) -> None:
        if sha256 != self.entry.sha256:
            raise BundleError(
                f"{self.path}: does not match its checksum in {MANIFEST}; it was changed or "
                "damaged",
                _COPY_AGAIN,
            )


@dataclass(frozen=True)
class Bundle:
    """A model on disk, with verified checksums.

    Attributes:
        folder: Folder of the bundle.
        manifest: Content of the manifest.
        sha256: SHA-256 of the manifest, which identifies the whole bundle through the checksums in
            it; empty for a draft.
    """

    folder: Path
    manifest: Manifest
    sha256: str

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read a bundle, verify the checksum of every file, and check its graphs.

        Raises:
            BundleError: The folder is not a bundle, its format version is unknown, its manifest is
                invalid, a file is missing or does not match its checksum, or a graph is damaged,
                refers to other files, or does not fit the manifest.
        """
        folder = Path(folder)
        manifest_file = folder / MANIFEST
        if not folder.is_dir() or not manifest_file.is_file():
            raise _not_a_bundle(folder)
        stored = read_bounded(manifest_file, _LARGEST_MANIFEST)
        manifest = _decode(manifest_file, stored)
        bundle = cls(folder, manifest, hashlib.sha256(stored).hexdigest())
        for file in bundle.files:
            if file.entry.role == "onnx":
                check_graph(file.path, file.read_bytes(), manifest.task)
            else:
                file.check()
        return bundle

    @classmethod
    def default(cls) -> Self:
        """Load the bundle shipped with attnseg, a research demonstration."""
        return cls.load(default_folder())

    @property
    def files(self) -> tuple[BundleFile, ...]:
        """All files but the manifest and its signature, in the order of the manifest."""
        return tuple(BundleFile(self.folder / n, e) for n, e in self.manifest.files.items())

    def read_manifest(self) -> bytes:
        """Bytes of the manifest, as they were when the bundle was loaded.

        Raises:
            BundleError: The manifest was changed since, or cannot be read.
        """
        file = self.folder / MANIFEST
        stored = read_bounded(file, _LARGEST_MANIFEST)
        if hashlib.sha256(stored).hexdigest() != self.sha256:
            raise BundleError(f"{file}: was changed while the bundle was in use", "open it again")
        return stored

    def file(self, role: Role, precision: Precision | None = None) -> BundleFile:
        """File with a role and precision; without a precision, fp32 for `onnx`.

        Raises:
            BundleError: The bundle has no such file.
        """
        wanted = precision or ("fp32" if role == "onnx" else None)
        for file in self.files:
            if file.entry.role == role and wanted in (None, file.entry.precision):
                return file
        kind = f"{role} {precision}" if precision else role
        raise BundleError(f"{self.folder}: has no file of role {kind}", "export the model again")

    def has(self, role: Role, precision: Precision | None = None) -> bool:
        """Whether the bundle has a file with a role and, if given, a precision."""
        return any(
            entry.role == role and precision in (None, entry.precision)
            for entry in self.manifest.files.values()
        )


def _not_a_bundle(path: Path) -> BundleError:
    """Error for a path that is no bundle; for a model file, with the line that exports it."""
    suffix, shown = path.suffix.lower(), shlex.quote(str(path))
    if not path.is_file() or suffix not in _MODEL_FILES:
        return BundleError(
            f"{path}: is not a bundle (a folder with {MANIFEST})", "make one with attnseg export"
        )
    if (path.parent / MANIFEST).is_file():
        return BundleError(f"{path}: is a file of a bundle", f"give the bundle, {path.parent}")
    spec = " --spec model.json" if suffix == ".onnx" else ""
    return BundleError(
        f"{path}: is {_MODEL_FILES[suffix]}, not a bundle",
        f"make one with attnseg export {shown}{spec} -o {shlex.quote(path.stem)}",
    )


def default_folder() -> Path:
    """Folder of the shipped bundle."""
    return Path(__file__).parent / "default"


def _decode(file: Path, stored: bytes) -> Manifest:
    from attnseg.runtime.model.manifest_format import decode_manifest

    try:
        return decode_manifest(stored)
    except ConfigError as error:
        mend = error.mend or "export the model again"
        raise BundleError(f"{file}: {error.cause}", mend, *error.settings) from error


def file_entry(
    role: Role,
    content: bytes,
    precision: Precision | None = None,
    engine: EngineBuild | None = None,
) -> FileEntry:
    """Manifest entry for a file with this content."""
    return FileEntry(role, precision, engine, hashlib.sha256(content).hexdigest(), len(content))


def check_free(folder: Path, overwrite: bool = False) -> None:
    """Raise `BundleError` unless `folder` is absent, empty, or with `overwrite` a bundle."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder}: exists and is no bundle", "choose another folder")
    if not overwrite:
        raise BundleError(
            f"{folder}: holds a bundle already",
            "give {} or choose another folder",
            Setting("overwrite", True),
        )
    stored = read_bounded(folder / MANIFEST, _LARGEST_MANIFEST)
    manifest = _decode(folder / MANIFEST, stored)
    names = {file.name for file in folder.iterdir()} - {*manifest.files, MANIFEST, SIGNATURE}
    if names:
        raise BundleError(
            f"{folder}: holds {min(names)}, which is no file of its bundle",
            "choose another folder",
        )


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Convert errors of the file system to a `BundleError` that names the bundle."""
    try:
        yield
    except OSError as error:
        raise BundleError(f"{folder}: could not be written ({error.strerror})") from error


class BundleDraft:
    """A bundle under construction, in a temporary folder beside its destination.

    Each file is written once, when it is added. `bundle` returns the bundle of the files added so
    far, so that engines can open them before the bundle is complete.

    Attributes:
        folder: Temporary folder of the files.
        entries: Manifest entries of the files added so far, by file name.
    """

    def __init__(
        self, target: Path, folder: Path, manifest: Manifest, finish: Callable[[], None]
    ) -> None:
        """Create a draft.

        Args:
            target: Destination, for the texts of errors.
            folder: Empty temporary folder.
            manifest: Manifest of the bundle; its `files` are replaced by the added files.
            finish: Function that renames the temporary folder to its destination.
        """
        self._target, self.folder = target, folder
        self._manifest, self._finish = manifest, finish
        self.entries: dict[str, FileEntry] = {}

    def add(self, name: str, content: bytes, entry: FileEntry) -> None:
        """Write a file and record its manifest entry."""
        with _writing(self._target):
            (self.folder / name).write_bytes(content)
        self.entries[name] = entry

    def remove(self, name: str) -> None:
        """Delete an added file and its manifest entry."""
        del self.entries[name]
        (self.folder / name).unlink()

    @property
    def bundle(self) -> Bundle:
        """Bundle of the files added so far; its `sha256` is empty."""
        manifest = replace(self._manifest, files=dict(self.entries))
        return Bundle(self.folder, manifest, "")

    def commit(self, sign: Callable[[bytes], bytes] | None = None) -> None:
        """Write the manifest and, with `sign`, its signature, and rename the folder."""
        from attnseg.runtime.model.manifest_format import encode_manifest

        stored = encode_manifest(self.bundle.manifest)
        signature = sign(stored) if sign else None
        with _writing(self._target):
            (self.folder / MANIFEST).write_bytes(stored)
            if signature is not None:
                (self.folder / SIGNATURE).write_bytes(signature)
            self._finish()


@contextmanager
def draft_bundle(
    folder: Path, manifest: Manifest, overwrite: bool = False
) -> Iterator[BundleDraft]:
    """Context manager for a draft of the bundle `folder`; removed unless it is committed.

    Args:
        folder: Folder of the bundle.
        manifest: Manifest of the bundle; its `files` are replaced by the added files.
        overwrite: Whether the commit replaces a bundle that is there.

    Raises:
        BundleError: The folder is not free, or cannot be written.
    """
    check_free(folder, overwrite)
    folder = folder.resolve()
    with ExitStack() as stack:
        with _writing(folder):
            temporary, finish = stack.enter_context(new_folder(folder, overwrite))
        yield BundleDraft(folder, temporary, manifest, finish)
