"""Search of folders for cases.

A case is a set of files that share a folder and a name up to the channel's suffix, such as
`BraTS20_001_t1.nii.gz` and `BraTS20_001_flair.nii.gz`. A folder may hold one case or many, and
may be nested (`HGG/`, `LGG/`). The suffixes are defined by the model's bundle; those of the
default model cover BraTS 2018 to 2023. A file named by the suffix alone (`t1.nii.gz`) belongs to a
case named after its folder. Folders of labels beside folders of images (`labelsTr/` beside
`imagesTr/`) are not searched. Images that match no channel are reported, so that no patient is left
out silently.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path

from attnseg.runtime.errors import ChannelSetting, ConfigError, ScanError
from attnseg.runtime.task import BRATS_CHANNELS, Channel

_EXTENSIONS = (".nii.gz", ".nii")


LABEL_SUFFIXES = ("_seg", "-seg")


@dataclass(frozen=True)
class Case:
    """One scan: its name, its folder and one file per channel, in channel order.

    Raises:
        ScanError: The name is not UTF-8, as that of a file may be.
    """

    name: str
    folder: Path
    files: tuple[Path, ...]

    def __post_init__(self) -> None:
        if error := _name_error(self.name, self.folder):
            raise error


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
        below[:] = sorted(name for name in below if _is_searched(name, below))
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        yield Path(folder)


def _is_searched(name: str, siblings: Sequence[str]) -> bool:
    """Whether a folder may hold scans: not if it is hidden, an image's, or one of labels."""
    if name.startswith(".") or _stem(Path(name)):
        return False
    return not (name.startswith("labels") and f"images{name.removeprefix('labels')}" in siblings)


@dataclass(frozen=True)
class _Folder:
    """Content of one folder.

    Attributes:
        path: The folder.
        cases: Files found for each channel, by case name.
        unmatched: Images that match no channel and are no label files.
    """

    path: Path
    cases: dict[str, list[list[Path]]]
    unmatched: list[Path]


def _list_folder(folder: Path, channels: Sequence[Channel]) -> _Folder:
    listed = _Folder(folder, {}, [])
    for file in _nifti_files(folder):
        suffixes, prefix = _match(file, channels)
        if prefix is None:
            if not (_stem(file) or "").lower().endswith((*LABEL_SUFFIXES, "seg")):
                listed.unmatched.append(file)
            continue
        name = prefix or folder.resolve().name
        files = listed.cases.setdefault(name, [[] for _ in channels])
        for channel, matches in zip(channels, files, strict=True):
            if channel.suffixes == suffixes:
                matches.append(file)
    return listed


def _match(file: Path, channels: Sequence[Channel]) -> tuple[tuple[str, ...], str | None]:
    """Suffixes of the channels that a file belongs to, and its case name; see `_prefix`."""
    for suffixes in dict.fromkeys(channel.suffixes for channel in channels):
        prefix = _prefix(file, suffixes)
        if prefix is not None:
            return suffixes, prefix
    return (), None


def _as_text(name: str) -> str:
    """The name of a file as text: bytes that are not UTF-8 are written as Python escapes them."""
    return name.encode(errors="backslashreplace").decode()


def _name_error(name: str, folder: Path) -> ScanError | None:
    """Error for a name that tables and reports, which are UTF-8, cannot hold."""
    text = _as_text(name)
    if text == name:
        return None
    return ScanError(f"{folder}: the name of case {text} is not UTF-8", "rename its files")


def _case_error(
    name: str, listed: _Folder, files: list[list[Path]], channels: Sequence[Channel]
) -> ScanError | None:
    folder = listed.path
    if error := _name_error(name, folder):
        return error
    missing = [c for c, f in zip(channels, files, strict=True) if not f]
    if missing:
        names = ", ".join(f"{c.name} (*{' or *'.join(c.suffixes[:2])})" for c in missing)
        unpacked = [f.name for f in sorted(folder.iterdir()) if _stem(f) and f.is_dir()]
        others = [f.name for f in listed.unmatched if f.name.startswith(name)]
        cause = f"{folder}: case {name} has no file for {names}"
        if unpacked:
            return ScanError(cause, f"move the image out of the folder {unpacked[0]}")
        if others:
            given, settings = _give_files(channels)
            mend = f"rename the file, perhaps {' or '.join(others[:3])}, or {given}"
            return ScanError(cause, mend, *settings)
        return ScanError(cause, "add it")
    for channel, matches in zip(channels, files, strict=True):
        if len(matches) > 1:
            names = ", ".join(f.name for f in matches)
            return ScanError(
                f"{folder}: case {name} has several files for {channel.name} ({names})", "keep one"
            )
    return None


