"""Hostile scan folders: odd names, links, pipes, folders in place of files, files twice."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
from numpy.random import Generator

from attnseg.runtime.case.scans import find_scans
from attnseg.runtime.errors import AttnsegError
from attnseg.runtime.folder import segment_folder
from attnseg.runtime.results.report import output_names
from tests.hostile.drive import SilentlyWrongError, is_message, shown
from tests.hostile.model import open_tiny, scan, tiny_bundle
from tests.hostile.mutate import NAMES, change_bytes, pick
from tests.hostile.nifti import plain_image

_SUFFIXES = ("_t1", "_t1ce", "_t2", "_flair", "-t1n", "_T1", "t1", "_seg", "_dwi", "", "_t1_t1")
_ENDINGS = (".nii.gz", ".nii", ".NII.GZ", ".nii.gz.gz", ".img", ".dcm", ".nrrd", "", ".part")
_CHANNELS = ("_t1", "_t1ce", "_t2", "_flair")


class _Silent:
    """A listener that prints nothing."""

    def case_started(self, name: str) -> None:
        """See `attnseg.runtime.folder.Listener`."""

    def case_advanced(self, share: float) -> None:
        """See `attnseg.runtime.folder.Listener`."""


class Cases:
    """A scan folder, whose cases are segmented to another folder."""

    def __init__(self, seeds: Path) -> None:
        self.segmenter = open_tiny(tiny_bundle(seeds / "bundle"))
        self.task = self.segmenter.bundle.manifest.task
        volume = scan()
        self.images = [
            nib.Nifti1Image(channel, volume.affine).to_bytes() for channel in volume.channels
        ]

    def make(self, rng: Generator, folder: Path) -> None:
        """See `Reader.make`."""
        root = folder / "scan"
        root.mkdir()
        (folder / "out").mkdir()
        (folder / "private.txt").write_text("unchanged")
        folders = [root]
        for _ in range(int(rng.integers(0, 3))):
            folders.append(self._folder(rng, pick(rng, folders)))
        for _ in range(int(rng.integers(0, 3))):
            self._case(rng, pick(rng, folders))
        for _ in range(int(rng.integers(0, 5))):
            self._oddity(rng, pick(rng, folders))
        if rng.random() < 0.2:  # something in the place of a result
            name = pick(rng, tuple(output_names(pick(rng, ("case", "other", "scan"))).values()))
            self._make_odd(rng, folder / "out" / name)

    def _folder(self, rng: Generator, parent: Path) -> Path:
        name = pick(rng, ("HGG", "imagesTr", "labelsTr", "a.nii.gz", ".hidden", *NAMES))
        path = parent / _file_name(name)
        if not path.exists():
            path.mkdir()
        return path if path.is_dir() else parent

    def _case(self, rng: Generator, folder: Path) -> None:
        """Write the four channels of a case, most times all of them and readable."""
        longest = 255 - len(pick(rng, ("_flair.nii.gz", "_flair.nii")))
        prefix = _file_name(pick(rng, ("case", "case", "sub-01", *NAMES)), longest)
        for suffix, image in zip(_CHANNELS, self.images, strict=True):
            if rng.random() < 0.05:
                continue
            content = image
            if rng.random() < 0.1:
                content = pick(rng, (change_bytes(rng, image), plain_image(rng), self.images[0]))
            ending = ".nii" if len(os.fsencode(prefix)) > 240 else pick(rng, (".nii.gz", ".nii"))
            _write(folder / f"{prefix}{suffix}{ending}", content)

    def _oddity(self, rng: Generator, folder: Path) -> None:
        """Put something into a folder that does not belong there."""
        ending = pick(rng, _SUFFIXES) + pick(rng, _ENDINGS)
        prefix = _file_name(pick(rng, ("case", "other", *NAMES)), 255 - len(ending))
        self._make_odd(rng, folder / f"{prefix}{ending}")

    def _make_odd(self, rng: Generator, path: Path) -> None:
        folder = path.parent
        if path.exists() or path.is_symlink():
            return
        make: tuple[Callable[[], object], ...] = (
            lambda: os.mkfifo(path),
            path.mkdir,
            lambda: path.symlink_to(pick(rng, ("gone", "..", ".", path.name, "/dev/zero"))),
            lambda: path.symlink_to(next(iter(folder.iterdir()), folder)),
            lambda: _write(path, pick(rng, self.images)),
            lambda: _write(path, plain_image(rng)),
            lambda: _write(path, rng.bytes(400)),
            lambda: _write(path, pick(rng, (b"", b"{}", b"[1]", b'{"attnseg": 1}'))),
        )
        pick(rng, make)()

    def read(self, folder: Path) -> None:
        """See `Reader.read`."""
        before = _listing(folder)
        output = folder / "out"
        scans = find_scans(folder / "scan", {}, self.task.channels)
        for error in scans.problems.values():
            _check_line(shown(error))
        names = [*(case.name for case in scans.cases), *scans.problems]
        if len(set(names)) < len(names):
            raise SilentlyWrongError(f"names occur twice: {names}")
        results: set[Path] = set()
        ended = []
        for result in segment_folder(scans.cases, self.segmenter, output, _Silent()):
            ended.append(result.name)
            if result.error:
                _check_line(shown(result.error))
                if result.error.__cause__ and type(result.error) is AttnsegError:
                    raise result.error.__cause__  # an unforeseen exception
            else:
                results |= {Path("out", name) for name in output_names(result.name).values()}
        if sorted(ended) != sorted(case.name for case in scans.cases):
            raise SilentlyWrongError(f"of {scans.cases} these have a result: {ended}")
        after = _listing(folder)
        changed = {name for name in before if before[name] != after.get(name)}
        changed |= after.keys() - before.keys()
        if changed := changed - results:
            raise SilentlyWrongError(f"not only results were written: {sorted(changed)}")


def _check_line(line: str) -> None:
    if not is_message(line):
        raise SilentlyWrongError(f"an error that is no line of text: {line!r}")


def _file_name(text: str, longest: int = 255) -> str:
    """The text as a name that a file can have, of at most `longest` bytes."""
    plain = text.replace("/", "_").replace("\0", "_").replace("\ud800", "_")
    name = os.fsencode(plain)[:longest].decode("utf-8", "surrogateescape")
    return name if name not in ("", ".", "..") else "_"


def _write(file: Path, content: bytes) -> None:
    if not file.exists() and not file.is_symlink():
        file.write_bytes(content)


def _listing(folder: Path) -> dict[Path, object]:
    """Every file below a folder, with its content, or its kind if it is no regular file."""
    found: dict[Path, object] = {}
    for path in folder.rglob("*"):
        regular = path.is_file() and not path.is_symlink()
        found[path.relative_to(folder)] = path.read_bytes() if regular else path.lstat().st_mode
    return found
