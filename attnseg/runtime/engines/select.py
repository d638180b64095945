"""Selection of the fastest available engine for a bundle, with the reasons against faster ones.

The order is: engine files prebuilt for this GPU by TensorRT, then by TensorRT-RTX, ONNX Runtime on
the GPU, and the CPU engines. A GPU engine is first run on the bundle's golden window, and rejected
unless it reproduces the logits of the trained network.

CUDA and the GPU engines are imported only when a GPU engine is opened.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from attnseg.runtime.engines import cpu
from attnseg.runtime.engines.base import PRECISIONS, Engine
from attnseg.runtime.engines.cpu import CPU_ENGINES
from attnseg.runtime.errors import BundleError, ConfigError, EngineError, MismatchError, Setting
from attnseg.runtime.geometry import Shape
from attnseg.runtime.model.bundle import Bundle, BundleFile
from attnseg.runtime.model.golden import read_golden
from attnseg.runtime.model.verdict import over_budget

log = logging.getLogger(__name__)

GPU_ENGINES = {
    "tensorrt": ("fp16", "int8", "fp32"),
    "tensorrt-rtx": ("fp16", "int8", "fp32"),
    "onnxruntime-cuda": ("fp16", "fp32"),
}
"""GPU engines, fastest first, and their precisions."""

ENGINES = (*GPU_ENGINES, *CPU_ENGINES)
DEVICES = ("auto", "cuda", "cpu")

# Largest difference as a fraction of the largest logit. Simulated fp16 reaches 1e-3 for the shipped
# model; fp32 on a GPU sums in another order. A larger difference means a wrong or broken network.
GOLDEN_TOLERANCE = {"fp32": 5e-3, "fp16": 2e-2, "int8": 0.2}

_EXPORT_AGAIN = "export the model again"


@dataclass(frozen=True)
class EngineRequest:
    """Requested engine, and the resources that it may use.

    Attributes:
        engine: `auto` or one of `ENGINES`.
        precision: One of `PRECISIONS`.
        device: `cuda` for a GPU, `cpu`, or `auto` for either.
        window: Window in voxels along X, Y and Z that it must support; None for any size.
        threads: Number of CPU threads.
        max_memory_bytes: Limit of the total device memory; None for no limit.
        stream: Handle of the caller's CUDA stream; None for a stream of its own.

    Raises:
        ConfigError: An engine, precision or device does not exist, or they contradict each other.
    """

    engine: str = "auto"
    precision: str = "auto"
    device: str = "auto"
    window: Shape | None = None
    threads: int = 1
    max_memory_bytes: int | None = None
    stream: int | None = None

    def __post_init__(self) -> None:
        choices = {
            "engine": ("auto", *ENGINES),
            "precision": PRECISIONS,
            "device": DEVICES,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} {getattr(self, name)} does not exist", f"choose {', '.join(known)}"
                )
        if self.engine == "auto" or self.device == "auto":
            return
        own = "cuda" if self.engine in GPU_ENGINES else "cpu"
        if own != self.device:
            raise ConfigError(
                f"engine {self.engine} runs on {own}, device {self.device} is requested",
                "leave one of them out",
            )


@dataclass(frozen=True)
class Candidate:
    """One way to run a bundle: an engine, and the file that it runs.

    Attributes:
        engine: Name of the engine.
        file: File of the bundle.
        precision: Precision of the network, or `auto` where the engine chooses.
        open: Function that opens the engine; raises `EngineError` if it is unavailable.
        prebuilt: Whether the file is an engine that was built for one GPU type.
    """

    engine: str
    file: BundleFile
    precision: str
    open: Callable[[], Engine]
    prebuilt: bool = False


@dataclass(frozen=True)
class Refusal:
    """A candidate that is unavailable here, and why.

    Attributes:
        engine: Name of the engine.
        file: File of the bundle.
        prebuilt: Whether the file is an engine that was built for one GPU type.
        error: Reason; without a traceback, whose frames would keep the engine and its memory.
    """

    engine: str
    file: BundleFile
    prebuilt: bool
    error: EngineError

    def describe(self, show: Callable[[Setting], str] = str) -> str:
        """Engine, file and reason; `show` returns the text of a setting."""
        return f"{self.engine} ({self.file.name}): {self.error.describe(show)}"

    def __str__(self) -> str:
        return self.describe()


@dataclass(frozen=True)
class Selected:
    """An open engine, its candidate, and the faster candidates that were refused."""

    engine: Engine
    candidate: Candidate
    refusals: tuple[Refusal, ...]


def _check_golden(bundle: Bundle, precision: str, engine: Engine) -> Engine:
    """Return the engine if it reproduces the trained network's logits on the golden window."""
    if not bundle.has("golden"):
        raise EngineError("the bundle has no golden window to check it with", _EXPORT_AGAIN)
    try:
        golden = read_golden(bundle)
    except BundleError as error:
        raise EngineError(error.cause, error.mend, *error.settings) from error
    # A GPU engine may compute otherwise for another batch size: it is checked at that of volumes.
    largest, _ = getattr(engine, "batches", (1, 1))
    golden = golden.repeated(largest)
    engine.infer(golden.image)
    logits = engine.infer(golden.image)  # an engine may replay a recording from the second run on
    difference = golden.difference(logits) if logits.shape == golden.logits.shape else np.inf
    if not difference <= GOLDEN_TOLERANCE[precision]:
        raise MismatchError(
            f"its logits on the golden window differ by {difference:.1e} of the largest from the "
            f"trained network's, more than {GOLDEN_TOLERANCE[precision]:g}",
            _EXPORT_AGAIN,
        )
    return engine