_NO_SCAN = re.compile(r"(^|[^a-z])(brain)?(mask|label|atlas|template|mni)", re.IGNORECASE)
"""Names of images that are no scans of a patient: masks, labels, atlases and templates."""


def _unmatched_error(folder: _Folder, channels: Sequence[Channel]) -> ScanError | None:
    """Error for images that belong to no channel and no case of their folder."""
    own = tuple(f"{name}{separator}" for name in folder.cases for separator in "_-.")
    files = [
        file
        for file in folder.unmatched
        if not file.name.startswith(own) and not _NO_SCAN.search(file.name)
    ]
    own_name = folder.path.resolve().name in folder.cases  # its files need not have its name
    if not files or (own_name and len(files) < len(channels)):
        return None
    given, settings = _give_files(channels)
    what = f"{len(files)} images, such as {files[0].name}, match"
    if len(files) == 1:
        what = f"the image {files[0].name} matches"
    return ScanError(
        f"{folder.path}: {what} no channel of the model",
        f"name them {_expected(channels)}, or {given}",
        *settings,
    )


def _give_files(channels: Sequence[Channel]) -> tuple[str, list[ChannelSetting]]:
    """End of a mend that asks for one file per channel, and its settings."""
    settings = [ChannelSetting(channel.name, "FILE") for channel in channels]
    return f"give {' '.join('{}' for _ in settings)}", settings


def _expected(channels: Sequence[Channel]) -> str:
    return ", ".join(dict.fromkeys(f"*{c.suffixes[0]}.nii.gz" for c in channels))


def find_cases(root: Path, channels: Sequence[Channel] = BRATS_CHANNELS) -> Scans:
    """Find the cases in a folder and its subfolders, sorted by path.

    Incomplete cases, duplicate case names and images that match no channel are returned as
    problems.

    Raises:
        ScanError: `root` does not exist, is not a readable folder, or holds no image.
    """
    if not root.exists():
        raise ScanError(f"{root}: does not exist")
    if not root.is_dir():
        raise ScanError(f"{root}: is not a folder", "give the folder that holds the case's files")
    cases: dict[str, Case] = {}
    problems: dict[str, ScanError] = {}
    of_one_case: set[Path] = set()
    for folder in _walk(root, problems):
        try:
            listed = _list_folder(folder, channels)
        except OSError as unreadable:
            problems[str(folder)] = _unreadable(unreadable)
            continue
        _add_cases(listed, channels, cases, problems)
        if not of_one_case.intersection(folder.parents):  # it does not hold more files of a case
            error = _unmatched_error(listed, channels) or _other_format_error(folder)
            if error:
                problems[_free_name(folder, cases, problems)] = error
        if len(listed.cases) == 1:
            of_one_case.add(folder)
    if not cases and not problems:
        raise ScanError(f"{root}: holds no case", f"expected files such as {_expected(channels)}")
    return Scans(tuple(cases.values()), problems)


def _add_cases(
    listed: _Folder,
    channels: Sequence[Channel],
    cases: dict[str, Case],
    problems: dict[str, ScanError],
) -> None:
    """Add the cases of a folder to `cases`, and those that cannot be used to `problems`."""
    folder = listed.path
    for stored_name, files in sorted(listed.cases.items()):
        error = _case_error(stored_name, listed, files, channels)
        name = _as_text(stored_name)
        if name in cases or name in problems:
            other = cases[name].folder if name in cases else "an unusable case"
            cause = f"{folder}: case {name} has the same name as that of {other}"
            name, error = f"{name} ({folder})", ScanError(cause, "rename one")
        if error:
            problems[name] = error
        else:
            cases[name] = Case(name, folder, tuple(f[0] for f in files))


def _free_name(folder: Path, *taken: Mapping[str, object]) -> str:
    """Name of a folder, with its path if a case has the name."""
    name = folder.resolve().name
    return f"{name} ({folder})" if any(name in names for names in taken) else name


