"""Scan folders to cases.

A case is a set of files that share a folder and a name up to the channel's suffix, such as
`BraTS20_001_t1.nii.gz` and `BraTS20_001_flair.nii.gz`. Folders may be nested (`HGG/`, `LGG/`),
or be one case, or hold many. The suffixes come from the model's bundle, so another model reads
another layout; those of the default model cover BraTS 2018 to 2023. A file named by the
suffix alone (`t1.nii.gz`) belongs to a case named after its folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from attnseg.runtime.errors import ScanError

_EXTENSIONS = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Channel:
    """One input of the model: its name, and the suffixes its files are known by.

    Channels with the same suffixes are the volumes of one 4-D file, in order. The empty suffix
    stands for every file that is not a label file.
    """

    name: str
    suffixes: tuple[str, ...]


BRATS_CHANNELS = (
    Channel("t1", ("_t1", "-t1n", "_t1n", "-t1")),
    Channel("t1ce", ("_t1ce", "-t1c", "_t1c", "-t1ce", "_t1gd")),
    Channel("t2", ("_t2", "-t2w", "_t2w", "-t2")),
    Channel("flair", ("_flair", "-t2f", "_t2f", "-flair")),
)
LABEL_SUFFIXES = ("_seg", "-seg")


@dataclass(frozen=True)
class Case:
    """One scan: its name, its folder and one file per channel, in channel order."""

    name: str
    folder: Path
    files: tuple[Path, ...]

    def sibling(self, suffixes: Sequence[str]) -> Path | None:
        """The file of this case with one of `suffixes`, such as its label file, or None."""
        for file in _nifti_files(self.folder):
            prefix = _prefix(file, suffixes)
            if prefix is not None and (prefix or self.folder.resolve().name) == self.name:
                return file
        return None


@dataclass(frozen=True)
class Scans:
    """What a folder holds: complete cases, and an error for each case that is not usable."""

    cases: tuple[Case, ...]
    problems: Mapping[str, ScanError]


def _stem(file: Path) -> str | None:
    for extension in _EXTENSIONS:
        if file.name.lower().endswith(extension):
            return file.name[: -len(extension)]
    return None


def _prefix(file: Path, suffixes: Sequence[str]) -> str | None:
    """Case name in a file's name: empty for a file named by the suffix alone, None if no match."""
    stem = _stem(file)
    if stem is None:
        return None
    for suffix in suffixes:
        if not suffix:
            return None if stem.lower().endswith(LABEL_SUFFIXES) else stem
        if stem.lower() == suffix.lstrip("_-"):
            return ""
        if stem.lower().endswith(suffix) and len(stem) > len(suffix):
            return stem[: -len(suffix)]
    return None


def _nifti_files(folder: Path) -> list[Path]:
    files = (f for f in folder.iterdir() if not f.name.startswith(".") and _stem(f))
    return sorted(f for f in files if f.is_file())


def _unreadable(error: OSError) -> ScanError:
    return ScanError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions")


def _walk(root: Path, problems: dict[str, ScanError]) -> Iterator[Path]:
    """Folders below `root`, itself first, in name order; each real folder once."""
    seen: set[str] = set()

    def note(error: OSError) -> None:
        problem = _unreadable(error)
        if Path(error.filename) == root:
            raise problem from error
        problems[str(error.filename)] = problem

    for folder, below, _ in os.walk(root, followlinks=True, onerror=note):
        below[:] = sorted(b for b in below if not b.startswith("."))
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        yield Path(folder)


def _collect(folder: Path, channels: Sequence[Channel]) -> Iterator[tuple[str, list[list[Path]]]]:
    """Cases of one folder, each with the files found for every channel."""
    found: dict[str, list[list[Path]]] = {}
    for file in _nifti_files(folder):
        for suffixes in dict.fromkeys(channel.suffixes for channel in channels):
            prefix = _prefix(file, suffixes)
            if prefix is not None:
                files = found.setdefault(prefix or folder.resolve().name, [[] for _ in channels])
                for channel, matches in zip(channels, files, strict=True):
                    if channel.suffixes == suffixes:
                        matches.append(file)
                break
    yield from sorted(found.items())


def _case_error(
    name: str, folder: Path, files: list[list[Path]], channels: Sequence[Channel]
) -> ScanError | None:
    missing = [c for c, f in zip(channels, files, strict=True) if not f]
    if missing:
        names = ", ".join(f"{c.name} (*{' or *'.join(c.suffixes[:2])})" for c in missing)
        return ScanError(f"{folder}: case {name} has no file for {names}; add it")
    for channel, matches in zip(channels, files, strict=True):
        if len(matches) > 1:
            names = ", ".join(f.name for f in matches)
            return ScanError(
                f"{folder}: case {name} has several files for {channel.name} ({names}); keep one"
            )
    return None


def find_cases(root: Path, channels: Sequence[Channel] = BRATS_CHANNELS) -> Scans:
    """Find the cases in a folder and below it, sorted by path.

    Incomplete cases, and cases whose name was already taken, are returned as problems.

    Raises:
        ScanError: `root` does not exist, cannot be read, or holds no case at all.
    """
    if not root.exists():
        raise ScanError(f"{root}: does not exist")
    if not root.is_dir():
        raise ScanError(f"{root}: is not a folder; give the folder that holds the case's files")
    cases: dict[str, Case] = {}
    problems: dict[str, ScanError] = {}
    for folder in _walk(root, problems):
        try:
            found = list(_collect(folder, channels))
        except OSError as unreadable:
            problems[str(folder)] = _unreadable(unreadable)
            continue
        for name, files in found:
            error = _case_error(name, folder, files, channels)
            if name in cases or name in problems:
                other = cases[name].folder if name in cases else "an unusable case"
                name, error = (
                    f"{name} ({folder})",
                    ScanError(
                        f"{folder}: case {name} has the same name as that of {other}; rename one"
                    ),
                )
            if error:
                problems[name] = error
            else:
                cases[name] = Case(name, folder, tuple(f[0] for f in files))
    if not cases and not problems:
        names = ", ".join(dict.fromkeys(f"*{c.suffixes[0]}.nii.gz" for c in channels))
        raise ScanError(f"{root}: holds no case; expected files such as {names}")
    return Scans(tuple(cases.values()), problems)


def explicit_case(files: Mapping[str, Path], channels: Sequence[Channel]) -> Case:
    """A case from one named file per channel.

    Raises:
        ScanError: a channel has no file, or a name is not a channel of the model.
    """
    names = [c.name for c in channels]
    unknown = [n for n in files if n not in names]
    if unknown:
        raise ScanError(f"the model has no channel {unknown[0]}; it takes {', '.join(names)}")
    missing = [n for n in names if n not in files]
    if missing:
        raise ScanError(f"no file given for {', '.join(missing)}; add --channel {missing[0]}=FILE")
    first = files[names[0]]
    prefix = _prefix(first, channels[0].suffixes)
    name = first.parent.resolve().name if prefix == "" else prefix or _stem(first) or first.name
    return Case(name, first.parent, tuple(files[n] for n in names))


def find_scans(root: Path | None, files: Mapping[str, Path], channels: Sequence[Channel]) -> Scans:
    """The cases of a folder, or the one case of files given by channel.

    Raises:
        ScanError: both or neither were given, or see `find_cases` and `explicit_case`.
    """
    if (root is None) == (not files):
        raise ScanError("give either a scan folder or one file per channel (--t1 FILE ...)")
    if root is None:
        return Scans((explicit_case(files, channels),), {})
    return find_cases(root, channels)