def _device_opener(request: EngineRequest) -> Callable[[], Any]:
    """Function that opens the GPU on the first call, and returns the same device afterwards."""

    @cache
    def open_device() -> Any:
        from attnseg.runtime.cuda.cuda_device import CudaDevice

        return CudaDevice(request.stream)

    return open_device


def _prebuilt(
    bundle: Bundle, builder: str, request: EngineRequest, open_device: Callable[[], Any]
) -> Iterator[Candidate]:
    for file in bundle.files:
        if file.entry.engine and file.entry.engine.builder == builder:
            precision = str(file.entry.precision)

            def open_it(file: BundleFile = file, precision: str = precision) -> Engine:
                from attnseg.runtime.engines.tensorrt import open_tensorrt

                engine = open_tensorrt(file, file.entry, request.window, open_device)
                return _check_golden(bundle, precision, engine)

            yield Candidate(builder, file, precision, open_it, prebuilt=True)


def _onnxruntime_cuda(
    bundle: Bundle, request: EngineRequest, open_device: Callable[[], Any]
) -> Candidate:
    half = bundle.has("onnx", "fp16") and request.precision in ("auto", "fp16")
    precision = "fp16" if half else "fp32"
    file = bundle.file("onnx", "fp16" if half else "fp32")
    memory = request.max_memory_bytes
    own = None if memory is None else memory // 2  # the pipeline plans with the other half

    def open_it() -> Engine:
        from attnseg.runtime.engines.onnxruntime_cuda import open_onnxruntime_cuda

        engine = open_onnxruntime_cuda(file, precision, open_device, request.window, own)
        return _check_golden(bundle, precision, engine)

    return Candidate("onnxruntime-cuda", file, precision, open_it)


def _processor(bundle: Bundle, name: str, request: EngineRequest) -> Candidate:
    precision, threads = request.precision, request.threads
    if precision == "auto" and over_budget(bundle, name):
        precision = "fp32"
    has_int8 = bundle.has("onnx", "int8")
    file = bundle.file("onnx", "int8" if precision == "int8" and has_int8 else "fp32")

    def open_it() -> Engine:
        if precision == "int8" and not has_int8:
            raise EngineError(
                "the bundle has no int8 graph",
                f"{_EXPORT_AGAIN} with {{}}",
                Setting("int8", True),
            )
        if precision == "fp16":
            raise EngineError(
                "CPU engines do not run fp16",
                "use {} or {}",
                Setting("precision", "bf16"),
                Setting("precision", "fp32"),
            )
        return cpu.open_engine(name, file, precision, threads)

    return Candidate(name, file, precision, open_it)