_OTHER_IMAGES = {
    ".dcm": ("DICOM files", "convert each series with dcm2niix"),
    ".ima": ("DICOM files", "convert each series with dcm2niix"),
    ".img": ("pairs of .hdr and .img", "convert them to .nii.gz"),
    ".nrrd": ("NRRD images", "convert them to .nii.gz"),
    ".mha": ("MetaImage files", "convert them to .nii.gz"),
    ".mgz": ("FreeSurfer images", "convert them to .nii.gz"),
}
"""Kind and mend of images in other formats, by file extension."""
_LOOKED_AT = 50  # files of a folder


def _other_format_error(folder: Path) -> ScanError | None:
    """Error for a folder without NIfTI files that holds images of another format."""
    files = [f for f in islice(sorted(folder.iterdir()), _LOOKED_AT) if f.is_file()]
    if any(_stem(file) for file in files):
        return None
    found = {".dcm" if _is_dicom(file) else file.suffix.lower() for file in files}
    for extension, (kind, mend) in _OTHER_IMAGES.items():
        if extension in found:
            return ScanError(f"{folder}: holds no case, but {kind}", mend)
    return None


def _is_dicom(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _single_file(file: Path, channels: Sequence[Channel]) -> Case:
    """Case of one file, which is the only channel or holds all of them as its volumes.

    Raises:
        ScanError: The file is no NIfTI file, or the model takes several files.
    """
    if _stem(file) is None:
        raise ScanError(f"{file}: is neither a folder nor a .nii or .nii.gz file")
    if len({channel.suffixes for channel in channels}) > 1:
        given, settings = _give_files(channels)
        raise ScanError(
            f"{file}: is one file, the model takes {', '.join(c.name for c in channels)}",
            f"give the folder of the case, or {given}",
            *settings,
        )
    return explicit_case({channel.name: file for channel in channels}, channels)


def find_siblings(cases: Collection[Case], suffixes: Sequence[str]) -> dict[str, list[Path]]:
    """Find the files of each case with one of `suffixes`, such as its label files.

    Each folder is listed once, however many cases it holds.

    Returns:
        Files by name of the case, sorted; an empty list for a case without such a file.

    Raises:
        OSError: A folder cannot be listed.
    """
    listed = {folder: _siblings_in(folder, suffixes) for folder in {c.folder for c in cases}}
    return {case.name: listed[case.folder].get(case.name, []) for case in cases}


def _siblings_in(folder: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    """Files in `folder` with one of `suffixes`, by name of their case."""
    found: dict[str, list[Path]] = {}
    for file in _nifti_files(folder):
        prefix = _prefix(file, suffixes)
        if prefix is not None:
            found.setdefault(prefix or folder.resolve().name, []).append(file)
    return found


def explicit_case(files: Mapping[str, Path], channels: Sequence[Channel]) -> Case:
    """Create a case from one file per channel, by channel name.

    Raises:
        ConfigError: A channel has no file or that of another, or a name is no channel of the model.
        ScanError: The name of the case is not UTF-8.
    """
    names = [c.name for c in channels]
    unknown = [n for n in files if n not in names]
    if unknown:
        raise ConfigError(f"the model has no channel {unknown[0]}", f"it takes {', '.join(names)}")
    missing = [n for n in names if n not in files]
    if missing:
        raise ConfigError(
            f"no file given for {', '.join(missing)}",
            "give one for each channel of the model",
        )
    _refuse_same_file(files, channels)
    first = files[names[0]]
    prefix = _prefix(first, channels[0].suffixes)
    name = first.parent.resolve().name if prefix == "" else prefix or _stem(first) or first.name
    return Case(name, first.parent, tuple(files[n] for n in names))


def _refuse_same_file(files: Mapping[str, Path], channels: Sequence[Channel]) -> None:
    """Raise `ConfigError` if channels of different files have the same one."""
    for first, second in combinations(channels, 2):
        if files[first.name] == files[second.name] and first.suffixes != second.suffixes:
            raise ConfigError(
                f"{files[first.name]}: was given for {first.name} and for {second.name}",
                "give one file for each",
            )


def find_scans(root: Path | None, files: Mapping[str, Path], channels: Sequence[Channel]) -> Scans:
    """Find the cases of a folder, or create one case from one file or from a file per channel.

    Raises:
        ConfigError: Both or neither are given; see also `explicit_case`.
        ScanError: See `find_cases`.
    """
    if (root is None) == (not files):
        given = "no scan was given" if root is None else "a scan folder and files were given"
        raise ConfigError(given, "give a scan folder or one file per channel")
    if root is None:
        return Scans((explicit_case(files, channels),), {})
    if root.is_file():
        return Scans((_single_file(root, channels),), {})
    return find_cases(root, channels)
