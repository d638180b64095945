"""Segmenter: the whole flow, from a volume to its labels, on one page."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.bundle import Bundle, Inference
from attnseg.runtime.cleanup import remove_small_components
from attnseg.runtime.clock import StageClock
from attnseg.runtime.engines.base import Engine, EngineInfo
from attnseg.runtime.engines.choice import EngineRequest, choose_engine
from attnseg.runtime.errors import BundleError, ConfigError, ScanError, VolumeError
from attnseg.runtime.executor import Progress as WindowProgress
from attnseg.runtime.executor import WindowOptions, sliding_window
from attnseg.runtime.normalise import background_value
from attnseg.runtime.prepare import Prepared, prepare
from attnseg.runtime.tta import Fuse, Fusion, Transform, argmax_classes, passes
from attnseg.runtime.volume import Volume, check_volume, reorient
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
    """

    engine: str = "auto"
    precision: str = "auto"
    tta: str = "none"
    fuse: Fuse = "vote"
    window: int | Literal["full"] | None = None
    overlap: float | None = None
    min_voxels: int | None = None
    threads: int | None = None


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
        labels: `(X, Y, Z)` uint8 in the volume's own grid, values as the bundle's labels.
        volumes_ml: millilitres per region.
        elapsed_ms: per stage.
        windows: planned per pass; those without brain were skipped.
        components_removed: by the clean-up.
        warnings: what a reader should know.
    """

    labels: NDArray[np.uint8]
    volumes_ml: dict[str, float]
    elapsed_ms: dict[str, float]
    windows: int
    components_removed: int
    warnings: tuple[str, ...]


def available_threads() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Segmenter:
    """Segments volumes with one bundle. Opening takes a moment, so keep it for many volumes.

    Not safe for several threads at once; use one per thread.

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
        options = options or SegmentOptions()
        if not isinstance(bundle, Bundle):
            bundle = Bundle.default() if bundle is None else Bundle.load(bundle)
        self.bundle = bundle
        self._plan = plan = _plan(options, bundle.manifest.inference)
        self.refusals: tuple[str, ...] = ()
        if engine is None:
            window = plan.window.window
            request = EngineRequest(options.engine, options.precision, window, plan.threads)
            chosen = choose_engine(bundle, request)
            if not chosen.way.brought:
                self.refusals = tuple(str(r) for r in chosen.refusals if r.way.brought)
            engine = chosen.engine
        self._engine = engine

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
            raise BundleError(
                f"{self.bundle.folder}: its network gives {logits.shape[0]} classes, its manifest "
                f"names {len(labels)} labels; export it again"
            )
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

    def segment(self, volume: Volume, progress: Progress | None = None) -> Segmentation:
        """Segment one volume.

        Args:
            volume: channels in the bundle's order, any orientation.
            progress: told the share of the work done.

        Raises:
            ScanError: the number of channels is wrong.
            VolumeError: the channels are not arrays of one 3-D shape with finite numbers, or one
                is all zero, has one value only, has a background other than 0 where the model
                takes 0, or equals another.
            BundleError: the network's classes are not those of the manifest.
            EngineError: the engine failed.
        """
        manifest, clock = self.bundle.manifest, StageClock()
        if len(volume.channels) != len(manifest.channels):
            names = ", ".join(c.name for c in manifest.channels)
            raise ScanError(f"the model takes {names}, got {len(volume.channels)} channels")
        with clock.stage("normalise"):
            check_volume(volume)
            self._check_channels(volume)
            warnings = self._warnings(volume)
            turned = volume.oriented(manifest.orientation)
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
        voxel_ml = float(abs(np.linalg.det(volume.affine[:3, :3]))) / 1000
        return Segmentation(
            labels,
            {
                name: round(int(voxels[list(region)].sum()) * voxel_ml, 3)
                for name, region in manifest.regions.items()
            },
            clock.elapsed_ms,
            len(self._plan.window.plan(scan.image.shape[1:]).windows),
            removed,
            warnings,
        )
