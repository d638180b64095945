"""TensorRT engines: one builder for TensorRT 10, 11 and TensorRT-RTX.

TensorRT 11 takes the precision from the graph alone, 10 does so for strongly typed networks,
so an FP16 engine is built from an FP16 graph. TensorRT-RTX builds for a GPU that is not there;
TensorRT needs the GPU it builds for. An engine has one window and one batch size: TensorRT-RTX
then gives the same bytes each time, which with a range of sizes it does not.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from attnseg.runtime.bundle import EngineBuild
from attnseg.runtime.errors import ConfigError, EngineError, ExportError
from attnseg.runtime.gpu import find_gpu

Builder = Literal["tensorrt", "tensorrt-rtx"]
Progress = Callable[[str, int, int], None]
"""Told a phase of the build, steps done in it, and steps in all."""

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx_bindings"}
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "export"}

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
"""GPUs by the names that people use."""

PORTABLE_TARGET = "sm80"
"""First of the GPUs that a portable engine runs on."""

_WEIGHTS_SLACK = 1.25  # constants that the compiler adds
_PADDED_TO = 32  # channels: kernels take no fewer at a time


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    Attributes:
        builder: the library.
        target: compute capability, `sm86`.
        batch: windows at a time.
        workspace_bytes: scratch memory that a layer may use; None for no limit.
        compatibility: `ampere+` also runs on later GPUs than the target. TensorRT-RTX then takes
            no target but `sm80`: such an engine is its default, for all GPUs since Ampere.
        version_compatible: also runs with later versions of the library (TensorRT only).
        timing_cache: file of measured kernels, read and written (TensorRT only); the second build
            of a like network takes seconds.
    """

    builder: Builder
    target: str
    batch: int = 1
    workspace_bytes: int | None = None
    compatibility: Literal["same", "ampere+"] = "same"
    version_compatible: bool = False
    timing_cache: str | None = None


@dataclass(frozen=True)
class BuiltEngine:
    """An engine file, what built it, and the builder's log."""

    content: bytes
    build: EngineBuild
    log: str


def load_builder(builder: Builder) -> Any:
    """The library's module.

    Raises:
        ExportError: it is not installed.
    """
    try:
        return importlib.import_module(_MODULES[builder])
    except (ImportError, OSError) as error:
        raise ExportError(
            f"builder {builder} is not installed; pip install 'attnseg[{_EXTRAS[builder]}]' or "
            "give --builder none"
        ) from error


def parse_target(name: str, builder: Builder) -> str:
    """`sm86` for `rtx3090`, `sm86` or `8.6`.

    Raises:
        ConfigError: the target does not exist, or TensorRT-RTX cannot build for it.
    """
    plain = re.sub(r"nvidia|geforce|[ _]", "", name.lower())
    digits = re.fullmatch(r"(?:sm)?(\d{1,2})\.?(\d)", plain)
    target = TARGETS.get(plain) or (f"sm{digits[1]}{digits[2]}" if digits else "")
    known = sorted(set(TARGETS.values()), key=lambda t: int(t[2:]))
    if not target or (builder == "tensorrt-rtx" and target not in known):
        raise ConfigError(
            f"target {name} is not known to {builder}; choose {', '.join(TARGETS)} or "
            f"{', '.join(known)}"
        )
    return target


def _logger(trt: Any, lines: list[tuple[str, str]]) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            lines.append((severity.name, message))

    return Log()


def _monitor(trt: Any, progress: Progress) -> Any:
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
        f"{node if error.node_operator() else ''}; export with --builder none to do without engine"
    )


