"""Labelled cases to training patches.

Each case is normalised once by the runtime's own code, cropped to the brain box and kept as
a float16 array on disk, read through a memory map: 27 MB a case, whatever the machine's memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnseg.runtime.errors import ConfigError, ScanError, TrainingError
from attnseg.runtime.normalise import (
    DECILES,
    Landmarks,
    Normalisation,
    brain_box,
    normalise,
    z_score_percentiles,
)
from attnseg.runtime.scans import LABEL_SUFFIXES, Case, find_cases
from attnseg.runtime.volume import Volume, read_labels, read_volume
from attnseg.synthetic import make_case, write_case
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.task import BRATS, Task


@dataclass(frozen=True)
class LabelledCase:
    """A case and the file of its expert labels."""

    case: Case
    label: Path

    @property
    def name(self) -> str:
        """Name of the case."""
        return self.case.name


@dataclass(frozen=True)
class TrainingCase:
    """A normalised case: image `(C, X, Y, Z)` float16 and classes `(X, Y, Z)` uint8."""

    name: str
    image: NDArray[np.float16]
    classes: NDArray[np.uint8]


@dataclass(frozen=True)
class DataSet:
    """Labelled cases and which of them are for what.

    Attributes:
        name: as manifests give it.
        cases: by name.
        split: case names of `train` and `validation`.
    """

    name: str
    cases: Mapping[str, LabelledCase]
    split: dict[str, list[str]]

    def part(self, name: str) -> list[LabelledCase]:
        """The cases of `train` or `validation`.

        Raises:
            TrainingError: the split names a case that is not there.
        """
        missing = [n for n in self.split[name] if n not in self.cases]
        if missing:
            raise TrainingError(f"{self.name}: has no case {missing[0]}, which the split names")
        return [self.cases[n] for n in self.split[name]]

    def with_split(self, split: dict[str, list[str]]) -> DataSet:
        """The same cases, split otherwise."""
        return replace(self, split=split)


@dataclass(frozen=True)
class LabelledScans:
    """What a folder of labelled cases holds.

    Attributes:
        cases: usable ones by name.
        faults: what is wrong with each of the others.
    """

    cases: Mapping[str, LabelledCase]
    faults: Mapping[str, str]

    def refuse_faults(self, names: Iterable[str] | None = None) -> None:
        """Raise `TrainingError` for unusable cases, of all or of `names`."""
        wanted = self.faults if names is None else set(names)
        found = [fault for name, fault in self.faults.items() if name in wanted]
        if found:
            more = f" (and {len(found) - 1} more cases)" if len(found) > 1 else ""
            raise TrainingError(f"{found[0]}{more}")


def find_labelled_cases(root: Path) -> LabelledScans:
    """All cases below `root`, each with its label file.

    Raises:
        ScanError: no case was found.
    """
    scans = find_cases(root, BRATS.channels)
    faults = {name: str(problem) for name, problem in scans.problems.items()}
    labelled = {}
    for case in scans.cases:
        label = case.sibling(LABEL_SUFFIXES)
        if label is None:
            faults[case.name] = (
                f"{case.folder}: case {case.name} has no label file (*_seg.nii.gz); add it or "
                "leave the case out with --split"
            )
        else:
            labelled[case.name] = LabelledCase(case, label)
    return LabelledScans(labelled, faults)


def split_cases(names: Iterable[str], validation_share: float, seed: int) -> dict[str, list[str]]:
    """Split case names into `train` and `validation`, at least one each, the same for a seed.

    Raises:
        TrainingError: fewer than two cases.
    """
    ordered = sorted(names)
    order = [ordered[i] for i in np.random.default_rng(seed).permutation(len(ordered))]
    if len(order) < 2:
        raise TrainingError(f"training needs at least 2 cases to split, found {len(order)}")
    held_out = min(len(order) - 1, max(1, round(len(order) * validation_share)))
    return {"train": sorted(order[held_out:]), "validation": sorted(order[:held_out])}


def read_split(path: Path) -> dict[str, list[str]]:
    """Read a split file: JSON with the lists `train` and `validation` of case names.

    Raises:
        TrainingError: the file is not such a split, a list is empty, or a name is in both.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        split = {part: [str(n) for n in stored[part]] for part in ("train", "validation")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{path}: is not a split file; expected JSON with lists train and validation"
        ) from error
    for part, listed in split.items():
        if not listed:
            raise TrainingError(f"{path}: its {part} list is empty; name at least one case")
    if both := sorted(set(split["train"]) & set(split["validation"])):
        raise TrainingError(f"{path}: names {both[0]} in train and in validation; keep one")
    return split


