"""Options of a segmentation, and the plan that combines them with a model's defaults.

`resolve` validates and completes the options. All later steps use the frozen plan.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args

from attnseg.runtime.engines.select import EngineRequest
from attnseg.runtime.errors import ConfigError, Setting
from attnseg.runtime.geometry import AxisTransform, Shape, along_axes
from attnseg.runtime.model.manifest import ModelRecord
from attnseg.runtime.steps.check import InputRules, Resample
from attnseg.runtime.steps.decide import Decide, Decision
from attnseg.runtime.steps.preprocess import Preprocessing
from attnseg.runtime.steps.tta import PASSES, Fuse, passes_of
from attnseg.runtime.steps.windows import LARGEST_WINDOW, Blending, EmptyWindows, WindowOptions
from attnseg.runtime.task import Task

_MOST_THREADS = 1024


@dataclass(frozen=True)
class SegmentOptions:
    """Options of a segmentation. None selects the model's default unless stated otherwise.

    Attributes:
        engine: `auto` for the fastest engine available, or `tensorrt`, `tensorrt-rtx`,
            `onnxruntime-cuda`, `openvino`, `onnxruntime`.
        precision: `auto` for the engine's fastest precision, or `fp16`, `bf16`, `fp32`, `int8`.
        tta: Test-time augmentation: `none`, `paper` (identity, mirror, quarter turn), `mirror8`, or
            `model` for the mirror axes of the model, whose logits are averaged in each window.
        fuse: Fusion of the passes: majority `vote`, or `mean` of the probabilities; None for the
            vote where each voxel has one label, and the mean where regions may overlap.
        decide: Decision of a voxel: the `argmax` of the labels, or a `threshold` of 0.5 on the
            probability of each region.
        probabilities: Whether the result has the probability of each region.
        window: Edge length of the cubic window in voxels, or `full` for one window over the box.
        overlap: Overlap of neighbouring windows as a fraction of the window, 0 <= overlap < 1.
        mirror_axes: Some of the model's mirror axes, 0 to 2, for `tta` of `model`.
        empty_windows: Whether windows of zeros are background (`skip`), or are `run`.
        min_voxels: Minimum size of a component, in voxels; smaller ones are removed.
        threads: Number of CPU threads; None for all CPUs available to this process.
        device: `cuda` for a GPU, `cpu`, or `auto` for a GPU if one can run the model.
        max_memory_bytes: Limit of device memory in bytes; None for no limit.
        fallback: `cpu` to continue on the CPU when the GPU fails; None to report cases as failed.
        stream: Handle of the caller's CUDA stream, on which GPU work is enqueued; None for a new
            stream.
        resample: `auto` to resample scans whose voxel size is not the model's, or `never` to
            refuse them.
        strict: Whether warnings about a scan are errors.
        skull_strip: Bundle of a model that finds the brain; voxels outside it are set to 0 in all
            channels before the scan is checked. None for scans that are skull-stripped.
    """

    engine: str = "auto"
    precision: str = "auto"
    tta: str | None = None
    fuse: Fuse | None = None
    decide: Decide | None = None
    probabilities: bool = False
    window: int | Literal["full"] | None = None
    overlap: float | None = None
    mirror_axes: tuple[int, ...] | None = None
    empty_windows: EmptyWindows | None = None
    min_voxels: int | None = None
    threads: int | None = None
    device: str = "auto"
    max_memory_bytes: int | None = None
    fallback: Literal["cpu"] | None = None
    stream: int | None = None
    resample: Resample = "auto"
    strict: bool = False
    skull_strip: Path | None = None


@dataclass(frozen=True)
class Plan:
    """All settings of a segmentation, with every value resolved.

    Attributes:
        rules: Requirements of the model on its input.
        windows: Size, placement, weights, mirror images and sums of the windows.
        tta: Name of the test-time augmentation scheme.
        fuse: Fusion of the passes.
        decision: Decision of a voxel.
        probabilities: Whether the result has the probability of each region.
        min_voxels: Minimum size of a component, in voxels; smaller ones are removed.
        engine: Requested engine, precision and device, and resource limits.
        fallback: `cpu` to continue on the CPU when the GPU fails; None to report an error.
        notes: Warnings about the engine, which apply to every result.
        skull_strip: SHA-256 of the manifest of the model that finds the brain; empty for none.
    """

    rules: InputRules
    windows: WindowOptions
    tta: str
    fuse: Fuse
    decision: Decision
    probabilities: bool
    min_voxels: int
    engine: EngineRequest
    fallback: Literal["cpu"] | None
    notes: tuple[str, ...] = ()
    skull_strip: str = ""

    @property
    def task(self) -> Task:
        """Channels, labels and regions of the model."""
        return self.rules.task

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing of the model."""
        return self.rules.preprocessing

    @property
    def transforms(self) -> tuple[AxisTransform, ...]:
        """Image transform of each test-time pass."""
        return passes_of(self.tta, self.preprocessing.axes)

    @property
    def threads(self) -> int:
        """Number of CPU threads."""
        return self.engine.threads

    def settings(self) -> dict[str, Any]:
        """Settings, besides model and engine, that the result depends on, for a report."""
        window, blending = self.windows.window, self.windows.blending
        return {
            "tta": self.tta,
            "fuse": self.fuse,
            "window": list(window) if window else "full",
            "overlap": self.windows.overlap,
            **({"mirror_axes": list(blending.mirror_axes)} if self.tta == "model" else {}),
            "empty_windows": blending.empty_windows,
            "min_voxels": self.min_voxels,
            "resample": self.rules.resample,
            **({"decide": "threshold"} if self.decision != Decision.of(self.task) else {}),
            **({"probabilities": True} if self.probabilities else {}),
            **({"skull_strip": self.skull_strip} if self.skull_strip else {}),
        }


