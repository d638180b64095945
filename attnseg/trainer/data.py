"""From labelled cases to training patches.

Each case is normalised once by the runtime's own code, cropped to the foreground box, and stored
as a float16 array on disk, which is memory-mapped: about 27 MB per case, independent of RAM.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from attnseg.data.labelled import LabelledCase, find_labelled_cases, naming_case, read_classes
from attnseg.runtime.errors import TrainingError
from attnseg.runtime.files import new_folder, write_file
from attnseg.runtime.steps.preprocess import preprocess
from attnseg.runtime.steps.resample import resample
from attnseg.runtime.threads import Threads
from attnseg.synthetic import make_case, write_case
from attnseg.trainer.preparation import Done, Preparation, read_scan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingCase:
    """A normalised case: image `(C, X, Y, Z)` float16 and classes `(X, Y, Z)` uint8."""

    name: str
    image: NDArray[np.float16]
    classes: NDArray[np.uint8]


def _prepare(labelled: LabelledCase, preparation: Preparation) -> TrainingCase:
    preprocessing = preparation.preprocessing
    with naming_case(labelled):
        read = read_classes(labelled, preparation.task)
        classes = read.oriented(preprocessing.orientation_of_image(read))
        volume = read_scan(labelled, preparation.task, preprocessing)
        scan = preprocess(volume, preprocessing)
    for warning in volume.warnings:
        log.warning("warning: case %s: %s", labelled.name, warning)
    placed = resample(classes.channels[0], scan.grid_shape, nearest=True)[scan.box.slices()]
    image = scan.image.astype(np.float16)
    return TrainingCase(labelled.name, image, np.ascontiguousarray(placed))


def _cache_key(labelled: LabelledCase, preparation: Preparation) -> str:
    """Hash of the preparation and of path, time and size of every file of the case."""
    files = (*dict.fromkeys(labelled.case.files), labelled.label)
    stamps = [(str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files]
    return hashlib.sha256(f"{stamps}{preparation}".encode()).hexdigest()[:12]


def cached_case(labelled: LabelledCase, preparation: Preparation, cache: Path) -> TrainingCase:
    """Return the prepared case, from `cache` if it holds it for the same files and preparation.

    Raises:
        TrainingError: The case is not usable, or the cache cannot be written.
    """
    stem = f"{labelled.name}-{_cache_key(labelled, preparation)}"
    files = (cache / f"{stem}-image.npy", cache / f"{stem}-classes.npy")
    if not all(file.exists() for file in files):
        prepared = _prepare(labelled, preparation)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            write_file(files[0], partial(np.save, arr=prepared.image))
            write_file(files[1], partial(np.save, arr=prepared.classes))
        except OSError as error:
            raise TrainingError(
                f"{cache}: cannot be written to ({error.strerror or error})", "free some space"
            ) from error
    image, classes = (np.load(file, mmap_mode="r") for file in files)
    return TrainingCase(labelled.name, image, classes)


def synthetic_cases(count: int, first_seed: int, folder: Path) -> list[LabelledCase]:
    """Return `count` phantoms below `folder`, after writing those that do not exist yet."""
    if not count:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    names = {f"synthetic-{seed}": seed for seed in range(first_seed, first_seed + count)}
    for name, seed in names.items():
        if not (folder / name).exists():
            with new_folder(folder / name) as (scratch, _):
                made = write_case(make_case(seed), scratch, name)
                with suppress(OSError):  # another run that shares the cache has written it
                    os.replace(made, folder / name)
    found = find_labelled_cases(folder).cases
    return [found[name] for name in names]


def _cut(array: NDArray[Any], start: NDArray[np.int64], size: int) -> NDArray[Any]:
    """Cut a cube of `size` voxels from `start` on along the last three axes, zero-padded."""
    out = np.zeros((*array.shape[:-3], size, size, size), array.dtype)
    source: list[Any] = [...]
    target: list[Any] = [...]
    for first, length in zip(start.tolist(), array.shape[-3:], strict=True):
        low, high = max(first, 0), min(first + size, length)
        source.append(slice(low, high))
        target.append(slice(low - first, high - first))
    out[tuple(target)] = array[tuple(source)]
    return out


def at_half_resolution(image: Tensor, classes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means of 2x2x2 voxels, and the most frequent class in them; the lowest one on ties.

    Args:
        image: `(C, 2X, 2Y, 2Z)` float32.
        classes: `(2X, 2Y, 2Z)` int64.
        count: Number of classes.

    Returns:
        Image `(C, X, Y, Z)` and classes `(X, Y, Z)`.
    """
    shares = torch.cat([F.avg_pool3d((classes == k)[None].float(), 2) for k in range(count)])
    return F.avg_pool3d(image, 2), shares.argmax(dim=0)


