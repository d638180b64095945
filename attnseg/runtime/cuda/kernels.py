"""The kernels' arguments, and their compilation by NVRTC.

Each structure has the layout of the struct of the same name in `kernels.cu`. Cubins are kept in the
user's cache folder by GPU, compiler and source; a file that is damaged or cannot be written costs a
compilation, nothing else.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from attnseg.runtime.errors import EngineError, NotHereError
from attnseg.runtime.tta import Transform
from attnseg.runtime.windows import WindowPlan

SOURCE = Path(__file__).with_name("kernels.cu")
MOST_CLASSES = 32
_DIGEST_BYTES = 32
MOST_INDICES = (1 << 32) - 1
"""Of one launch."""


class Shape(ctypes.Structure):
    """Voxels along X, Y and Z."""

    _fields_ = (("x", ctypes.c_int), ("y", ctypes.c_int), ("z", ctypes.c_int))

    @classmethod
    def of(cls, values: Sequence[int]) -> Shape:
        """From three numbers."""
        x, y, z = values
        return cls(x, y, z)


class Strided(ctypes.Structure):
    """How a volume lies in memory: first element, and steps along X, Y and Z, in elements."""

    _fields_ = tuple((name, ctypes.c_longlong) for name in ("offset", "x", "y", "z"))


class Turn(ctypes.Structure):
    """A transform of `attnseg.runtime.tta`."""

    _fields_ = (("axes", ctypes.c_int * 3), ("flips", ctypes.c_int * 3))

    @classmethod
    def of(cls, transform: Transform) -> Turn:
        """From a transform."""
        flips = [int(axis in transform.flips) for axis in range(3)]
        return cls((ctypes.c_int * 3)(*transform.axes), (ctypes.c_int * 3)(*flips))


def _fields(pointers: str, shapes: str, *rest: tuple[str, Any]) -> tuple[tuple[str, Any], ...]:
    return (
        *((name, ctypes.c_void_p) for name in pointers.split()),
        *((name, Shape) for name in shapes.split()),
        *rest,
    )


class Tiling(ctypes.Structure):
    """A window plan of `attnseg.runtime.windows`."""

    _fields_ = tuple((name, Shape) for name in ("window", "count", "stride", "last", "pad"))

    @classmethod
    def of(cls, plan: WindowPlan) -> Tiling:
        """From a plan."""
        starts = [sorted({w.start[axis] for w in plan.windows}) for axis in range(3)]
        return cls(
            Shape.of(plan.window),
            Shape.of([len(along) for along in starts]),
            Shape.of([along[1] if len(along) > 1 else 1 for along in starts]),
            Shape.of([along[-1] for along in starts]),
            Shape.of(plan.pad_before),
        )


def _ints(names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, ctypes.c_int) for name in names.split())


class ScanArgs(ctypes.Structure):
    """Of kernels `scan` and `scan_float`; one index per voxel, in the order of memory."""

    _fields_ = _fields("volume counts box", "shape", ("turn", Turn))


class RefineArgs(ctypes.Structure):
    """Of kernel `refine`; one index per voxel, in the order of memory."""

    _fields_ = _fields("volume chosen counts", "")


class MomentArgs(ctypes.Structure):
    """Of kernel `moment`; one index per lane."""

    _fields_ = (
        *_fields("volume sums", ""),
        ("mean", ctypes.c_double),
        ("voxels", ctypes.c_longlong),
        *_ints("lanes squared"),
    )


class NormaliseArgs(ctypes.Structure):
    """Of kernel `normalise`; one index per voxel of the box."""

    _fields_ = (
        *_fields("volume table image", ""),
        ("layout", Strided),
        ("shape", Shape),
        ("origin", Shape),
    )


class NormaliseFloatArgs(ctypes.Structure):
    """Of kernel `normalise_float`; one index per voxel of the box."""

    _fields_ = (
        *_fields("volume knots image", ""),
        ("layout", Strided),
        ("shape", Shape),
        ("origin", Shape),
        *_ints("count keep_zero"),
    )


class OccupyArgs(ctypes.Structure):
    """Of kernel `occupy`; one index per voxel of the image."""

    _fields_ = (
        *_fields("image occupied", "shape"),
        ("tiling", Tiling),
        ("turn", Turn),
        *_ints("channels"),
    )


class GatherArgs(ctypes.Structure):
    """Of kernel `gather`; one index per element of the batch."""

    _fields_ = (
        *_fields("image batch windows", "shape"),
        ("tiling", Tiling),
        ("turn", Turn),
        *_ints("channels half"),
    )


class NarrowArgs(ctypes.Structure):
    """Of kernel `narrow`; one index per logit."""

    _fields_ = _fields("logits kept", "")


class BlendArgs(ctypes.Structure):
    """Of kernel `blend`; one index per voxel of the image."""

    _fields_ = (
        *_fields("logits importance places blended scores classes not_finite", "shape"),
        ("tiling", Tiling),
        ("turn", Turn),
        *_ints("count half vote first last"),
    )


LABELLING = ("label_start", "label_merge", "label_flatten", "label_count", "label_remove")
"""Kernels of components, in their order."""


class LabelArgs(ctypes.Structure):
    """Of the five kernels of components, one index per voxel."""

    _fields_ = _fields("classes parents sizes removed", "shape", ("min_voxels", ctypes.c_int))


class PasteArgs(ctypes.Structure):
    """Of kernel `paste`; one index per voxel of the box."""

    _fields_ = (
        *_fields("classes labels counts", ""),
        ("layout", Strided),
        ("shape", Shape),
        ("origin", Shape),
        ("values", ctypes.c_ubyte * MOST_CLASSES),
    )


ARGUMENTS: dict[str, type[ctypes.Structure]] = {
    "scan": ScanArgs,
    "scan_float": ScanArgs,
    "refine": RefineArgs,
    "moment": MomentArgs,
    "normalise": NormaliseArgs,
    "normalise_float": NormaliseFloatArgs,
    "occupy": OccupyArgs,
    "gather": GatherArgs,
    "narrow": NarrowArgs,
    "blend": BlendArgs,
    "label_start": LabelArgs,
    "label_merge": LabelArgs,
    "label_flatten": LabelArgs,
    "label_count": LabelArgs,
    "label_remove": LabelArgs,
    "paste": PasteArgs,
}
"""Every kernel, and the structure that it takes."""


def compiler_version() -> tuple[int, int]:
    """Version of NVRTC.

    Raises:
        NotHereError: it is not installed.
    """
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # a missing package or library; they share no base
        raise NotHereError("NVRTC is not installed; pip install 'attnseg[gpu]'") from error
    return int(major), int(minor)


def compile_kernels(target: str) -> bytes:
    """Compile `kernels.cu` for a compute capability, with or without a GPU.

    Args:
        target: `sm86`.

    Returns:
        The cubin.

    Raises:
        EngineError: cuda-core or NVRTC is missing, or does not know the target.
    """
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise EngineError("cuda-core is not installed; pip install 'attnseg[gpu]'") from error
    options = ProgramOptions(arch=f"sm_{target[2:]}", fma=False, std="c++17")
    try:
        compiled = Program(SOURCE.read_text(), "c++", options).compile("cubin")
        return bytes(compiled.code)
    except Exception as error:  # cuda-core's errors share no base but Exception
        reason = " ".join(str(error).split())[:300]
        raise EngineError(
            f"NVRTC cannot compile the kernels for {target}: {reason}; pip install "
            "'attnseg[gpu]', or use --device cpu"
        ) from error


def cached_kernels(target: str, folder: Path) -> bytes:
    """The cubin for a target, from the cache folder or compiled and kept there.

    Two processes may fill the cache at once: each writes a file of its own and renames it.

    Raises:
        EngineError: as `compile_kernels`.
    """
    compiler = importlib.metadata.version("cuda-core")
    source = hashlib.sha256(SOURCE.read_bytes() + compiler.encode()).hexdigest()[:16]
    file = folder / f"kernels-{target}-{source}.cubin"
    with suppress(OSError):
        stored = file.read_bytes()
        digest, cubin = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
        if cubin and hashlib.sha256(cubin).digest() == digest:
            return cubin
    cubin = compile_kernels(target)
    part = file.with_name(f"{file.name}.{os.getpid()}.{threading.get_ident()}.part")
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        part.write_bytes(hashlib.sha256(cubin).digest() + cubin)
        os.replace(part, file)
    with suppress(OSError):
        part.unlink(missing_ok=True)
    return cubin
