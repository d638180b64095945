"""Search of folders for cases.

A case is a set of files that share a folder and a name up to the channel's suffix, such as
`BraTS20_001_t1.nii.gz` and `BraTS20_001_flair.nii.gz`. A folder may hold one case or many, and
may be nested (`HGG/`, `LGG/`). The suffixes are defined by the model's bundle; those of the
default model cover BraTS 2018 to 2023. A file named by the suffix alone (`t1.nii.gz`) belongs to a
case named after its folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from attnseg.runtime.errors import ScanError
from attnseg.runtime.task import BRATS_CHANNELS, Channel

_EXTENSIONS = (".nii.gz", ".nii")


LABEL_SUFFIXES = ("_seg", "-seg")


@dataclass(frozen=True)
class Case:
    """One scan: its name, its folder and one file per channel, in channel order."""

    name: str
    folder: Path
    files: tuple[Path, ...]

    def sibling(self, suffixes: Sequence[str]) -> Path | None:
        """File of this case with one of `suffixes`, such as its label file; None if missing."""
        for file in _nifti_files(self.folder):
            prefix = _prefix(file, suffixes)
            if prefix is not None and (prefix or self.folder.resolve().name) == self.name:
                return file
        return None


@dataclass(frozen=True)
class Scans:
    """Complete cases of a folder, and errors of unusable cases and folders, by name."""

    cases: tuple[Case, ...]
    problems: Mapping[str, ScanError]


def _stem(file: Path) -> str | None:
    for extension in _EXTENSIONS:
        if file.name.lower().endswith(extension):
            return file.name[: -len(extension)]
    return None


def _prefix(file: Path, suffixes: Sequence[str]) -> str | None:
    """Case name of a file: empty if named by the suffix alone, None if no suffix matches."""
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
    return ScanError(
        f"{error.filename}: cannot be read ({error.strerror})", "check its permissions"
    )


def _walk(root: Path, problems: dict[str, ScanError]) -> Iterator[Path]:
    """Walk `root` and its subfolders in name order, each real folder once."""
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
    """Names of the cases in one folder, and the files found for each channel."""
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
        return ScanError(f"{folder}: case {name} has no file for {names}", "add it")
    for channel, matches in zip(channels, files, strict=True):
        if len(matches) > 1:
            names = ", ".join(f.name for f in matches)
            return ScanError(
                f"{folder}: case {name} has several files for {channel.name} ({names})", "keep one"
            )
    return None


def find_cases(root: Path, channels: Sequence[Channel] = BRATS_CHANNELS) -> Scans:
    """Find the cases in a folder and its subfolders, sorted by path.

    Incomplete cases and duplicate case names are returned as problems.

    Raises:
        ScanError: `root` does not exist, is not a readable folder, or holds no case.
    """
    if not root.exists():
        raise ScanError(f"{root}: does not exist")
    if not root.is_dir():
        raise ScanError(f"{root}: is not a folder", "give the folder that holds the case's files")
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
                        f"{folder}: case {name} has the same name as that of {other}", "rename one"
                    ),
                )
            if error:
                problems[name] = error
            else:
                cases[name] = Case(name, folder, tuple(f[0] for f in files))
    if not cases and not problems:
        names = ", ".join(dict.fromkeys(f"*{c.suffixes[0]}.nii.gz" for c in channels))
        raise ScanError(f"{root}: holds no case", f"expected files such as {names}")
    return Scans(tuple(cases.values()), problems)


def explicit_case(files: Mapping[str, Path], channels: Sequence[Channel]) -> Case:
    """Create a case from one file per channel, by channel name.

    Raises:
        ScanError: A channel has no file, or a name is not a channel of the model.
    """
    names = [c.name for c in channels]
    unknown = [n for n in files if n not in names]
    if unknown:
        raise ScanError(f"the model has no channel {unknown[0]}", f"it takes {', '.join(names)}")
    missing = [n for n in names if n not in files]
    if missing:
        raise ScanError(
            f"no file given for {', '.join(missing)}",
            "give one for each channel of the model",
        )
    first = files[names[0]]
    prefix = _prefix(first, channels[0].suffixes)
    name = first.parent.resolve().name if prefix == "" else prefix or _stem(first) or first.name
    return Case(name, first.parent, tuple(files[n] for n in names))


def find_scans(root: Path | None, files: Mapping[str, Path], channels: Sequence[Channel]) -> Scans:
    """Find the cases of a folder, or create one case from a file per channel.

    Raises:
        ScanError: Both or neither are given; see also `find_cases` and `explicit_case`.
    """
    if (root is None) == (not files):
        given = "no scan was given" if root is None else "a scan folder and files were given"
        raise ScanError(given, "give a scan folder or one file per channel")
    if root is None:
        return Scans((explicit_case(files, channels),), {})
    return find_cases(root, channels)
