"""Build of TensorRT engines, with TensorRT 10, TensorRT 11 or TensorRT-RTX.

TensorRT 11 takes the precision from the graph alone, 10 does so for strongly typed networks,
so an fp16 engine is built from an fp16 graph. TensorRT-RTX builds for any target without a GPU;
TensorRT requires the target GPU. An engine has one window and one batch size: TensorRT-RTX builds
are then reproducible byte for byte, which they are not for a range of sizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from attnseg.export.engines.checks import (
    check_engine_weights,
    check_inspected,
    fp32_layers,
    inspect_layers,
    is_fp16,
    weight_bytes,
)
from attnseg.export.graphs.graph import Graph
from attnseg.runtime.cuda.gpu import find_gpu
from attnseg.runtime.engines.device import usual_batch
from attnseg.runtime.engines.tensorrt import load_library
from attnseg.runtime.errors import ConfigError, EngineError, ExportError, Setting, UnavailableError
from attnseg.runtime.extras import install
from attnseg.runtime.files import write_file
from attnseg.runtime.geometry import Shape
from attnseg.runtime.model.manifest import EngineBuild

_NO_ENGINE = Setting("builder", "none")
_WITHOUT_ENGINE = "export with {} to do without an engine"

Builder = Literal["tensorrt", "tensorrt-rtx"]
BuildProgress = Callable[[str, int, int], None]
"""Called with the name of a build phase, its completed steps, and its total steps."""

TARGETS = {
    "rtx2080ti": "sm75",
    "a100": "sm80",
    "rtx3090": "sm86",
    "rtxa6000": "sm86",
    "rtx4090": "sm89",
    "l40s": "sm89",
    "rtx5090": "sm120",
    "dgx-spark": "sm121",
}
"""Compute capability by GPU name."""

PORTABLE_TARGET = "sm80"
"""Lowest compute capability that a portable engine runs on."""


@dataclass(frozen=True)
class BuildOptions:
    """Options of an engine build.

    Attributes:
        builder: Library that builds the engine.
        target: Compute capability, such as `sm86`.
        batch: Number of windows per call; None for `usual_batch` of the window.
        workspace_bytes: Largest scratch memory of a layer; None for no limit.
        compatibility: `same` for the target alone; `ampere+` for later GPUs as well. TensorRT-RTX
            then requires the target `sm80` and builds for all GPUs since Ampere.
        version_compatible: Whether the engine runs with later library versions (TensorRT only).
        timing_cache: Timing cache, read and updated (TensorRT only); later builds of a similar
            network then take seconds.
    """

    builder: Builder
    target: str
    batch: int | None = None
    workspace_bytes: int | None = None
    compatibility: Literal["same", "ampere+"] = "same"
    version_compatible: bool = False
    timing_cache: str | None = None


@dataclass(frozen=True)
class BuiltEngine:
    """Content of an engine file, its build record, and the builder's log."""

    content: bytes
    build: EngineBuild
    log: str


def _load_builder(builder: Builder) -> Any:
    """Import the builder's module. Raises `ExportError` if it is not installed."""
    try:
        return load_library(builder)
    except UnavailableError as error:
        extra = "tensorrt" if builder == "tensorrt" else "export"
        cause = f"builder {builder} is not installed"
        raise ExportError(cause, f"{install(extra)}, or give {{}}", _NO_ENGINE) from error


def parse_target(name: str, builder: Builder) -> str:
    """Parse a GPU or compute capability: `sm86` for `rtx3090`, `sm86` or `8.6`.

    Raises:
        ConfigError: The target is unknown, or not supported by TensorRT-RTX.
    """
    plain = re.sub(r"nvidia|geforce|[ _]", "", name.lower())
    digits = re.fullmatch(r"(?:sm)?(\d{1,2})\.?(\d)", plain)
    target = TARGETS.get(plain) or (f"sm{digits[1]}{digits[2]}" if digits else "")
    known = sorted(set(TARGETS.values()), key=lambda t: int(t[2:]))
    if not target or (builder == "tensorrt-rtx" and target not in known):
        raise ConfigError(
            f"target {name} is not known to {builder}",
            f"choose {', '.join(TARGETS)} or {', '.join(known)}",
        )
    return target


