"""TensorRT 10 and 11 and TensorRT-RTX: one adapter, as their bindings agree.

An engine file has one window and one batch size. It runs on the device's stream, on memory of the
caller. What it does for one pair of addresses is recorded at the second time and repeated from then
on (a CUDA graph), which spares the launches of its some sixty kernels.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.bundle import EngineBuild
from attnseg.runtime.cuda.device import Device, Region
from attnseg.runtime.engines.base import EngineInfo
from attnseg.runtime.errors import EngineError, NotHereError
from attnseg.runtime.gpu import Gpu, capability, find_gpu
from attnseg.runtime.windows import Shape

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx_bindings"}
EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "gpu"}
_AMPERE = 80
_MOST_RECORDED = 256  # pairs of addresses; what comes after them runs without a record
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""What TensorRT-RTX builds for by name."""


def load_library(builder: str) -> Any:
    """The bindings' module.

    Raises:
        NotHereError: it is not installed, or its libraries do not load.
    """
    try:
        return importlib.import_module(MODULES[builder])
    except (ImportError, OSError) as error:
        raise NotHereError(
            f"{builder} is not installed; pip install 'attnseg[{EXTRAS[builder]}]'"
        ) from error


@cache
def _logger(builder: str) -> Any:
    """The one logger of a library: it keeps a pointer to the first that it is given, for ever."""
    trt = load_library(builder)

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.error = ""

        def log(self, severity: Any, message: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                self.error = " ".join(message.split())

    return Log()


def _runs_on(build: EngineBuild, gpu: Gpu) -> bool:
    if build.compatibility == "ampere+":
        return int(gpu.target[2:]) >= _AMPERE
    return gpu.target == build.target


def _advice(build: EngineBuild, gpu: Gpu) -> str:
    """The options that build for this GPU."""
    if build.builder == "tensorrt":
        return f"--builder tensorrt on {gpu.name}"
    known = gpu.target in RTX_TARGETS
    return f"--target {gpu.target}" if known else "--compatible ampere+"


def check_build(build: EngineBuild, version: str, gpu: Gpu, window: Shape | None) -> None:
    """Refuse an engine file that this machine or request does not fit.

    Args:
        build: of the file.
        version: of the library that is installed.
        gpu: of this machine.
        window: that is asked for; None for any size.

    Raises:
        NotHereError: it was built for another window, GPU or version; says what to do.
    """
    if window != build.window:
        asked = "x".join(map(str, window)) if window else "any size"
        raise NotHereError(
            f"engine takes windows of {'x'.join(map(str, build.window))}, {asked} is asked for; "
            "leave --window out or use a CPU engine"
        )
    if not _runs_on(build, gpu):
        raise NotHereError(
            f"engine was built for compute capability {capability(build.target)}, this GPU is "
            f"{gpu.capability}; run attnseg export {_advice(build, gpu)}"
        )
    same = build.version == version
    if build.version_compatible:
        same = [int(n) for n in build.version.split(".")[:2]] <= [
            int(n) for n in version.split(".")[:2]
        ]
    if not same:
        raise NotHereError(
            f"engine was built with {build.builder} {build.version}, installed is {version}; run "
            f"attnseg export --builder {build.builder} again, or pip install that version"
        )


def open_tensorrt(
    file: Path,
    build: EngineBuild,
    precision: str,
    window: Shape | None,
    open_device: Callable[[], Device],
) -> TensorRtEngine:
    """Open an engine file of a bundle on this machine's GPU.

    Args:
        file: the engine.
        build: what it was built for.
        precision: of its network.
        window: that it must take; None for any size.
        open_device: opens the GPU; called when the file fits it.

    Raises:
        EngineError: there is no GPU or no library, the file is for another one, or the library
            refuses it.
    """
    gpu = find_gpu()
    library = load_library(build.builder)
    check_build(build, library.__version__, gpu, window)
    return TensorRtEngine(file, build, precision, open_device(), library, _cache_file(file, build))


def _cache_file(file: Path, build: EngineBuild) -> Path | None:
    """Where TensorRT-RTX keeps the kernels that it compiled for an engine on this machine."""
    if build.builder != "tensorrt-rtx":
        return None
    from platformdirs import user_cache_path

    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return Path(user_cache_path("attnseg")) / f"{digest}-{build.version}.runtime-cache"


class TensorRtEngine:
    """Runs an engine file by TensorRT or TensorRT-RTX."""

    def __init__(
        self,
        file: Path,
        build: EngineBuild,
        precision: str,
        device: Device,
        library: Any,
        cache_file: Path | None = None,
    ) -> None:
        """Load the file on a device.

        Args:
            file: the engine.
            build: what it takes.
            precision: of its network.
            device: where it runs.
            library: `tensorrt` or `tensorrt_rtx_bindings`.
            cache_file: for what TensorRT-RTX compiles at the first run; None for no cache.

        Raises:
            EngineError: the library refuses the file, or it is not of one input and one output.
        """
        self._file, self._device, self._library = file, device, library
        self._log = _logger(build.builder)
        self._cache_file = cache_file
        self._cache: Any = None  # the context uses it as long as it lives
        self._kept = False
        self.info = EngineInfo(build.builder, library.__version__, precision, device.name)
        self.batches = (build.batch, build.batch)
        self._own: list[Region] = []  # memory of `infer`
        self._recorded: dict[tuple[int, int], Callable[[], None] | None] = {}
        self._log.error = ""
        try:
            with device.active():
                self._load(build)
        except EngineError:
            raise
        except Exception as error:  # the bindings' errors share no base but Exception
            raise EngineError(f"{file.name}: {self.info.name} does not start ({error})") from error

    def _load(self, build: EngineBuild) -> None:
        self._runtime = self._library.Runtime(self._log)  # must outlive the engine
        if build.version_compatible:  # such an engine carries TensorRT's lean runtime
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(self._file.read_bytes())
        if self._engine is None:
            raise self._failure("refuses it")
        self._context = self._create_context()
        if self._context is None:
            raise self._failure("cannot run it")
        self._connect(build)

    def _failure(self, what: str) -> EngineError:
        reason = self._log.error or "no reason given"
        return EngineError(f"{self._file.name}: {self.info.name} {what} ({reason})")

    def _create_context(self) -> Any:
        if self._cache_file is None:
            return self._engine.create_execution_context()
        self._config = config = self._engine.create_runtime_config()
        # The first run, on the golden window, must run the kernels that all later ones run.
        strategies = self._library.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        self._cache = config.create_runtime_cache()
        if self._cache_file.exists():
            # A cache of another driver or GPU is refused by the library and made anew.
            self._cache.deserialize(self._cache_file.read_bytes())
        config.set_runtime_cache(self._cache)
        return self._engine.create_execution_context(config)

    def _connect(self, build: EngineBuild) -> None:
        """Give the engine its window, and memory for input and output."""
        library, engine = self._library, self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        ends = {
            mode: [name for name in names if engine.get_tensor_mode(name) == mode]
            for mode in (library.TensorIOMode.INPUT, library.TensorIOMode.OUTPUT)
        }
        inputs, outputs = ends.values()
        if len(inputs) != 1 or len(outputs) != 1:
            raise EngineError(f"{self._file.name}: has not one input and one output")
        channels = engine.get_tensor_shape(inputs[0])[1]
        if not self._context.set_input_shape(inputs[0], (build.batch, channels, *build.window)):
            raise self._failure("does not take the window of the manifest")
        self._names = inputs[0], outputs[0]
        self._arrays = [self._host_array(name) for name in self._names]
        if self._arrays[0].dtype != self._arrays[1].dtype:
            raise EngineError(f"{self._file.name}: its input and output are not of one type")

    def _host_array(self, name: str) -> NDArray[Any]:
        types = {self._library.DataType.HALF: np.float16, self._library.DataType.FLOAT: np.float32}
        kind = types.get(self._engine.get_tensor_dtype(name))
        if kind is None:
            raise EngineError(f"{self._file.name}: its {name} is neither fp16 nor fp32")
        return np.zeros(tuple(self._context.get_tensor_shape(name)), kind)

    @property
    def device(self) -> Device:
        """See `attnseg.runtime.engines.base.DeviceEngine`."""
        return self._device

    @property
    def classes(self) -> int:
        """See `attnseg.runtime.engines.base.DeviceEngine`."""
        return int(self._arrays[1].shape[1])

    @property
    def half(self) -> bool:
        """See `attnseg.runtime.engines.base.DeviceEngine`."""
        return self._arrays[0].dtype == np.float16

    @property
    def memory_bytes(self) -> int:
        """Its activations, and its file, which is mostly weights."""
        return int(self._engine.device_memory_size_v2) + self._file.stat().st_size

    def _execute(self, images: int, logits: int, stream: int) -> None:
        for name, pointer in zip(self._names, (images, logits), strict=True):
            if not self._context.set_tensor_address(name, pointer):
                raise self._failure("does not take its memory")
        self._log.error = ""
        if not self._context.execute_async_v3(stream):
            raise self._failure("failed")

    def enqueue(self, images: Region, logits: Region, shape: Sequence[int]) -> None:
        """See `attnseg.runtime.engines.base.DeviceEngine.enqueue`."""
        if tuple(shape) != self._arrays[0].shape:
            raise self._refused(shape)
        key = images.pointer, logits.pointer
        if key not in self._recorded:  # the first run may set things up, and is not recorded
            if len(self._recorded) < _MOST_RECORDED:
                self._recorded[key] = None
            self._execute(*key, self._device.stream)
            return
        repeat = self._recorded[key]
        if repeat is None:
            repeat = self._device.recorded(lambda stream: self._execute(*key, stream))
            repeat = repeat or (lambda: self._execute(*key, self._device.stream))
            self._recorded[key] = repeat
        repeat()

    def _refused(self, shape: Sequence[int]) -> EngineError:
        return EngineError(
            f"{self.info.name} failed on a batch of shape {tuple(shape)} (the engine takes "
            f"{self._arrays[0].shape})"
        )

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `attnseg.runtime.engines.base.Engine.infer`."""
        image, logits = self._arrays
        if batch.shape[1:] != image.shape[1:]:
            raise self._refused(batch.shape)
        result = np.empty((len(batch), *logits.shape[1:]), np.float32)
        with self._device.active():
            regions = self._own = self._own or [
                Region.of(self._device.allocate(a.nbytes), 0, a.nbytes) for a in self._arrays
            ]
            for start in range(0, len(batch), len(image)):
                part = batch[start : start + len(image)]
                image[: len(part)] = part
                self._device.upload(image, regions[0])
                self.enqueue(regions[0], regions[1], image.shape)
                self._device.download(regions[1], logits)
                result[start : start + len(part)] = logits[: len(part)]
        self._keep_cache()
        return result

    def _keep_cache(self) -> None:
        """Write what was compiled, once; without a place for it the next start is slower only."""
        if self._cache is None or self._cache_file is None or self._kept:
            return
        self._kept = True
        part = self._cache_file.with_name(f"{self._cache_file.name}.{os.getpid()}.part")
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(bytes(self._cache.serialize()))
            os.replace(part, self._cache_file)
        except OSError:
            with suppress(OSError):
                part.unlink(missing_ok=True)