def available_threads() -> int:
    """Number of CPUs available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check(name: str, value: object, holds: bool, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {rule}, got {value!r}")


def _is(kind: type, value: object) -> bool:
    """Whether a value is a number of a kind; a truth value is none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    _check(name, value, _is(Integral, value), "a whole number")
    _check(name, value, value >= least, f"at least {least}")
    _check(name, value, most is None or value <= most, f"at most {most}")


def _choose(name: str, value: object, known: tuple[str | None, ...]) -> None:
    if value not in known:
        names = (choice for choice in known if choice is not None)
        raise ConfigError(f"{name} {value} does not exist", f"choose {', '.join(names)}")


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _check_fusion(fuse: str, tta: str, decision: Decision, probabilities: bool) -> None:
    """Refuse a vote where the result is not one label per voxel and pass."""
    _choose("fuse", fuse, get_args(Fuse))
    if fuse == "mean" or len(PASSES.get(tta, ())) < 2:
        return
    reason = "the result has probabilities" if probabilities else "regions have thresholds"
    if probabilities or decision.outputs:
        raise ConfigError(
            f"a vote counts one label per voxel and pass, and {reason}",
            "leave {} out",
            Setting("fuse"),
        )


def _mirror_axes(options: SegmentOptions, tta: str, allowed: tuple[int, ...]) -> tuple[int, ...]:
    """Axes along which windows are mirrored."""
    axes = options.mirror_axes
    if axes is None:
        return allowed if tta == "model" else ()
    if tta != "model":
        raise ConfigError(
            f"mirror axes are for the test-time augmentation of the model, not for {tta}",
            "leave {} out",
            Setting("mirror_axes"),
        )
    whole = isinstance(axes, list | tuple) and all(_is(Integral, axis) for axis in axes)
    distinct = whole and len(set(axes)) == len(axes) and set(axes) <= set(allowed)
    _check("mirror_axes", axes, distinct, f"some of the model's, {allowed}")
    return tuple(sorted(axes))


def _window(edge: Any, default: Shape, multiples: Shape) -> Shape | None:
    """Window shape in voxels along X, Y and Z; None for one window over the whole image."""
    if edge is None:
        return default
    if edge == "full":
        return None
    multiple = math.lcm(*multiples)
    fits = _is(Integral, edge) and int(edge) > 0 and int(edge) % multiple == 0
    _check("window", edge, fits, f"full or a multiple of {multiple} voxels")
    size = int(edge)
    most = round(LARGEST_WINDOW ** (1 / 3))
    _check("window", edge, size <= most, f"at most {most} voxels, or full")
    return size, size, size


def resolve(options: SegmentOptions, model: ModelRecord) -> Plan:
    """Validate options and complete them with a model's defaults.

    Raises:
        ConfigError: An option has an invalid value.
    """
    defaults = model.inference
    overlap = defaults.overlap if options.overlap is None else options.overlap
    min_voxels = defaults.min_voxels if options.min_voxels is None else options.min_voxels
    threads = available_threads() if options.threads is None else options.threads
    memory = options.max_memory_bytes
    _check("overlap", overlap, _is(Real, overlap), "a number")
    _check("overlap", overlap, 0 <= overlap < 1, "at least 0 and below 1")
    _check_whole("min_voxels", min_voxels, 0)
    _check_whole("threads", threads, 1, _MOST_THREADS)
    if memory is not None:
        _check_whole("max_memory_bytes", memory, 1)
    if options.stream is not None:
        _check_whole("stream", options.stream, 0)
    _check("fallback", options.fallback, options.fallback in (None, "cpu"), "cpu, or left out")
    mirrored = bool(defaults.mirror_axes) or options.mirror_axes is not None
    tta = options.tta or ("model" if mirrored else "none")
    _choose("tta", tta, (*PASSES, "model"))
    _choose("empty_windows", options.empty_windows, (None, *get_args(EmptyWindows)))
    _choose("decide", options.decide, (None, *get_args(Decide)))
    _check("probabilities", options.probabilities, _is_bool(options.probabilities), "true or false")
    if options.probabilities and not model.task.regions:
        raise ConfigError(
            "probabilities are those of regions, and the model has none",
            "leave {} out",
            Setting("probabilities"),
        )
    decision = Decision.of(model.task, options.decide)
    fuse = options.fuse or ("mean" if decision.outputs or options.probabilities else "vote")
    _check_fusion(fuse, tta, decision, options.probabilities)
    _choose("resample", options.resample, get_args(Resample))
    window = _window(options.window, defaults.window, along_axes(defaults.window_multiple))
    engine = EngineRequest(
        engine=options.engine,
        precision=options.precision,
        device=options.device,
        window=window,
        threads=threads,
        max_memory_bytes=memory,
        stream=options.stream,
    )
    return Plan(
        rules=InputRules(
            task=model.task,
            preprocessing=model.preprocessing,
            spacing_mm=model.spacing_mm,
            foreground_ml=model.foreground_ml,
            resample=options.resample,
            strict=options.strict,
        ),
        windows=WindowOptions(
            window=window,
            overlap=overlap,
            window_multiple=defaults.window_multiple,
            placement=defaults.placement,
            blending=Blending(
                weights=defaults.weights,
                mirror_axes=_mirror_axes(options, tta, defaults.mirror_axes),
                accumulate=defaults.accumulate,
                empty_windows=options.empty_windows or defaults.empty_windows,
            ),
        ),
        tta=tta,
        fuse=fuse,
        decision=decision,
        probabilities=options.probabilities,
        min_voxels=min_voxels,
        engine=engine,
        fallback=options.fallback,
    )
