"""Which engine runs a bundle: the fastest that this machine can run, and why not the others.

The order is: an engine of the bundle that was built for this GPU by TensorRT, by TensorRT-RTX, then
ONNX Runtime on the GPU, then the processor. What runs on a GPU is first run on the bundle's golden
window, and is refused unless it gives what the trained network gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from attnseg.runtime.bundle import Bundle, FileEntry
from attnseg.runtime.cuda.cuda_device import CudaDevice
from attnseg.runtime.cuda.device import Device
from attnseg.runtime.engines import cpu
from attnseg.runtime.engines.base import Engine
from attnseg.runtime.engines.onnxruntime import open_onnxruntime_cuda
from attnseg.runtime.engines.tensorrt import open_tensorrt
from attnseg.runtime.errors import BundleError, ConfigError, EngineError, MismatchError
from attnseg.runtime.golden import read_golden
from attnseg.runtime.windows import Shape

GPU_PRECISIONS = {
    "tensorrt": ("fp16", "int8", "fp32"),
    "tensorrt-rtx": ("fp16", "int8", "fp32"),
    "onnxruntime-cuda": ("fp16", "fp32"),
}
"""Engines for a GPU, the fastest first, and the precisions that they have."""

NAMES = (*GPU_PRECISIONS, *cpu.ENGINES)
PRECISIONS = ("auto", "fp16", "bf16", "fp32", "int8")
DEVICES = ("auto", "cuda", "cpu")

# Shares of the largest logit. Simulated fp16 is at 1e-3 for the shipped model; fp32 on a GPU adds
# up in another order. More than this is another network, or a broken one.
GOLDEN_TOLERANCE = {"fp32": 5e-3, "fp16": 2e-2, "int8": 0.2}


@dataclass(frozen=True)
class EngineRequest:
    """What is asked for.

    Attributes:
        name: `auto` or one of `NAMES`.
        precision: `auto` or one of `PRECISIONS`.
        window: along X, Y, Z in voxels that it must take; None for any size.
        threads: of the processor that it may use.
        device: `cuda` for a GPU, `cpu`, or `auto` for either.
        limit_bytes: device memory that a library may take for weights and activations where it
            allocates as it runs; 0 for any.
        open_device: opens the GPU, the same one each time.
    """

    name: str = "auto"
    precision: str = "auto"
    window: Shape | None = None
    threads: int = 1
    device: str = "auto"
    limit_bytes: int = 0
    open_device: Callable[[], Device] = field(default_factory=lambda: cache(CudaDevice))


@dataclass(frozen=True)
class Way:
    """One way to run a bundle: a file by an engine.

    Attributes:
        name: of the engine.
        file: of the bundle.
        precision: of the network, or `auto` where the engine chooses.
        open: opens the engine, or raises `EngineError`.
        brought: whether the file is an engine that was built for one kind of GPU.
    """

    name: str
    file: Path
    precision: str
    open: Callable[[], Engine]
    brought: bool = False


@dataclass(frozen=True)
class Refusal:
    """A way that does not work here, and why."""

    way: Way
    reason: str

    def __str__(self) -> str:
        return f"{self.way.name} ({self.way.file.name}): {self.reason}"


@dataclass(frozen=True)
class Chosen:
    """The engine that runs, the way it was opened, and the faster ways that were refused."""

    engine: Engine
    way: Way
    refusals: tuple[Refusal, ...]


def _check(request: EngineRequest) -> None:
    if request.name not in ("auto", *NAMES):
        raise EngineError(f"engine {request.name} does not exist; choose auto, {', '.join(NAMES)}")
    if request.precision not in PRECISIONS:
        raise EngineError(
            f"precision {request.precision} does not exist; choose {', '.join(PRECISIONS)}"
        )
    if request.device not in DEVICES:
        raise ConfigError(f"device {request.device} does not exist; choose {', '.join(DEVICES)}")
    own = "auto" if request.name == "auto" else "cuda" if request.name in GPU_PRECISIONS else "cpu"
    if own != "auto" and request.device not in ("auto", own):
        raise ConfigError(
            f"engine {request.name} runs on {own}, device {request.device} is asked for; leave one "
            "of them out"
        )


def _checked(bundle: Bundle, precision: str, engine: Engine) -> Engine:
    """The engine, if it gives on the golden window what the trained network gave."""
    if not bundle.has("golden"):
        raise EngineError("the bundle has no golden window to check it with; export it again")
    try:
        golden = read_golden(bundle)
    except BundleError as error:
        raise EngineError(str(error)) from error
    engine.infer(golden.image)
    logits = engine.infer(golden.image)  # from the second run on, engines repeat what they recorded
    difference = golden.difference(logits) if logits.shape == golden.logits.shape else np.inf
    if not difference <= GOLDEN_TOLERANCE[precision]:
        raise MismatchError(
            f"its logits on the golden window differ by {difference:.1e} of the largest from the "
            f"trained network's, more than {GOLDEN_TOLERANCE[precision]:g}; export the model again"
        )
    return engine


def _engine_file(bundle: Bundle, name: str, entry: FileEntry, request: EngineRequest) -> Way:
    build, file, precision = entry.engine, bundle.folder / name, str(entry.precision)
    assert build is not None, "the manifest has it for files of role engine"

    def open_it() -> Engine:
        engine = open_tensorrt(file, build, precision, request.window, request.open_device)
        return _checked(bundle, precision, engine)

    return Way(build.builder, file, precision, open_it, brought=True)


def _engine_files(bundle: Bundle, builder: str, request: EngineRequest) -> Iterator[Way]:
    for name, entry in bundle.manifest.files.items():
        if entry.engine and entry.engine.builder == builder:
            yield _engine_file(bundle, name, entry, request)


def _onnxruntime_cuda(bundle: Bundle, request: EngineRequest) -> Iterator[Way]:
    half = bundle.has("onnx", "fp16") and request.precision in ("auto", "fp16")
    precision = "fp16" if half else "fp32"
    file = bundle.file("onnx", "fp16" if half else "fp32")

    def open_it() -> Engine:
        engine = open_onnxruntime_cuda(file, precision, request.open_device, request.limit_bytes)
        return _checked(bundle, precision, engine)

    yield Way("onnxruntime-cuda", file, precision, open_it)


def _processor(bundle: Bundle, name: str, request: EngineRequest) -> Way:
    precision, threads = request.precision, request.threads
    has_int8 = bundle.has("onnx", "int8")
    file = bundle.file("onnx", "int8" if precision == "int8" and has_int8 else "fp32")

    def open_it() -> Engine:
        if precision == "int8" and not has_int8:
            raise EngineError("the bundle has no int8 graph; attnseg export --int8 makes one")
        if precision == "fp16":
            raise EngineError("processors run no fp16; use --precision bf16 or fp32")
        return cpu.open_engine(name, file, precision, threads)

    return Way(name, file, precision, open_it)


def ways(bundle: Bundle, request: EngineRequest) -> list[Way]:
    """Every way to run a bundle that fits a request, the fastest first, none of them tried.

    Raises:
        EngineError: the engine or the precision does not exist.
    """
    _check(request)
    found = [
        *_engine_files(bundle, "tensorrt", request),
        *_engine_files(bundle, "tensorrt-rtx", request),
        *_onnxruntime_cuda(bundle, request),
    ]
    found = [way for way in found if request.precision in ("auto", way.precision)]
    if request.device == "cpu":
        found.clear()
    if request.device != "cuda":
        found += [_processor(bundle, name, request) for name in cpu.ENGINES]
    return [way for way in found if request.name in ("auto", way.name)]


def _nothing(request: EngineRequest, refusals: list[Refusal]) -> EngineError:
    """Why there is no engine at all."""
    if request.device == "cuda" and refusals:
        reasons = dict.fromkeys(refusal.reason for refusal in refusals)
        return EngineError(f"device cuda: {'; '.join(reasons)}")
    if request.name == "auto" and request.device != "cuda":
        installed = [name for name, version in cpu.installed_engines().items() if version]
        if not installed:
            return EngineError(
                "no inference engine is installed; pip install 'attnseg[cpu]' brings "
                + " and ".join(cpu.ENGINES)
            )
        if request.precision != "fp16":  # else it is the GPU's reasons that matter
            refusals = [refusal for refusal in refusals if refusal.way.name in installed]
    if not refusals and request.name == "auto":  # on a GPU
        return EngineError(
            f"device cuda: the bundle has nothing to run in {request.precision}; leave --precision "
            "out, or export it with --fp16"
        )
    if not refusals and request.precision not in ("auto", *GPU_PRECISIONS[request.name]):
        return EngineError(
            f"engine {request.name} runs {', '.join(GPU_PRECISIONS[request.name])}, got precision "
            f"{request.precision}"
        )
    if not refusals:
        built = f" in {request.precision}" if request.precision != "auto" else ""
        return EngineError(
            f"the bundle has no file for engine {request.name}{built}; attnseg export makes one "
            "(--fp16, --builder, --target)"
        )
    return EngineError("; ".join(dict.fromkeys(refusal.reason for refusal in refusals)))


def choose_engine(bundle: Bundle, request: EngineRequest) -> Chosen:
    """Open the fastest engine that runs a bundle here.

    Raises:
        EngineError: none does, or the one asked for does not; it says why.
    """
    refusals: list[Refusal] = []
    for way in ways(bundle, request):
        try:
            return Chosen(way.open(), way, tuple(refusals))
        except EngineError as error:
            refusals.append(Refusal(way, str(error)))
    raise _nothing(request, refusals)