def _logger(trt: Any, lines: list[tuple[str, str]]) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            lines.append((severity.name, message))

    return Log()


def _monitor(trt: Any, progress: BuildProgress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, _: str | None, steps: int) -> None:
            self._steps[phase] = steps
            progress(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            progress(phase, step + 1, self._steps[phase])
            return True

        def phase_finish(self, phase: str) -> None:
            progress(phase, self._steps[phase], self._steps[phase])

    return Monitor()


def _errors(lines: list[tuple[str, str]]) -> str:
    found = [text for severity, text in lines if severity in ("ERROR", "INTERNAL_ERROR")]
    return " ".join(found[-1].split()) if found else "no reason given"


def _parse(trt: Any, network: Any, log: Any, content: bytes) -> None:
    parser = trt.OnnxParser(network, log)
    if parser.parse(content):
        return
    error = parser.get_error(parser.num_errors - 1)
    node = f" (operator {error.node_operator()}, node {error.node_name()})"
    raise ExportError(
        f"TensorRT refuses the graph: {' '.join(error.desc().split())}"
        f"{node if error.node_operator() else ''}",
        _WITHOUT_ENGINE,
        _NO_ENGINE,
    )


def _configure(trt: Any, builder: Any, network: Any, window: Shape, options: BuildOptions) -> Any:
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    image = network.get_input(0)
    shape = (options.batch or usual_batch(window), image.shape[1], *window)
    profile.set_shape(image.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 graphs compute in full fp32
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # TensorRT-RTX since 1.2
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # so that runs can be recorded
    if options.builder == "tensorrt-rtx":
        if options.compatibility == "ampere+":
            return config
        config.num_compute_capabilities = 1
        capability = getattr(trt.ComputeCapability, options.target.upper())
        config.set_compute_capability(capability, 0)
        return config
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for check_inspected
    if options.compatibility == "ampere+":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    return config


def _use_timings(config: Any, file: Path) -> Any:
    """Load a timing cache, or create one if the file is absent or from another GPU or version."""
    for known in (file.read_bytes() if file.exists() else b"", b""):
        cache = config.create_timing_cache(known)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    raise ExportError(
        f"{file}: TensorRT takes no timing cache here", "leave {} out", Setting("timing_cache")
    )


def _build_advice(reason: str) -> tuple[Any, ...]:
    """Remedy and settings of the error for a failed build."""
    if "workspace" in reason:
        return "give a larger {}", Setting("workspace_bytes")
    if "libnvinfer_lean" in reason:
        return "leave {} out, or install the lean runtime", Setting("version_compatible")
    if "FP32" in reason:
        return "this GPU needs {}", Setting("fp16", True)
    return _WITHOUT_ENGINE, _NO_ENGINE


def check_machine(options: BuildOptions) -> None:
    """Check that this machine can build an engine: TensorRT requires the target GPU.

    Raises:
        ConfigError: The GPU is missing, or not of the target type.
        ExportError: The library is not installed.
    """
    _load_builder(options.builder)
    if options.builder == "tensorrt-rtx":
        return
    target = options.target
    advice = "build there, or with {}", Setting("builder", "tensorrt-rtx")
    try:
        gpu = find_gpu()
    except EngineError as error:
        cause = f"tensorrt needs the GPU that it builds for: {error.cause}"
        raise ConfigError(cause, *advice) from error
    if gpu.target != target:
        raise ConfigError(
            f"tensorrt builds for the GPU it runs on, {gpu.target} ({gpu.name}), not for {target}",
            *advice,
        )


def check_options(options: BuildOptions) -> None:
    """Check options before anything is built.

    Raises:
        ConfigError: TensorRT-RTX does not support an option, or the timing cache's folder does
            not exist.
    """
    portable = (options.builder, options.compatibility) == ("tensorrt-rtx", "ampere+")
    if portable and options.target != PORTABLE_TARGET:
        raise ConfigError(
            "tensorrt-rtx builds for one target, or for all since Ampere",
            "leave {} out with {}",
            Setting("target"),
            Setting("compatibility", "ampere+"),
        )
    if options.builder == "tensorrt-rtx" and options.version_compatible:
        raise ConfigError(
            "tensorrt-rtx has no version compatibility", "give {}", Setting("builder", "tensorrt")
        )
    if options.timing_cache and not Path(options.timing_cache).absolute().parent.is_dir():
        raise ConfigError(f"{options.timing_cache}: its folder does not exist", "make it first")
    if options.builder == "tensorrt-rtx" and options.timing_cache:
        raise ConfigError(
            "tensorrt-rtx measures no kernels and takes no timing cache",
            "give {}",
            Setting("builder", "tensorrt"),
        )


def build_engine(
    graph: Graph,
    window: Shape,
    options: BuildOptions,
    in_fp32: tuple[str, ...] = (),
    progress: BuildProgress | None = None,
) -> BuiltEngine:
    """Build an engine from an ONNX graph.

    Args:
        graph: Graph with one input `(batch, C, x, y, z)`; the engine keeps its data types.
        window: Window size of the engine along X, Y and Z, in voxels.
        options: Options of the build.
        in_fp32: Names of the convolutions of an fp16 graph that are intentionally fp32.
        progress: Callback that receives the progress of each phase.

    Raises:
        ConfigError: The options contradict each other, or the target GPU is unavailable.
        ExportError: The library is not installed, rejects the graph, cannot build within the
            workspace, or builds in another precision than the graph's.
    """
    check_options(options)
    check_machine(options)
    trt = _load_builder(options.builder)
    lines: list[tuple[str, str]] = []
    log = _logger(trt, lines)
    builder = trt.Builder(log)
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    _parse(trt, network, log, graph.content)
    if is_fp16(graph):
        grown = sorted(set(fp32_layers(trt, network)) - set(in_fp32))
        if grown:
            raise ExportError(f"TensorRT reads {', '.join(grown[:3])} of the fp16 graph as fp32")
    config = _configure(trt, builder, network, window, options)
    timings = Path(options.timing_cache) if options.timing_cache is not None else None
    cache: Any = _use_timings(config, timings) if timings else None  # must outlive the build
    if progress:
        config.progress_monitor = monitor = _monitor(trt, progress)  # config holds no reference
    serialized = builder.build_serialized_network(network, config)
    if progress:
        del monitor
    if serialized is None:
        reason = _errors(lines)
        raise ExportError(
            f"{options.builder} could not build for {options.target}: {reason}",
            *_build_advice(reason),
        )
    if timings:
        write_file(timings, bytes(cache.serialize()))
    if options.builder == "tensorrt" and is_fp16(graph):
        report = inspect_layers(trt, log, serialized)
        if report is not None:
            check_inspected(report, in_fp32)
    text = "".join(f"{severity}: {message}\n" for severity, message in lines)
    batch = options.batch or usual_batch(window)
    if options.builder == "tensorrt-rtx" and batch > 1:
        # For several windows the compiler may add a constant as large as a channel of all of them,
        # so that weights are compared in an engine for one window, which takes half a second.
        build_engine(graph, window, replace(options, batch=1), in_fp32)
    elif batch == 1 and options.target != "sm75":  # which has no fp32, and pads its weights
        check_engine_weights(text, weight_bytes(graph))
    return BuiltEngine(
        bytes(serialized),
        EngineBuild(
            builder=options.builder,
            version=trt.__version__,
            target=options.target,
            compatibility=options.compatibility,
            version_compatible=options.version_compatible,
            window=window,
            batch=batch,
        ),
        text,
    )
