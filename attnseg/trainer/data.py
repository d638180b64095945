"""Labelled cases to training patches.

Each case is normalised once by the runtime's own code, cropped to the brain box and kept as
a float16 array on disk, read through a memory map: 27 MB a case, whatever the machine's memory.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from attnseg.runtime.errors import ConfigError, ScanError, TrainingError
from attnseg.runtime.grid import Grid, resample, resample_volume
from attnseg.runtime.normalise import DECILES, Landmarks, Normalisation, z_score_percentiles
from attnseg.runtime.prepare import prepare
from attnseg.runtime.volume import read_volume
from attnseg.synthetic import make_case, write_case
from attnseg.trainer.cases import LabelledCase, find_labelled_cases, read_classes
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.task import BRATS, Task


@dataclass(frozen=True)
class TrainingCase:
    """A normalised case: image `(C, X, Y, Z)` float16 and classes `(X, Y, Z)` uint8."""

    name: str
    image: NDArray[np.float16]
    classes: NDArray[np.uint8]


@dataclass(frozen=True)
class Preparation:
    """How cases become training cases: by the task's channels, a grid, and a normalisation.

    Attributes:
        task: what is segmented.
        grid: that volumes are resampled to, or None.
        normalisation: of the intensities.
    """

    task: Task
    grid: Grid | None
    normalisation: Normalisation

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in checkpoints and in the metadata of weights."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; what was stored before there were tasks is of BraTS."""
        own = {key: values.get(key) for key in ("task", "grid", "normalisation")}
        return TypeAdapter(cls).validate_python({**own, "task": own["task"] or BRATS})


def config_grid(config: TrainConfig) -> Grid | None:
    """The grid that a configuration asks for, None for the cases' own."""
    if config.resize:
        x, y, z = config.resize
        return Grid(shape=(x, y, z))
    if config.spacing_mm:
        i, j, k = config.spacing_mm
        return Grid(spacing_mm=(i, j, k))
    return None


def learn_preparation(
    cases: Sequence[LabelledCase], task: Task, config: TrainConfig
) -> Preparation:
    """The preparation that `config` asks for, its landmarks learned from the training `cases`.

    Raises:
        TrainingError: a case cannot be read, or the images have too few grey values.
    """
    grid = config_grid(config)
    foreground = task.foreground if config.foreground == "task" else config.foreground
    plain = Preparation(task, grid, Normalisation(foreground))
    if not config.histogram_matching:
        return plain
    return Preparation(task, grid, Normalisation(foreground, learn_landmarks(cases, plain)))


def learn_landmarks(cases: Sequence[LabelledCase], preparation: Preparation) -> Landmarks:
    """Mean percentiles of the z-scores over `cases`, per channel; errors as the caller's."""
    rows = []
    foreground = preparation.normalisation.foreground
    for labelled in cases:
        with _naming(labelled):
            volume = read_volume(labelled.case.files).oriented(preparation.task.orientation)
            volume = resample_volume(volume, preparation.grid)
            rows.append([z_score_percentiles(c, foreground) for c in volume.channels])
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


def _prepare(labelled: LabelledCase, preparation: Preparation) -> TrainingCase:
    orientation = preparation.task.orientation
    with _naming(labelled):
        classes = read_classes(labelled, preparation.task).oriented(orientation).channels[0]
        volume = read_volume(labelled.case.files).oriented(orientation)
        scan = prepare(volume, preparation.grid, preparation.normalisation)
    classes = resample(classes, scan.grid_shape, nearest=True)[scan.box]
    image = scan.image.astype(np.float16)
    return TrainingCase(labelled.name, image, np.ascontiguousarray(classes))


def _cache_key(labelled: LabelledCase, preparation: Preparation) -> str:
    """Changes with the preparation and with every file of the case."""
    files = (*dict.fromkeys(labelled.case.files), labelled.label)
    stamps = [(str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files]
    return hashlib.sha256(f"{stamps}{preparation}".encode()).hexdigest()[:12]


def _save_array(file: Path, array: NDArray[Any]) -> None:
    partial = file.with_suffix(f".{os.getpid()}.part")
    try:
        with partial.open("wb") as stream:
            np.save(stream, array)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def cached_case(labelled: LabelledCase, preparation: Preparation, cache: Path) -> TrainingCase:
    """The prepared case, from `cache` where it is there for the same files and preparation.

    Raises:
        TrainingError: the case cannot be used, or the cache cannot be written.
    """
    stem = f"{labelled.name}-{_cache_key(labelled, preparation)}"
    files = (cache / f"{stem}-image.npy", cache / f"{stem}-classes.npy")
    if not all(file.exists() for file in files):
        prepared = _prepare(labelled, preparation)
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
                made = write_case(make_case(seed), Path(scratch), name)
                with suppress(OSError):  # another run that shares the cache was first
                    os.replace(made, folder / name)
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
        self, cases: Sequence[TrainingCase], size: int, tumour_share: float, classes: int
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


@dataclass(frozen=True)
class Batch:
    """Patches of several cases: images `(B, C, S, S, S)`, labels `(B, S, S, S)`."""

    names: tuple[str, ...]
    images: Tensor
    labels: Tensor


class BatchFeed:
    """Draws the next batch in the background while the network works on this one.

    `state` is that of the random generator as if no batch beyond the last had been drawn.
    """

    def __init__(self, sampler: PatchSampler, batch_size: int, rng: np.random.Generator) -> None:
        self._sampler = sampler
        self._batch_size = batch_size
        self._rng = rng
        self._pool = ThreadPoolExecutor(1, "patches")
        self.state = rng.bit_generator.state
        self._next = self._pool.submit(self._draw)

    def _draw(self) -> tuple[Batch, Any]:
        patches = [self._sampler.draw(self._rng) for _ in range(self._batch_size)]
        names, images, labels = zip(*patches, strict=True)
        batch = Batch(names, torch.stack(images), torch.stack(labels))
        return batch, self._rng.bit_generator.state

    def take(self) -> Batch:
        """The next batch."""
        batch, self.state = self._next.result()
        self._next = self._pool.submit(self._draw)
        return batch

    def close(self) -> None:
        """Stop drawing."""
        self._pool.shutdown(cancel_futures=True)
