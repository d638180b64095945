"""Segmenter: the main entry point of the runtime."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

from attnseg.runtime.case.volume import Volume, check_volume
from attnseg.runtime.engines.base import Engine, EngineInfo
from attnseg.runtime.errors import ConfigError, VolumeError
from attnseg.runtime.model.bundle import Bundle
from attnseg.runtime.options import Plan, SegmentOptions, resolve
from attnseg.runtime.pipelines.base import Pending, Progress, Segmentation, Staged
from attnseg.runtime.pipelines.open import open_pipeline
from attnseg.runtime.results.provenance import Provenance
from attnseg.runtime.steps.check import check_channel_count
from attnseg.runtime.steps.clock import StageClock, Step
from attnseg.runtime.strip import SkullStripper, mask_channel


class Segmenter:
    """Segments volumes with one bundle. Opening is slow; reuse a segmenter for many volumes.

    May be called from several threads: volumes are segmented one after the other, while `stage` and
    `Pending.result` run concurrently, so that upload, segmentation and download of consecutive
    volumes overlap.

    Attributes:
        bundle: Bundle of the model.
        plan: All settings of the segmentation, with every value resolved.
        refusals: Refusals of prebuilt engines that are unavailable on this machine, or the error
            of the GPU after a fallback to the CPU; empty if a prebuilt engine is used.

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
        """Open the model.

        Args:
            bundle: Bundle of the model, or its folder; None for the default bundle.
            options: Options of the segmentation; None for the defaults.
            engine: Open engine that runs the network; None to select one by the options.

        Raises:
            BundleError: The bundle is missing or damaged.
            ConfigError: An option has an invalid value.
            EngineError: No engine is installed, or the requested engine cannot run the model.
        """
        if not isinstance(bundle, Bundle):
            bundle = Bundle.default() if bundle is None else Bundle.load(bundle)
        if not isinstance(options, SegmentOptions | None):
            kind = type(options).__name__
            raise ConfigError(f"options must be SegmentOptions, got {kind}")
        self.bundle = bundle
        options = options or SegmentOptions()
        self.plan: Plan = resolve(options, bundle.manifest)
        self._stripper = self._skull_stripper(options)
        opened = open_pipeline(bundle, self.plan, engine)
        self._pipeline, self.refusals = opened.pipeline, opened.refusals
        self._one_at_a_time = threading.Lock()

    def _skull_stripper(self, options: SegmentOptions) -> SkullStripper | None:
        """Open the model that finds the brain, and note it in the plan."""
        if options.skull_strip is None:
            return None
        bundle = Bundle.load(options.skull_strip)
        task, manifest = self.bundle.manifest.task, bundle.manifest
        channel = mask_channel(task, manifest.task)
        self.plan = replace(self.plan, skull_strip=bundle.sha256)
        own = SegmentOptions(threads=options.threads, device=options.device)
        return SkullStripper(Segmenter(bundle, own), channel, manifest.name)

    @property
    def engine(self) -> EngineInfo:
        """Engine that runs the model."""
        return self._pipeline.engine

    @property
    def provenance(self) -> Provenance:
        """Bundle, engine and settings that the results depend on."""
        return Provenance(self.bundle, self.engine, self.plan.settings())

    def stage(self, volume: Volume) -> Staged:
        """Check a volume and, for a GPU, start its upload.

        May run in another thread while another volume is segmented.

        Raises:
            ScanError, VolumeError, EngineError: See `segment`.
        """
        if not isinstance(volume, Volume):
            kind = type(volume).__name__
            raise VolumeError(f"expected a Volume, got {kind}", "give Volume(channels, affine)")
        if self._stripper is None:
            return self._pipeline.stage(volume)
        check_channel_count(volume, self.plan.task)
        check_volume(volume)
        clock = StageClock()
        with clock.stage(Step.STRIP):
            volume = self._stripper.strip(volume)
        staged = self._pipeline.stage(volume)
        staged.clock.precede(clock)
        return staged

    def submit(
        self, staged: Staged, progress: Progress | None = None, on_device: bool = False
    ) -> Pending:
        """Segment a staged volume. On a GPU this may return before the labels are available.

        Args:
            staged: Result of `stage` of this segmenter.
            progress: Callback that receives the fraction of the work done, 0 to 1.
            on_device: Whether the labels stay on the GPU.

        Raises:
            ConfigError, VolumeError, BundleError, EngineError: See `segment`.
        """
        with self._one_at_a_time:  # an engine has one set of buffers
            return self._pipeline.submit(staged, progress, on_device)

    def segment(
        self, volume: Volume, progress: Progress | None = None, on_device: bool = False
    ) -> Segmentation:
        """Segment one volume.

        Args:
            volume: Channels in the bundle's order, any orientation. Arrays on the GPU (PyCUDA,
                CuPy, torch, numba) must be contiguous int16 or float32; they are not copied to
                the host, and not checked for their background or for equal channels.
            progress: Callback that receives the fraction of the work done, 0 to 1.
            on_device: Whether the labels stay on the GPU, as a `DeviceArray`.

        Raises:
            ScanError: The number of channels is wrong.
            VolumeError: The channels are not finite arrays of one 3-D shape, or a channel is all
                zero, is constant, has a non-zero background where the model requires 0, or
                equals another.
            ConfigError: `on_device` is set, but the model runs on the CPU.
            BundleError: The number of classes of the network differs from the manifest.
            EngineError: The engine or the GPU failed.
        """
        return self.submit(self.stage(volume), progress, on_device).result()