def candidates(bundle: Bundle, request: EngineRequest) -> list[Candidate]:
    """Candidates of a bundle that match a request, fastest first; none is opened."""
    found: list[Candidate] = []
    if request.device != "cpu":
        open_device = _device_opener(request)
        found += _prebuilt(bundle, "tensorrt", request, open_device)
        found += _prebuilt(bundle, "tensorrt-rtx", request, open_device)
        found.append(_onnxruntime_cuda(bundle, request, open_device))
        found = [c for c in found if request.precision in ("auto", c.precision)]
    if request.device != "cuda":
        found += [_processor(bundle, name, request) for name in CPU_ENGINES]
    return [c for c in found if request.engine in ("auto", c.engine)]


def _joined(errors: Sequence[EngineError], prefix: str = "") -> EngineError:
    """Join errors into one that states each cause and mend once."""
    causes = dict.fromkeys(error.cause for error in errors)
    mends = dict.fromkeys((error.mend, error.settings) for error in errors if error.mend)
    settings = [setting for _, own in mends for setting in own]
    return EngineError(prefix + "; ".join(causes), "; ".join(m for m, _ in mends), *settings)


def _no_candidate(request: EngineRequest) -> EngineError:
    """Error for a bundle without a file for a request."""
    name, precision = request.engine, request.precision
    if name == "auto":  # and device is `cuda`
        return EngineError(
            f"device cuda: the bundle has nothing to run in {precision}",
            f"leave {{}} out, or {_EXPORT_AGAIN} with {{}}",
            Setting("precision"),
            Setting("fp16", True),
        )
    if name in GPU_ENGINES and precision not in ("auto", *GPU_ENGINES[name]):
        return EngineError(
            f"engine {name} runs {', '.join(GPU_ENGINES[name])}, got precision {precision}"
        )
    built = f" in {precision}" if precision != "auto" else ""
    settings = [Setting("int8" if precision == "int8" else "fp16", True)]
    if name == "tensorrt":
        settings.append(Setting("builder", name))
    return EngineError(
        f"the bundle has no file for engine {name}{built}",
        f"{_EXPORT_AGAIN} with {' and '.join('{}' for _ in settings)}",
        *settings,
    )


def _nothing_runs(request: EngineRequest, refusals: Sequence[Refusal]) -> EngineError:
    """Error that states why no engine can run a bundle on this machine."""
    errors = [refusal.error for refusal in refusals]
    if request.device == "cuda" and errors:
        return _joined(errors, "device cuda: ")
    if request.engine == "auto" and request.device != "cuda":
        installed = [name for name, version in cpu.installed_engines().items() if version]
        if not installed:
            return cpu.no_engine()
        if request.precision != "fp16":  # fp16 needs a GPU: report its reasons
            errors = [r.error for r in refusals if r.engine in installed]
    return _joined(errors) if errors else _no_candidate(request)


def select_engine(bundle: Bundle, request: EngineRequest) -> Selected:
    """Open the fastest engine available for a bundle on this machine.

    Raises:
        EngineError: No engine, or not the requested one, is available; the error states why.
    """
    refusals: list[Refusal] = []
    for candidate in candidates(bundle, request):
        try:
            return Selected(candidate.open(), candidate, tuple(refusals))
        except EngineError as error:
            found = (candidate.engine, candidate.file, candidate.prebuilt)
            refusals.append(Refusal(*found, error.detached()))
            log.debug("not available: %s", refusals[-1])
    raise _nothing_runs(request, refusals)
