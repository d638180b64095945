"""TensorRT 10, TensorRT 11 and TensorRT-RTX in one adapter, as their bindings are compatible.

An engine file has a fixed window and batch size. It runs on the device's stream, on memory of the
caller. The second run for a pair of input and output addresses is recorded as a CUDA graph and
replayed from then on, which saves launching about sixty kernels one by one. An engine whose work
cannot be recorded runs without a graph, and says why in `TensorRtEngine.recorded`.
"""

from __future__ import annotations

import importlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.cuda.device import Device, Region
from attnseg.runtime.cuda.gpu import Gpu, capability, find_gpu
from attnseg.runtime.engines.base import EngineInfo, ModelFile
from attnseg.runtime.errors import (
    AttnsegError,
    DeviceLostError,
    EngineError,
    OutOfMemoryError,
    Setting,
    UnavailableError,
)
from attnseg.runtime.extras import install
from attnseg.runtime.files import write_file
from attnseg.runtime.geometry import Shape
from attnseg.runtime.model.manifest import EngineBuild, FileEntry

LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx_bindings"}
EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "gpu"}
log = logging.getLogger(__name__)
_AMPERE = 80
_MOST_RECORDED = 256  # pairs of addresses; the one that was used longest ago is forgotten
RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""Compute capabilities that TensorRT-RTX can be told to build for."""


def load_library(builder: str) -> Any:
    """Import the Python bindings of a builder.

    Raises:
        UnavailableError: The bindings are not installed, or their libraries do not load.
    """
    try:
        return importlib.import_module(LIBRARIES[builder])
    except (ImportError, OSError) as error:
        raise UnavailableError(f"{builder} is not installed", install(EXTRAS[builder])) from error


@cache
def _logger(builder: str) -> Any:
    """The only logger of a library, which holds a pointer to its first logger until exit."""
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


def _rebuild(build: EngineBuild, gpu: Gpu) -> tuple[Setting, ...]:
    """Export settings that build an engine for this GPU."""
    if build.builder == "tensorrt":
        return (Setting("builder", "tensorrt"),)
    if gpu.target in RTX_TARGETS:
        return (Setting("target", gpu.target),)
    return (Setting("compatibility", "ampere+"),)


def check_build(build: EngineBuild, version: str, gpu: Gpu, window: Shape | None) -> None:
    """Check that an engine file fits this machine and the request.

    Args:
        build: Builder and target of the file.
        version: Version of the installed library.
        gpu: GPU of this machine.
        window: Requested window in voxels along X, Y and Z; None for any size.

    Raises:
        UnavailableError: The file was built for another window, GPU or version.
    """
    if window != build.window:
        asked = "x".join(map(str, window)) if window else "any size"
        raise UnavailableError(
            f"engine takes windows of {'x'.join(map(str, build.window))}, {asked} is requested",
            "leave {} out or use a CPU engine",
            Setting("window"),
        )
    if not _runs_on(build, gpu):
        raise UnavailableError(
            f"engine was built for compute capability {capability(build.target)}, this GPU is "
            f"{gpu.capability}",
            f"export the model on {gpu.name} with {{}}"
            if build.builder == "tensorrt"
            else "export the model with {}",
            *_rebuild(build, gpu),
        )
    same = build.version == version
    if build.version_compatible:
        same = [int(n) for n in build.version.split(".")[:2]] <= [
            int(n) for n in version.split(".")[:2]
        ]
    if not same:
        raise UnavailableError(
            f"engine was built with {build.builder} {build.version}, installed is {version}",
            "export the model again with {}, or pip install that version",
            Setting("builder", build.builder),
        )


def open_tensorrt(
    file: ModelFile, entry: FileEntry, window: Shape | None, open_device: Callable[[], Device]
) -> TensorRtEngine:
    """Open an engine file of a bundle on this machine's GPU.

    Args:
        file: Engine file.
        entry: Entry of the file in the manifest.
        window: Window in voxels along X, Y and Z that it must support; None for any size.
        open_device: Function that opens the GPU; called only if the file fits it.

    Raises:
        UnavailableError: There is no GPU or no library, the file was built for another one, or it
            is portable and the library does not run it on this GPU.
        EngineError: The library rejects a file that was built for this GPU.
    """
    gpu, build = find_gpu(), entry.engine
    assert build is not None, "the manifest has it for files of role engine"
    library = load_library(build.builder)
    check_build(build, library.__version__, gpu, window)
    device = open_device()
    try:
        return TensorRtEngine(
            file,
            build,
            str(entry.precision),
            device=device,
            library=library,
            cache_file=_cache_file(entry.sha256, build),
        )
    except (DeviceLostError, OutOfMemoryError):
        raise
    except EngineError as error:
        if build.target == gpu.target:
            raise
        # Only the library knows every GPU that a portable engine runs on.
        raise UnavailableError(
            f"{error.cause} on {gpu.name}, compute capability {gpu.capability}",
            "use {}",
            Setting("engine", "onnxruntime-cuda"),
        ) from error


def _cache_file(sha256: str, build: EngineBuild) -> Path | None:
    """Cache file for the kernels that TensorRT-RTX compiles for an engine; None for TensorRT."""
    if build.builder != "tensorrt-rtx":
        return None
    from platformdirs import user_cache_path

    return Path(user_cache_path("attnseg")) / f"{sha256[:16]}-{build.version}.runtime-cache"


class TensorRtEngine:
    """Runs an engine file with TensorRT or TensorRT-RTX."""

    def __init__(
        self,
        file: ModelFile,
        build: EngineBuild,
        precision: str,
        device: Device,
        library: Any,
        cache_file: Path | None = None,
    ) -> None:
        """Load the file on a device.

        Args:
            file: Engine file.
            build: Builder and target of the file.
            precision: Precision of the network.
            device: Device that runs it.
            library: Bindings, `tensorrt` or `tensorrt_rtx_bindings`.
            cache_file: Cache file for the kernels that TensorRT-RTX compiles in the first run; None
                for no cache.

        Raises:
            EngineError: The library rejects the file, or it does not have one input and one output.
            BundleError: The file does not match the checksum of its bundle.
        """
        self._file, self._device, self._library = file, device, library
        self._log = _logger(build.builder)
        self._cache_file = cache_file
        self._cache: Any = None  # must live as long as the context
        self._kept = False
        self.info = EngineInfo(build.builder, library.__version__, precision, device.name)
        self.batches = (build.batch, build.batch)
        self._own: list[Region] = []  # device memory of `infer`
        self._repeats: OrderedDict[tuple[int, int], Callable[[], None] | None] = OrderedDict()
        self.recorded = "not yet"
        self._log.error = ""
        try:
            with device.active():
                self._load(build)
        except AttnsegError:
            raise
        except Exception as error:  # the bindings' errors share no base but Exception
            raise EngineError(f"{file.name}: {self.info.name} does not start ({error})") from error

    def _load(self, build: EngineBuild) -> None:
        self._runtime = self._library.Runtime(self._log)  # must outlive the engine
        if build.version_compatible:  # such an engine carries TensorRT's lean runtime
            self._runtime.engine_host_code_allowed = True
        content = self._file.read_bytes()
        self._size_bytes = len(content)
        self._engine = self._runtime.deserialize_cuda_engine(content)
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
        # The first run, on the golden window, must use the same kernels as all later runs.
        strategies = self._library.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        self._cache = config.create_runtime_cache()
        if self._cache_file.exists():
            # The library rejects and recreates a cache of another driver or GPU.
            self._cache.deserialize(self._cache_file.read_bytes())
        config.set_runtime_cache(self._cache)
        return self._engine.create_execution_context(config)

    def _connect(self, build: EngineBuild) -> None:
        """Set the input shape, and allocate host arrays for input and output."""
        library, engine = self._library, self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        ends = {
            mode: [name for name in names if engine.get_tensor_mode(name) == mode]
            for mode in (library.TensorIOMode.INPUT, library.TensorIOMode.OUTPUT)
        }
        inputs, outputs = ends.values()
        if len(inputs) != 1 or len(outputs) != 1:
            raise EngineError(f"{self._file.name}: does not have one input and one output")
        channels = engine.get_tensor_shape(inputs[0])[1]
        if not self._context.set_input_shape(inputs[0], (build.batch, channels, *build.window)):
            raise self._failure("does not take the window of the manifest")
        self._names = inputs[0], outputs[0]
        self._arrays = [self._host_array(name) for name in self._names]
        if self._arrays[0].dtype != self._arrays[1].dtype:
            raise EngineError(f"{self._file.name}: its input and output differ in data type")

    def _host_array(self, name: str) -> NDArray[Any]:
        types = {self._library.DataType.HALF: np.float16, self._library.DataType.FLOAT: np.float32}
        kind = types.get(self._engine.get_tensor_dtype(name))
        if kind is None:
            raise EngineError(f"{self._file.name}: its {name} is neither fp16 nor fp32")
        return np.zeros(tuple(self._context.get_tensor_shape(name)), kind)

    @property
    def device(self) -> Device:
        """See `attnseg.runtime.engines.device.DeviceEngine`."""
        return self._device

    @property
    def classes(self) -> int:
        """See `attnseg.runtime.engines.device.DeviceEngine`."""
        return int(self._arrays[1].shape[1])

    @property
    def half(self) -> bool:
        """See `attnseg.runtime.engines.device.DeviceEngine`."""
        return self._arrays[0].dtype == np.float16

    @property
    def memory_bytes(self) -> int:
        """Size of the activations and of the engine file, which is mostly weights."""
        return int(self._engine.device_memory_size_v2) + self._size_bytes

    def _execute(self, images: int, logits: int, stream: int) -> None:
        for name, pointer in zip(self._names, (images, logits), strict=True):
            if not self._context.set_tensor_address(name, pointer):
                raise self._failure("does not take its memory")
        self._log.error = ""
        if not self._context.execute_async_v3(stream):
            raise self._failure("failed")

    def enqueue(self, images: Region, logits: Region, shape: Sequence[int]) -> None:
        """See `attnseg.runtime.engines.device.DeviceEngine.enqueue`."""
        if tuple(shape) != self._arrays[0].shape:
            raise self._refused(shape)
        key = images.pointer, logits.pointer
        seen = key in self._repeats  # the first run may initialise state; it is not recorded
        repeat = self._repeats.setdefault(key, None)
        self._repeats.move_to_end(key)
        if len(self._repeats) > _MOST_RECORDED:
            self._repeats.popitem(last=False)
        if repeat is None and seen and not self.recorded.startswith("no:"):
            repeat = self._repeats[key] = self._record(key)
        if repeat is None:
            self._execute(*key, self._device.stream)
        else:
            repeat()

    def _record(self, key: tuple[int, int]) -> Callable[[], None] | None:
        """Record the work for a pair of addresses; None, with a reason, if that is impossible."""
        capturable = getattr(self._context, "is_stream_capturable", None)  # of TensorRT-RTX
        if capturable and not capturable(self._device.stream):
            self.recorded = "no: TensorRT-RTX does not record this engine on this stream"
            return None
        try:
            repeat = self._device.recorded(lambda stream: self._execute(*key, stream))
        except (DeviceLostError, OutOfMemoryError):
            raise
        except EngineError as error:
            self.recorded = f"no: {error.cause}"
            log.warning("%s: runs without a CUDA graph (%s)", self._file.name, error.cause)
            return None
        self.recorded = "yes"
        return repeat

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
        """Write the compiled kernels, once; if that fails, only the next start is slower."""
        if self._cache is None or self._cache_file is None or self._kept:
            return
        self._kept = True
        with suppress(OSError):
            self._cache_file.parent.mkdir(parents=True, exist_ok=True)
            write_file(self._cache_file, bytes(self._cache.serialize()))
