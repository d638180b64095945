"""Segmenter: the whole flow, from a volume to its labels, on one page."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import combinations
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.bundle import Bundle, Inference
from attnseg.runtime.cleanup import remove_small_components
from attnseg.runtime.clock import StageClock
from attnseg.runtime.cuda.cuda_device import CudaDevice
from attnseg.runtime.cuda.device import DeviceArray
from attnseg.runtime.cuda.executor import (
    DeviceExecutor,
    DeviceOptions,
    DeviceResult,
    LabelPlace,
    Submitted,
    Uploaded,
)
from attnseg.runtime.cuda.kernels import MOST_CLASSES, Strided
from attnseg.runtime.engines.base import DeviceEngine, Engine, EngineInfo
from attnseg.runtime.engines.choice import EngineRequest, choose_engine
from attnseg.runtime.errors import (
    BundleError,
    ConfigError,
    DeviceLostError,
    EngineError,
    ScanError,
    VolumeError,
)
from attnseg.runtime.executor import Progress as WindowProgress
from attnseg.runtime.executor import WindowOptions, sliding_window
from attnseg.runtime.normalise import background_value
from attnseg.runtime.prepare import Prepared, prepare
from attnseg.runtime.tta import Fuse, Fusion, Transform, argmax_classes, passes
from attnseg.runtime.volume import Volume, check_affine, check_volume, reorient, turned_strides
from attnseg.runtime.windows import Shape

_SPACING_TOLERANCE = 0.05  # relative; beyond it the report warns
_FULL = 0.9  # share of non-zero voxels from which on a background of 0 is unlikely

Progress = Callable[[float], None]
"""Called with the share of the work done, 0 to 1."""


@dataclass(frozen=True)
class SegmentOptions:
    """How to segment. None stands for the bundle's own value.

    Attributes:
        engine: `auto` takes the fastest that runs here, or `tensorrt`, `tensorrt-rtx`,
            `onnxruntime-cuda`, `openvino`, `onnxruntime`.
        precision: `auto` takes the engine's fastest, or `fp16`, `bf16`, `fp32`, `int8`.
        tta: passes: `none`, `paper` (identity, mirror, quarter turn) or `mirror8`.
        fuse: how passes are joined, `vote` or `mean`.
        window: edge of the cubic window in voxels, or `full` for one pass over the box.
        overlap: share of a window in common with the next.
        min_voxels: components of a class with fewer voxels are removed.
        threads: of the processor; None for all that this process may use.
        device: `cuda` for a GPU, `cpu`, or `auto` for a GPU if there is one that runs the model.
        max_memory_bytes: of the GPU that may be taken; None for any.
        fallback: `cpu` to go on there when the GPU fails; None to report the cases as failed.
        stream: handle of the caller's CUDA stream, on which the GPU's work is ordered; None for
            one of its own.
    """

    engine: str = "auto"
    precision: str = "auto"
    tta: str = "none"
    fuse: Fuse = "vote"
    window: int | Literal["full"] | None = None
    overlap: float | None = None
    min_voxels: int | None = None
    threads: int | None = None
    device: str = "auto"
    max_memory_bytes: int | None = None
    fallback: Literal["cpu"] | None = None
    stream: int | None = None


@dataclass(frozen=True)
class _Plan:
    """The options with every value known."""

    window: WindowOptions
    tta: str
    fuse: Fuse
    min_voxels: int
    threads: int

    @property
    def transforms(self) -> tuple[Transform, ...]:
        return passes(self.tta)

    def to_dict(self) -> dict[str, Any]:
        return {
            "tta": self.tta,
            "fuse": self.fuse,
            "window": list(self.window.window) if self.window.window else "full",
            "overlap": self.window.overlap,
            "min_voxels": self.min_voxels,
        }


def _plan(options: SegmentOptions, defaults: Inference) -> _Plan:
    """Check the options and put the bundle's values in place of None."""
    overlap = defaults.overlap if options.overlap is None else options.overlap
    min_voxels = defaults.min_voxels if options.min_voxels is None else options.min_voxels
    threads = available_threads() if options.threads is None else options.threads
    edge, multiple = options.window, defaults.window_multiple
    if not 0 <= overlap < 1:
        raise ConfigError(f"overlap must be at least 0 and below 1, got {overlap}")
    if min_voxels < 0:
        raise ConfigError(f"min-voxels must be at least 0, got {min_voxels}")
    if threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    number = isinstance(edge, Integral)
    if edge not in (None, "full") and not (number and int(edge) > 0 and int(edge) % multiple == 0):
        raise ConfigError(f"window must be full or a multiple of {multiple} voxels, got {edge!r}")
    passes(options.tta)
    Fusion(options.fuse)
    if options.fallback not in (None, "cpu"):
        raise ConfigError(f"fallback must be cpu, or left out, got {options.fallback}")
    if options.max_memory_bytes is not None and options.max_memory_bytes < 1:
        raise ConfigError(f"max-memory must be positive, got {options.max_memory_bytes}")
    window: Shape | None = defaults.window if edge is None else None
    if isinstance(edge, Integral):
        window = (int(edge), int(edge), int(edge))
    return _Plan(
        WindowOptions(window, overlap, multiple),
        options.tta,
        options.fuse,
        min_voxels,
        threads,
    )