def _configure(
    trt: Any, builder: Any, network: Any, window: tuple[int, int, int], options: BuildOptions
) -> Any:
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    image = network.get_input(0)
    shape = (options.batch, image.shape[1], *window)
    profile.set_shape(image.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    config.clear_flag(trt.BuilderFlag.TF32)  # an fp32 graph is fp32
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
    """The timing cache of a file, or a new one where the file is another GPU's or version's."""
    for known in (file.read_bytes() if file.exists() else b"", b""):
        cache = config.create_timing_cache(known)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    raise ExportError(f"{file}: TensorRT takes no timing cache here; leave --timing-cache out")


def _keep_timings(cache: Any, file: Path) -> None:
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_bytes(bytes(cache.serialize()))
    os.replace(part, file)


def _layers(network: Any) -> Iterator[Any]:
    for index in range(network.num_layers):
        yield network.get_layer(index)


def _fp32_layers(trt: Any, network: Any) -> list[str]:
    """Names of the convolutions that take or give fp32, as TensorRT has read the graph."""
    kinds = (trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION)
    return [
        layer.name
        for layer in _layers(network)
        if layer.type in kinds
        and trt.DataType.FLOAT in (layer.get_input(0).dtype, layer.get_output(0).dtype)
    ]


def _is_fp16(content: bytes) -> bool:
    """Whether a graph holds fp16 weights, whatever its input's type."""
    graph = onnx.load_from_string(content).graph
    return any(i.data_type == TensorProto.FLOAT16 for i in graph.initializer)


def _padded_bytes(array: NDArray[Any]) -> int:
    """Room that weights `(out, in, x, y, z)` take with both counts of channels padded."""
    if array.ndim < 2:
        return array.nbytes
    channels = [-(-count // _PADDED_TO) * _PADDED_TO for count in array.shape[:2]]
    return int(math.prod((*channels, *array.shape[2:])) * array.itemsize)


def _weight_bytes(content: bytes) -> int:
    graph = onnx.load_from_string(content).graph
    return sum(_padded_bytes(numpy_helper.to_array(i)) for i in graph.initializer)


def check_engine_weights(log: str, graph_bytes: int) -> None:
    """Refuse an engine whose weights take more room than the graph's: it grew to fp32.

    Args:
        log: of the builder, which states the weights' size; if it does not, nothing is checked.
        graph_bytes: of the weights in the graph that the engine was built from, padded.

    Raises:
        ExportError: it did.
    """
    stated = re.findall(r"Total Weights Memory: (\d+) bytes", log)
    if stated and int(stated[-1]) > _WEIGHTS_SLACK * graph_bytes:
        raise ExportError(
            f"the engine holds {int(stated[-1]) / 1e6:.1f} MB of weights, its graph only "
            f"{graph_bytes / 1e6:.1f} MB: it was not built in the graph's precision"
        )


def _is_fp32(tensor: Any) -> bool:
    """Whether an inspected tensor is fp32: TensorRT 11 has `DataType`, 10 the format in words."""
    words = [str(tensor.get(name, "")) for name in ("DataType", "Format/Datatype", "Format")]
    return any(text == "Float" or "FP32" in text for text in words)


def check_inspected(report: str, in_fp32: Iterable[str]) -> None:
    """Refuse an fp16 engine whose layers, as TensorRT's inspector tells, convolve in fp32.

    Args:
        report: of the inspector, JSON.
        in_fp32: convolutions that are fp32 on purpose.

    Raises:
        ExportError: one takes and gives fp32.
    """
    layers = [layer for layer in json.loads(report).get("Layers", []) if isinstance(layer, dict)]
    grown = [
        str(layer.get("Name"))
        for layer in layers
        if "conv" in str(layer.get("LayerType")).lower()
        and all(_is_fp32(end[0]) for end in (layer.get("Inputs"), layer.get("Outputs")) if end)
        and not any(name in str(layer.get("Name")) for name in in_fp32)
    ]
    if grown:
        raise ExportError(f"the fp16 engine holds convolutions in fp32: {', '.join(grown[:3])}")


def _inspect(trt: Any, log: Any, content: Any) -> str | None:
    """What TensorRT tells of an engine's layers, or None where it cannot be loaded."""
    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = True  # of a version-compatible engine, just built here
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        return None
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _version_advice(options: BuildOptions, reason: str) -> str:
    if "workspace" in reason:
        return "give a larger --workspace"
    if "libnvinfer_lean" in reason:
        return "leave --version-compatible out, or install the lean runtime"
    if "FP32" in reason:
        return "this GPU needs --fp16"
    return "export with --builder none to do without engine"


def check_machine(options: BuildOptions) -> None:
    """Refuse what cannot be built on this machine: TensorRT builds on the GPU it builds for.

    Raises:
        ConfigError: the GPU is missing or another.
        ExportError: the library is missing.
    """
    load_builder(options.builder)
    if options.builder == "tensorrt-rtx":
        return
    target = options.target
    advice = "build there, or with --builder tensorrt-rtx"
    try:
        gpu = find_gpu()
    except EngineError as error:
        raise ConfigError(
            f"tensorrt needs the GPU that it builds for: {error}; {advice}"
        ) from error
    if gpu.target != target:
        raise ConfigError(
            f"tensorrt builds for the GPU it runs on, {gpu.target} ({gpu.name}), not for {target}; "
            + advice
        )


def check_options(options: BuildOptions) -> None:
    """Refuse what TensorRT-RTX cannot do before anything is built.

    Raises:
        ConfigError: an option is for TensorRT only.
    """
    portable = (options.builder, options.compatibility) == ("tensorrt-rtx", "ampere+")
    if portable and options.target != PORTABLE_TARGET:
        raise ConfigError(
            "tensorrt-rtx builds for one target or, with --compatible ampere+, for all since "
            "Ampere; leave --target out"
        )
    if options.builder == "tensorrt-rtx" and options.version_compatible:
        raise ConfigError("tensorrt-rtx has no version compatibility; give --builder tensorrt")
    if options.timing_cache and not Path(options.timing_cache).absolute().parent.is_dir():
        raise ConfigError(f"{options.timing_cache}: its folder does not exist; make it first")
    if options.builder == "tensorrt-rtx" and options.timing_cache:
        raise ConfigError("tensorrt-rtx measures no kernels; give --timing-cache with tensorrt")


def build_engine(
    content: bytes,
    window: tuple[int, int, int],
    options: BuildOptions,
    in_fp32: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> BuiltEngine:
    """Build an engine from an ONNX graph.

    Args:
        content: the graph, one input `(batch, C, x, y, z)`; its types are the engine's.
        window: of the engine along X, Y and Z, in voxels.
        options: what to build.
        in_fp32: convolutions of an fp16 graph that are fp32 on purpose.
        progress: told how far each phase is.

    Raises:
        ConfigError: the options contradict each other.
        ExportError: the library is missing, refuses the graph, cannot build within the
            workspace, or has not kept the graph's precision.
    """
    check_options(options)
    check_machine(options)
    trt = load_builder(options.builder)
    lines: list[tuple[str, str]] = []
    log = _logger(trt, lines)
    builder = trt.Builder(log)
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    _parse(trt, network, log, content)
    if _is_fp16(content):
        grown = sorted(set(_fp32_layers(trt, network)) - set(in_fp32))
        if grown:
            raise ExportError(f"TensorRT reads {', '.join(grown[:3])} of the fp16 graph as fp32")
    config = _configure(trt, builder, network, window, options)
    timings = Path(options.timing_cache) if options.timing_cache is not None else None
    cache = _use_timings(config, timings) if timings else None  # must outlive the build
    if progress:
        config.progress_monitor = monitor = _monitor(trt, progress)  # it is not kept alive
    serialized = builder.build_serialized_network(network, config)
    if progress:
        del monitor
    if serialized is None:
        reason = _errors(lines)
        raise ExportError(
            f"{options.builder} could not build for {options.target}: {reason}; "
            f"{_version_advice(options, reason)}"
        )
    if timings:
        _keep_timings(cache, timings)
    if options.builder == "tensorrt" and _is_fp16(content):
        report = _inspect(trt, log, serialized)
        if report is not None:
            check_inspected(report, in_fp32)
    text = "".join(f"{severity}: {message}\n" for severity, message in lines)
    if options.target != "sm75":  # has no fp32 3-D convolutions to grow to, and pads its weights
        check_engine_weights(text, _weight_bytes(content))
    return BuiltEngine(
        bytes(serialized),
        EngineBuild(
            builder=options.builder,
            version=trt.__version__,
            target=options.target,
            compatibility=options.compatibility,
            version_compatible=options.version_compatible,
            window=window,
            batch=options.batch,
        ),
        text,
    )