class PatchSampler:
    """Draws patches from the training cases, reproducibly for a seed."""

    def __init__(
        self,
        cases: Sequence[TrainingCase],
        size: int,
        tumour_share: float,
        classes: int,
        progress: Done | None = None,
        half_resolution_share: float = 0.0,
    ) -> None:
        """Locate the voxels of each class.

        Args:
            cases: Prepared cases.
            size: Edge of the cubic patches, in voxels.
            tumour_share: Share of patches centred on a tumour voxel.
            classes: Number of classes, with background.
            progress: Function called with the name of each case that was searched.
            half_resolution_share: Share of patches of twice the edge at half the resolution.
        """
        self._half_share, self._classes = half_resolution_share, classes
        self._cases = cases
        self._size = size
        self._tumour_share = tumour_share
        self._voxels = []
        for case in cases:
            own = np.asarray(case.classes)
            found = [np.flatnonzero(own == k).astype(np.int32) for k in range(1, classes)]
            self._voxels.append(found)
            if progress:
                progress(case.name)

    def _centre(self, index: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw a tumour voxel of a random class with probability `tumour_share`, else any voxel."""
        shape = self._cases[index].classes.shape
        present = [voxels for voxels in self._voxels[index] if len(voxels)]
        if present and rng.random() < self._tumour_share:
            voxels = present[rng.integers(len(present))]
            return np.array(np.unravel_index(int(rng.choice(voxels)), shape))
        return rng.integers(0, shape)

    def draw(self, rng: np.random.Generator) -> tuple[str, Tensor, Tensor]:
        """Draw a patch: case name, image `(C, S, S, S)` float32, classes `(S, S, S)` int64.

        A patch that would leave the image is moved inside along each axis that is long enough.
        """
        index = int(rng.integers(len(self._cases)))
        case = self._cases[index]
        coarse = self._half_share > 0 and rng.random() < self._half_share
        size = 2 * self._size if coarse else self._size
        room = np.array(case.classes.shape) - size
        start = self._centre(index, rng) - size // 2
        start = np.where(room >= 0, np.clip(start, 0, np.maximum(room, 0)), room // 2)
        image = torch.from_numpy(_cut(case.image, start, size).astype(np.float32))
        classes = torch.from_numpy(_cut(case.classes, start, size).astype(np.int64))
        if coarse:
            image, classes = at_half_resolution(image, classes, self._classes)
        return case.name, image, classes


@dataclass(frozen=True)
class Batch:
    """Patches: case names, images `(B, C, S, S, S)` float32, labels `(B, S, S, S)` int64."""

    names: tuple[str, ...]
    images: Tensor
    labels: Tensor


class BatchFeed:
    """Draws the next batch in the background while the network processes the current one.

    Attributes:
        state: State of the random generator after the last batch that `take` returned.
    """

    def __init__(self, sampler: PatchSampler, batch_size: int, rng: np.random.Generator) -> None:
        self._sampler = sampler
        self._batch_size = batch_size
        self._rng = rng
        self._thread = Threads()
        self.state = rng.bit_generator.state
        self._next = self._thread.submit(self._draw)

    def _draw(self) -> tuple[Batch, Any]:
        patches = [self._sampler.draw(self._rng) for _ in range(self._batch_size)]
        names, images, labels = zip(*patches, strict=True)
        batch = Batch(names, torch.stack(images), torch.stack(labels))
        return batch, self._rng.bit_generator.state

    def take(self) -> Batch:
        """Return the next batch."""
        batch, self.state = self._next.result()
        self._next = self._thread.submit(self._draw)
        return batch

    def close(self) -> None:
        """Stop drawing."""
        self._thread.close(drop=True)