def open_data_set(root: Path, split: dict[str, list[str]] | None, config: TrainConfig) -> DataSet:
    """All labelled cases below `root`, with the `split` given or else one by the config's seed.

    One case counts as one subject, as in BraTS; name the subjects' cases in a split file
    where there are several.

    Raises:
        ScanError: no case was found.
        TrainingError: a case is not usable, or the split is not.
    """
    scans = find_labelled_cases(root)
    if split:
        scans.refuse_faults(name for names in split.values() for name in names)
    else:
        scans.refuse_faults()
        split = split_cases(scans.cases, config.validation_share, config.seed)
    data = DataSet(root.resolve().name, scans.cases, split)
    for part in split:
        data.part(part)
    return data


def read_classes(path: Path, scan: Path, task: Task = BRATS) -> Volume:
    """Read expert labels as a volume of class indices, uint8.

    Args:
        path: the label file.
        scan: a file of the case, whose grid the labels must share.
        task: which values are labels.

    Raises:
        VolumeError: the file cannot be read or lies on another grid.
        TrainingError: a value is not a label.
    """
    volume = read_labels(path, scan)
    labels = volume.channels[0]
    values = set(np.unique(labels).tolist())
    classes = task.class_of_label
    doubled = [a for a, value in task.aliases.items() if {a, value} <= values]
    if not values <= set(classes) or doubled:
        either = "".join(f" ({a} in place of {v}, not both)" for a, v in task.aliases.items())
        raise TrainingError(
            f"{path}: holds labels {sorted(values)}; expected {sorted(classes)}{either}"
        )
    table = np.zeros(max(classes) + 1, np.uint8)
    table[list(classes)] = list(classes.values())
    return replace(volume, channels=[table[labels.astype(np.intp)]])


def learn_landmarks(cases: Sequence[LabelledCase]) -> Landmarks:
    """Mean percentiles of the z-scores over `cases`, per channel.

    Raises:
        TrainingError: a case cannot be read, or the images have too few grey values.
    """
    rows = []
    for labelled in cases:
        with _naming(labelled):
            volume = read_volume(labelled.case.files)
            rows.append([z_score_percentiles(c, "nonzero") for c in volume.channels])
    mean = np.mean(rows, axis=0)
    values = tuple(tuple(round(float(v), 6) for v in row) for row in mean)
    try:
        return Landmarks(DECILES, values)
    except ConfigError as error:
        raise TrainingError(
            "the images have too few grey values for histogram matching; train with "
            "--set histogram_matching=false"
        ) from error


@contextmanager
def _naming(labelled: LabelledCase) -> Iterator[None]:
    """Turn what goes wrong with a case into an error that names it."""
    try:
        yield
    except ScanError as error:
        raise TrainingError(f"case {labelled.name}: {error}") from error


def _prepare(labelled: LabelledCase, normalisation: Normalisation) -> TrainingCase:
    with _naming(labelled):
        classes = read_classes(labelled.label, labelled.case.files[0])
        volume = read_volume(labelled.case.files).oriented(BRATS.orientation)
        box = brain_box(volume.channels, normalisation.foreground)
        image = normalise([c[box] for c in volume.channels], normalisation)
    crop = np.ascontiguousarray(classes.oriented(BRATS.orientation).channels[0][box])
    return TrainingCase(labelled.name, image.astype(np.float16), crop)