@dataclass(frozen=True)
class Segmentation:
    """The result for one volume.

    Attributes:
        labels: `(X, Y, Z)` uint8 in the volume's own grid, values as the bundle's labels; on the
            GPU if that was asked for.
        volumes_ml: millilitres per region.
        elapsed_ms: per stage.
        windows: planned per pass; those without brain were skipped.
        components_removed: by the clean-up.
        warnings: what a reader should know.
        engine: that ran.
        memory: of the GPU, as planned: bytes, batch, type of the logits; empty on the CPU.
    """

    labels: Any
    volumes_ml: dict[str, float]
    elapsed_ms: dict[str, float]
    windows: int
    components_removed: int
    warnings: tuple[str, ...]
    engine: EngineInfo
    memory: dict[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Staged:
    """A volume that was checked, and is on its way to where it is segmented."""

    volume: Volume
    warnings: tuple[str, ...]
    clock: StageClock
    uploaded: Uploaded | None


class Pending(Protocol):
    """A segmentation that is under way."""

    def result(self) -> Segmentation:
        """Wait for it; may be called by another thread.

        Raises:
            EngineError: the engine or the GPU failed.
        """


@dataclass(frozen=True)
class _Done:
    segmentation: Segmentation

    def result(self) -> Segmentation:
        return self.segmentation


@dataclass(frozen=True)
class _UnderWay:
    submitted: Submitted
    finish: Callable[[DeviceResult], Segmentation]
    lost: Callable[[DeviceLostError], None]
    clock: StageClock

    def result(self) -> Segmentation:
        with self.clock.stage("download"):
            try:
                found = self.submitted.result()
            except DeviceLostError as error:
                self.lost(error)
                raise
        return self.finish(found)


def available_threads() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Segmenter:
    """Segments volumes with one bundle. Opening takes a moment, so keep it for many volumes.

    Not safe for several threads at once; use one per thread. Only `stage` and `Pending.result` may
    run in other threads, so that volumes come, are segmented and go at the same time.

    Attributes:
        bundle: the model.
        refusals: engine files of the bundle and why they are not used; empty if one is.

    Example:
        >>> segmenter = Segmenter()
        >>> labels = segmenter.segment(Volume(channels, affine)).labels
    """

    def __init__(
        self,
        bundle: Bundle | Path | str | None = None,
        options: SegmentOptions | None = None,
        engine: Engine | None = None,
    ) -> None:
        """Open the engine.

        Args:
            bundle: the model, or its folder; None for the shipped one.
            options: how to run it.
            engine: that runs the network; None for the one that the options name.

        Raises:
            BundleError: the bundle is missing or damaged.
            ConfigError: an option has a value that is not allowed.
            EngineError: no engine is installed, or the one asked for cannot run the model.
        """
        self._options = options = options or SegmentOptions()
        if not isinstance(bundle, Bundle):
            bundle = Bundle.default() if bundle is None else Bundle.load(bundle)
        self.bundle = bundle
        self._plan = _plan(options, bundle.manifest.inference)
        self.refusals: tuple[str, ...] = ()
        self._lost: DeviceLostError | None = None
        self._use(engine or self._chosen_engine())

    def _chosen_engine(self) -> Engine:
        options, request = self._options, self._request(self._options.device)
        try:
            chosen = choose_engine(self.bundle, request)
        except EngineError as error:
            if options.fallback is None or options.device == "cpu":
                raise
            self.refusals = (str(error),)
            return choose_engine(self.bundle, self._request("cpu")).engine
        if not chosen.way.brought:
            self.refusals = tuple(str(r) for r in chosen.refusals if r.way.brought)
        return chosen.engine

    def _request(self, device: str) -> EngineRequest:
        options, plan = self._options, self._plan
        anew = device != options.device  # the engine that was named is for the GPU
        return EngineRequest(
            "auto" if anew else options.engine,
            "auto" if anew else options.precision,
            plan.window.window,
            plan.threads,
            device,
            (options.max_memory_bytes or 0) // 2,  # the executor plans with the other half
            cache(partial(CudaDevice, options.stream)),
        )

    def _use(self, engine: Engine) -> None:
        """Segment with this engine from now on."""
        self._engine, self._executor = engine, None
        manifest, plan, most = self.bundle.manifest, self._plan, self._options.max_memory_bytes
        if not isinstance(engine, DeviceEngine):
            if most is not None and self._options.fallback is None:
                raise ConfigError(
                    f"max-memory is for a GPU, and {engine.info.name} runs on the CPU here; leave "
                    "it out, or say --device cuda to hear why no GPU is used"
                )
            return
        if engine.classes not in (None, len(manifest.labels)):
            raise self._other_classes(int(engine.classes or 0))
        if manifest.grid is None and len(manifest.labels) <= MOST_CLASSES:
            options = DeviceOptions(
                plan.window,
                plan.transforms,
                plan.fuse,
                plan.min_voxels,
                manifest.normalisation,
                tuple(label.value for label in manifest.labels),
                most,
            )
            self._executor = DeviceExecutor(engine, options)

    @property
    def engine_info(self) -> EngineInfo:
        """The engine that was chosen."""
        return self._engine.info

    @property
    def threads(self) -> int:
        """Processor threads that it uses."""
        return self._plan.threads

    @property
    def settings(self) -> dict[str, Any]:
        """What shapes the result besides bundle and engine, as plain values for a report."""
        return self._plan.to_dict()

    def _other_classes(self, classes: int) -> BundleError:
        return BundleError(
            f"{self.bundle.folder}: its network gives {classes} classes, its manifest names "
            f"{len(self.bundle.manifest.labels)} labels; export it again"
        )

    def _logits(
        self,
        scan: Prepared,
        transform: Transform,
        clock: StageClock,
        progress: WindowProgress | None,
    ) -> NDArray[np.float32]:
        """Logits of one pass on the scan's own grid, its transform undone."""
        turned = transform.apply(scan.image)
        logits = sliding_window(turned, self._engine, self._plan.window, progress, clock)
        labels = self.bundle.manifest.labels
        if logits.shape[0] != len(labels):
            raise self._other_classes(logits.shape[0])
        logits = transform.invert(logits)
        if not scan.resampled:
            return logits
        with clock.stage("resample"):
            return scan.restore(logits)

    def _classes(
        self, scan: Prepared, clock: StageClock, progress: Progress | None
    ) -> NDArray[np.uint8]:
        """Class per voxel of the scan's result box, over all passes."""
        transforms = self._plan.transforms
        fusion = Fusion(self._plan.fuse)
        for index, transform in enumerate(transforms):

            def advance(done: int, of: int, before: int = index) -> None:
                if progress:
                    progress((before + done / of) / len(transforms))

            logits = self._logits(scan, transform, clock, advance)
            with clock.stage("fuse"):
                if len(transforms) == 1:
                    return argmax_classes(logits)
                fusion.add(logits)
        with clock.stage("fuse"):
            return fusion.classes()

    def _check_channels(self, volume: Volume) -> None:
        """Refuse what is surely not what the model takes, though it could be computed with."""
        names = [channel.name for channel in self.bundle.manifest.channels]
        for name, channel in zip(names, volume.channels, strict=True):
            value = background_value(channel)
            if self.bundle.manifest.normalisation.foreground == "nonzero" and value != 0:
                raise VolumeError(
                    f"{name}: its background is {value:g}, the model takes 0 there; set the voxels "
                    "outside the brain to 0"
                )
        for (a, first), (b, second) in combinations(zip(names, volume.channels, strict=True), 2):
            middle = volume.shape[0] // 2
            if not np.array_equal(first[middle], second[middle]):
                continue  # nearly always decided here, without a look at every voxel
            if np.array_equal(first, second) and first.any():
                raise VolumeError(f"{a} and {b} hold the same voxels; check which file is which")

    def _warnings(self, volume: Volume) -> tuple[str, ...]:
        manifest, warnings = self.bundle.manifest, list(volume.warnings)
        wanted = np.array(manifest.spacing_mm)
        spacing = np.array(volume.oriented(manifest.orientation).spacing_mm)
        resampled = manifest.grid is not None and manifest.grid.spacing_mm is not None
        if not resampled and not np.allclose(spacing, wanted, rtol=_SPACING_TOLERANCE):
            got, want = (" x ".join(f"{v:g}" for v in s.round(3)) for s in (spacing, wanted))
            warnings.append(
                f"spacing is {got} mm, the model was trained at {want} mm: results may be poor; "
                "resample the scan first"
            )
        share = np.count_nonzero(volume.channels[0]) / volume.channels[0].size
        if manifest.normalisation.foreground == "nonzero" and share > _FULL:
            warnings.append(
                f"{share:.0%} of the voxels are not 0: the model takes skull-stripped scans with "
                "a background of 0, and the result is likely wrong"
            )
        return tuple(warnings)

    def stage(self, volume: Volume) -> Staged:
        """Check a volume, and start its upload if it is segmented on a GPU.

        May run in another thread while a volume is segmented.

        Raises:
            ScanError, VolumeError, EngineError: as `segment`.
        """
        channels, clock = self.bundle.manifest.channels, StageClock()
        if len(volume.channels) != len(channels):
            names = ", ".join(c.name for c in channels)
            raise ScanError(f"the model takes {names}, got {len(volume.channels)} channels")
        with clock.stage("check"):
            arrays = self._on_device(volume)
            if arrays is None:
                check_volume(volume)
                self._check_channels(volume)
                warnings = self._warnings(volume)
            else:
                warnings = tuple(volume.warnings)
        executor, uploaded = self._executor, None
        if executor is not None and self._lost is None:
            with clock.stage("upload"):
                turned: Any = arrays or self._turned(volume).channels
                try:
                    uploaded = executor.upload(turned, self._label_place(volume))
                except DeviceLostError as error:
                    self._lost = error  # `submit` goes on elsewhere, or says why not
        return Staged(volume, warnings, clock, uploaded)

    def _turned(self, volume: Volume) -> Volume:
        return volume.oriented(self.bundle.manifest.orientation)

    def _label_place(self, volume: Volume) -> LabelPlace:
        """In the volume's own orientation."""
        x, y, z = volume.shape
        target = self.bundle.manifest.orientation
        offset, _, steps = turned_strides((x, y, z), (1, x, x * y), volume.orientation, target)
        return LabelPlace((x, y, z), Strided(offset, *steps))

    def _on_device(self, volume: Volume) -> list[DeviceArray] | None:
        """The channels in the model's orientation, if they are arrays of the GPU."""
        foreign = [not isinstance(channel, np.ndarray) for channel in volume.channels]
        if not any(foreign):
            return None
        if self._executor is None or not isinstance(self._engine, DeviceEngine):
            return None  # refused as no numpy array
        check_affine(volume)
        device, found = self._engine.device, []
        with device.active():
            views = [device.view(channel) for channel in volume.channels]
        for index, view in enumerate(views, start=1):
            if view is None:
                raise VolumeError(
                    f"channel {index}: expected an array on {device.name}, as the others are, by "
                    "__cuda_array_interface__ or DLPack; copy it there"
                )
            if len(view.shape) != 3 or view.shape != views[0].shape:  # type: ignore[union-attr]
                raise VolumeError(
                    f"channel {index}: expected a 3-D array of the shape of channel 1, got "
                    f"{view.shape}"
                )
            orientation = self.bundle.manifest.orientation
            offset, shape, strides = turned_strides(
                view.shape, view.strides, volume.orientation, orientation
            )
            pointer = view.pointer + offset
            found.append(DeviceArray(pointer, shape, strides, view.dtype, view.owner, device))
        return found

    def submit(
        self, staged: Staged, progress: Progress | None = None, on_device: bool = False
    ) -> Pending:
        """Segment a volume. On a GPU its labels may still be on their way when this returns.

        Args:
            staged: by `stage` of this segmenter.
            progress: told the share of the work done.
            on_device: leave the labels on the GPU.

        Raises:
            ConfigError: labels are asked for on the GPU, and the model runs on the CPU.
            VolumeError, BundleError, EngineError: as `segment`.
        """
        if self._lost:
            self._recover(self._lost)
        if on_device and self._executor is None:
            raise ConfigError(
                f"labels stay on a GPU only where it segments; {self._engine.info.name} does not"
            )
        if self._executor is None:
            return _Done(self._on_host(staged, progress))
        assert staged.uploaded is not None, "it was staged here, and the GPU is not lost"
        try:
            submitted = self._executor.submit(staged.uploaded, progress, on_device)
        except DeviceLostError as error:
            self._note_lost(self._executor, error)
            raise
        finish = partial(self._finish, staged, self._engine.info)
        lost = partial(self._note_lost, self._executor)
        return _UnderWay(submitted, finish, lost, staged.clock)

    def _note_lost(self, executor: DeviceExecutor, error: DeviceLostError) -> None:
        if executor is self._executor:  # not one that was given up already
            self._lost = error

    def _recover(self, lost: DeviceLostError) -> None:
        """Go on without the GPU, if that was said."""
        if self._options.fallback is None:
            raise EngineError(f"not tried, as {lost}; run it again, or with --fallback cpu")
        self._use(choose_engine(self.bundle, self._request("cpu")).engine)
        self._lost = None

    def segment(
        self, volume: Volume, progress: Progress | None = None, on_device: bool = False
    ) -> Segmentation:
        """Segment one volume.

        Args:
            volume: channels in the bundle's order, any orientation. If they are arrays on the GPU
                (PyCUDA, CuPy, torch, numba; int16 or float32 in one piece), they are neither copied
                to the host nor checked there for their background or for being equal.
            progress: told the share of the work done.
            on_device: leave the labels on the GPU, as a `DeviceArray`.

        Raises:
            ScanError: the number of channels is wrong.
            VolumeError: the channels are not arrays of one 3-D shape with finite numbers, or one
                is all zero, has one value only, has a background other than 0 where the model
                takes 0, or equals another.
            ConfigError: labels are asked for on the GPU, and the model runs on the CPU.
            BundleError: the network's classes are not those of the manifest.
            EngineError: the engine or the GPU failed.
        """
        return self.submit(self.stage(volume), progress, on_device).result()

    def _on_host(self, staged: Staged, progress: Progress | None) -> Segmentation:
        manifest, clock, volume = self.bundle.manifest, staged.clock, staged.volume
        with clock.stage("normalise"):
            turned = self._turned(volume)
            scan = prepare(turned, manifest.grid, manifest.normalisation, self._plan.threads)
        classes = self._classes(scan, clock, progress)
        box = scan.result_box
        with clock.stage("clean-up"):
            classes, removed = remove_small_components(classes, self._plan.min_voxels)
        with clock.stage("paste"):
            values = np.array([label.value for label in manifest.labels], np.uint8)
            labels = np.zeros(turned.shape, np.uint8, order="F")
            labels[box] = values[classes]
            voxels = np.bincount(labels[box].ravel(order="K"), minlength=256)
            labels = reorient(labels, manifest.orientation, volume.orientation)
        return Segmentation(
            labels,
            self._volumes_ml(volume, voxels),
            clock.elapsed_ms,
            len(self._plan.window.plan(scan.image.shape[1:]).windows),
            removed,
            staged.warnings,
            self._engine.info,
        )

    def _volumes_ml(self, volume: Volume, voxels: NDArray[np.int64]) -> dict[str, float]:
        """Millilitres per region from voxels per label value."""
        voxel_ml = float(abs(np.linalg.det(volume.affine[:3, :3]))) / 1000
        return {
            name: round(int(voxels[list(region)].sum()) * voxel_ml, 3)
            for name, region in self.bundle.manifest.regions.items()
        }

    def _finish(self, staged: Staged, engine: EngineInfo, found: DeviceResult) -> Segmentation:
        voxels = np.zeros(256, np.int64)
        for label, count in zip(self.bundle.manifest.labels, found.voxels.tolist(), strict=True):
            voxels[label.value] += count
        return Segmentation(
            found.labels,
            self._volumes_ml(staged.volume, voxels),
            staged.clock.elapsed_ms | found.elapsed_ms,
            found.windows,
            found.components_removed,
            staged.warnings,
            engine,
            found.memory,
        )
