"""Labelled cases to training patches.

Each case is normalised once by the runtime's own code, cropped to the brain box and kept as
a float16 array on disk, read through a memory map: 27 MB a case, whatever the machine's memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnseg.runtime.errors import TrainingError
from attnseg.runtime.normalise import (
    DECILES,
    Landmarks,
    Normalisation,
    brain_box,
    normalise,
    z_score_percentiles,
)
from attnseg.runtime.scans import BRATS_CHANNELS, LABEL_SUFFIXES, Case, find_cases
from attnseg.runtime.volume import Volume, read_volume
from attnseg.synthetic import make_case, write_case
from attnseg.trainer.config import TrainConfig

ORIENTATION = "LPS"
# BraTS wrote enhancing tumour as 4 until 2022 and as 3 since.
CLASS_OF_LABEL = {0: 0, 1: 1, 2: 2, 3: 3, 4: 3}


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


def find_labelled_cases(root: Path) -> dict[str, LabelledCase]:
    """All cases below `root` by name, each with its labels.

    Raises:
        ScanError: no case was found.
        TrainingError: a case is incomplete or has no label file; all are named.
    """
    scans = find_cases(root, BRATS_CHANNELS)
    faults = [str(p) for p in scans.problems.values()]
    labelled = {}
    for case in scans.cases:
        label = case.sibling(LABEL_SUFFIXES)
        if label is None:
            faults.append(
                f"{case.folder}: case {case.name} has no label file (*_seg.nii.gz); add it"
            )
        else:
            labelled[case.name] = LabelledCase(case, label)
    if faults:
        raise TrainingError("; ".join(faults))
    return labelled


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


def open_data_set(root: Path, split_file: Path | None, config: TrainConfig) -> DataSet:
    """All labelled cases below `root`, split by `split_file` or else by the config's seed.

    One case counts as one subject, as in BraTS; name the subjects' cases in a split file
    where there are several.

    Raises:
        ScanError: no case was found.
        TrainingError: a case is not usable, or the split is not.
    """
    cases = find_labelled_cases(root)
    if split_file:
        split = read_split(split_file)
    else:
        split = split_cases(cases, config.validation_share, config.seed)
    data = DataSet(root.resolve().name, cases, split)
    for part in split:
        data.part(part)
    return data


def read_classes(path: Path, like: Volume) -> NDArray[np.uint8]:
    """Read expert labels as class indices `(X, Y, Z)`, in the orientation of the file.

    Raises:
        TrainingError: the labels' shape differs from the image's, or a value is not a label.
    """
    labels = read_volume([path]).channels[0]
    if labels.shape != like.shape:
        raise TrainingError(f"{path}: shape {labels.shape} differs from the image's {like.shape}")
    values = set(np.unique(labels).tolist())
    if not values <= set(CLASS_OF_LABEL) or {3, 4} <= values:
        raise TrainingError(
            f"{path}: holds labels {sorted(values)}; expected 0, 1, 2 and either 4 or 3"
        )
    table = np.array([CLASS_OF_LABEL[v] for v in range(5)], np.uint8)
    return np.asarray(table[labels.astype(np.intp)])


def learn_landmarks(cases: Sequence[LabelledCase]) -> Landmarks:
    """Mean percentiles of the z-scores over `cases`, per channel."""
    rows = []
    for labelled in cases:
        volume = read_volume(labelled.case.files)
        rows.append([z_score_percentiles(c, "nonzero") for c in volume.channels])
    mean = np.mean(rows, axis=0)
    return Landmarks(DECILES, tuple(tuple(round(float(v), 6) for v in row) for row in mean))


def _prepare(labelled: LabelledCase, normalisation: Normalisation) -> TrainingCase:
    volume = read_volume(labelled.case.files)
    classes = Volume([read_classes(labelled.label, volume)], volume.affine).oriented(ORIENTATION)
    volume = volume.oriented(ORIENTATION)
    box = brain_box(volume.channels, normalisation.foreground)
    image = normalise([c[box] for c in volume.channels], normalisation)
    crop = np.ascontiguousarray(classes.channels[0][box])
    return TrainingCase(labelled.name, image.astype(np.float16), crop)


def cached_case(labelled: LabelledCase, normalisation: Normalisation, cache: Path) -> TrainingCase:
    """The prepared case, from `cache` where it is there for the same normalisation."""
    key = hashlib.sha256(f"{labelled.case.files}{normalisation}".encode()).hexdigest()[:12]
    image_file = cache / f"{labelled.name}-{key}-image.npy"
    class_file = cache / f"{labelled.name}-{key}-classes.npy"
    if not (image_file.exists() and class_file.exists()):
        prepared = _prepare(labelled, normalisation)
        cache.mkdir(parents=True, exist_ok=True)
        for file, array in (
            (image_file, prepared.image),
            (class_file, prepared.classes),
        ):
            partial = file.with_suffix(".part")
            with partial.open("wb") as stream:
                np.save(stream, array)
            os.replace(partial, file)
    image = np.load(image_file, mmap_mode="r")
    return TrainingCase(labelled.name, image, np.load(class_file, mmap_mode="r"))


def synthetic_cases(count: int, first_seed: int, folder: Path) -> list[LabelledCase]:
    """Write `count` phantoms below `folder`, those that are not there yet, and list them."""
    for seed in range(first_seed, first_seed + count):
        name = f"synthetic-{seed}"
        if not (folder / name / f"{name}_seg.nii.gz").exists():
            write_case(make_case(seed), folder, name)
    return list(find_labelled_cases(folder).values()) if count else []


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

    def __init__(self, cases: Sequence[TrainingCase], size: int, tumour_share: float) -> None:
        self._cases = cases
        self._size = size
        self._tumour_share = tumour_share
        self._voxels = [
            [np.flatnonzero(np.asarray(case.classes) == k).astype(np.int32) for k in (1, 2, 3)]
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