def _cache_key(labelled: LabelledCase, normalisation: Normalisation) -> str:
    """Changes with the normalisation and with every file of the case."""
    files = (*labelled.case.files, labelled.label)
    stamps = [(str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files]
    return hashlib.sha256(f"{stamps}{normalisation}".encode()).hexdigest()[:12]


def _save_array(file: Path, array: NDArray[Any]) -> None:
    partial = file.with_suffix(".part")
    with partial.open("wb") as stream:
        np.save(stream, array)
    os.replace(partial, file)


def cached_case(labelled: LabelledCase, normalisation: Normalisation, cache: Path) -> TrainingCase:
    """The prepared case, from `cache` where it is there for the same files and normalisation.

    Raises:
        TrainingError: the case cannot be used, or the cache cannot be written.
    """
    stem = f"{labelled.name}-{_cache_key(labelled, normalisation)}"
    files = (cache / f"{stem}-image.npy", cache / f"{stem}-classes.npy")
    if not all(file.exists() for file in files):
        prepared = _prepare(labelled, normalisation)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            _save_array(files[0], prepared.image)
            _save_array(files[1], prepared.classes)
        except OSError as error:
            raise TrainingError(
                f"{cache}: cannot be written to ({error.strerror or error}); free some space"
            ) from error
    image, classes = (np.load(file, mmap_mode="r") for file in files)
    return TrainingCase(labelled.name, image, classes)


def synthetic_cases(count: int, first_seed: int, folder: Path) -> list[LabelledCase]:
    """Write `count` phantoms below `folder`, those that are not there yet, and list them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {f"synthetic-{seed}": seed for seed in range(first_seed, first_seed + count)}
    for name, seed in names.items():
        if not (folder / name).exists():
            with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
                os.replace(write_case(make_case(seed), Path(scratch), name), folder / name)
    found = find_labelled_cases(folder).cases if count else {}
    return [found[name] for name in names]


def _cut(array: NDArray[Any], start: NDArray[np.int64], size: int) -> NDArray[Any]:
    """Cube of `size` voxels at `start` of the last three axes; zeros beyond the array."""
    out = np.zeros((*array.shape[:-3], size, size, size), array.dtype)
    source: list[Any] = [...]
    target: list[Any] = [...]
    for first, length in zip(start.tolist(), array.shape[-3:], strict=True):
        low, high = max(first, 0), min(first + size, length)
        source.append(slice(low, high))
        target.append(slice(low - first, high - first))
    out[tuple(target)] = array[tuple(source)]
    return out


class PatchSampler:
    """Draws patches from the training cases; the same seed draws the same patches."""

    def __init__(
        self, cases: Sequence[TrainingCase], size: int, tumour_share: float, classes: int = 4
    ) -> None:
        self._cases = cases
        self._size = size
        self._tumour_share = tumour_share
        self._voxels = [
            [
                np.flatnonzero(np.asarray(case.classes) == k).astype(np.int32)
                for k in range(1, classes)
            ]
            for case in cases
        ]

    def _centre(self, index: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """A tumour voxel of a random class, or with the other share any voxel of the box."""
        shape = self._cases[index].classes.shape
        present = [voxels for voxels in self._voxels[index] if len(voxels)]
        if present and rng.random() < self._tumour_share:
            voxels = present[rng.integers(len(present))]
            return np.array(np.unravel_index(int(rng.choice(voxels)), shape))
        return rng.integers(0, shape)

    def draw(self, rng: np.random.Generator) -> tuple[str, Tensor, Tensor]:
        """One patch: case name, image `(C, S, S, S)` float32, classes `(S, S, S)` int64.

        Patches that would leave the box are moved inside where it is large enough.
        """
        index = int(rng.integers(len(self._cases)))
        case = self._cases[index]
        room = np.array(case.classes.shape) - self._size
        start = self._centre(index, rng) - self._size // 2
        start = np.where(room >= 0, np.clip(start, 0, np.maximum(room, 0)), room // 2)
        image = torch.from_numpy(_cut(case.image, start, self._size).astype(np.float32))
        classes = torch.from_numpy(_cut(case.classes, start, self._size).astype(np.int64))
        return case.name, image, classes
