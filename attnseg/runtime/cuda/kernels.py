"""Arguments of the kernels: each structure has the layout of its struct in `kernels.cu`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attnseg.runtime.geometry import AxisTransform, Layout
from attnseg.runtime.steps.decide import Decision
from attnseg.runtime.steps.resample import Quantity
from attnseg.runtime.steps.windows import WindowPlan

SOURCE = Path(__file__).with_name("kernels.cu")
MOST_CLASSES = 32
"""Largest number of classes, of channels of the logits, and of regions that the kernels support."""
MOST_INDICES = (1 << 32) - 1
"""Largest number of indices in one launch."""


class Extent(ctypes.Structure):
    """Voxels along X, Y and Z."""

    _fields_ = (("x", ctypes.c_int), ("y", ctypes.c_int), ("z", ctypes.c_int))

    @classmethod
    def of(cls, values: Sequence[int]) -> Extent:
        """Structure of three values along X, Y and Z."""
        x, y, z = values
        return cls(x, y, z)

    @classmethod
    def mirror(cls, axes: Sequence[int]) -> Extent:
        """Structure with 1 along each of some axes, and 0 along the others."""
        return cls.of([int(axis in axes) for axis in range(3)])


class LayoutArg(ctypes.Structure):
    """A layout of `attnseg.runtime.geometry`, in elements."""

    _fields_ = tuple((name, ctypes.c_longlong) for name in ("offset", "x", "y", "z"))

    @classmethod
    def of(cls, layout: Layout) -> LayoutArg:
        """Structure of a layout."""
        return cls(layout.offset, *layout.strides)


class TransformArg(ctypes.Structure):
    """An axis transform of `attnseg.runtime.geometry`."""

    _fields_ = (("axes", ctypes.c_int * 3), ("flips", ctypes.c_int * 3))

    @classmethod
    def of(cls, transform: AxisTransform) -> TransformArg:
        """Structure of a transform."""
        flips = [int(axis in transform.flips) for axis in range(3)]
        return cls((ctypes.c_int * 3)(*transform.axes), (ctypes.c_int * 3)(*flips))


def _fields(pointers: str, shapes: str, *rest: tuple[str, Any]) -> tuple[tuple[str, Any], ...]:
    return (
        *((name, ctypes.c_void_p) for name in pointers.split()),
        *((name, Extent) for name in shapes.split()),
        *rest,
    )


class Tiling(ctypes.Structure):
    """A window plan of `attnseg.runtime.steps.windows`."""

    _fields_ = _fields("starts", "window count stride pad")

    @property
    def windows(self) -> int:
        """Number of windows."""
        return int(self.count.x * self.count.y * self.count.z)

    @classmethod
    def of(cls, plan: WindowPlan, starts: int) -> Tiling:
        """Structure of a window plan.

        Args:
            plan: The plan.
            starts: Device address of `plan.starts`, int32, one axis after another.
        """
        return cls(
            starts,
            Extent.of(plan.window),
            Extent.of([len(along) for along in plan.starts]),
            Extent.of([max((1, *np.diff(along).tolist())) for along in plan.starts]),
            Extent.of(plan.pad_before),
        )


def _ints(names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, ctypes.c_int) for name in names.split())


ACTIVATIONS = {"softmax": 1, "sigmoid": 2}  # 0: values are compared as logits


class DecisionArg(ctypes.Structure):
    """A decision of `attnseg.runtime.steps.decide`."""

    _fields_ = (
        ("thresholds", ctypes.c_float * MOST_CLASSES),
        ("channels", ctypes.c_uint * MOST_CLASSES),
        ("classes", ctypes.c_ubyte * MOST_CLASSES),
        *_ints("regions activation"),
    )

    @classmethod
    def of(cls, decision: Decision, quantity: Quantity = "logits") -> DecisionArg:
        """Structure of a decision on logits, or on probabilities of them.

        Thresholds on softmax probabilities are applied to these in either case.
        """
        outputs, classes = decision.outputs, decision.label_values
        of_logits = quantity == "logits" and (not outputs or decision.activation == "sigmoid")
        compared: Quantity = "logits" if of_logits else "probabilities"
        limits = [decision.limit(output, compared) for output in outputs]
        masks = [sum(1 << channel for channel in output.channels) for output in outputs]
        return cls(
            (ctypes.c_float * MOST_CLASSES)(*limits),
            (ctypes.c_uint * MOST_CLASSES)(*masks),
            (ctypes.c_ubyte * MOST_CLASSES)(*(classes.index(output.label) for output in outputs)),
            len(outputs),
            0 if of_logits else ACTIVATIONS[decision.activation],
        )


SCANNED, GATHERED = 16, 8
"""Number of voxels per index of the kernels `scan` and `scan_float`, and of `gather`."""
SPREAD = 16
"""Number of counters per value of the kernels `scan` and `scan_float`."""
_BLENDED = {2: 2, 3: 2, 4: 2, 8: 1, MOST_CLASSES: 1}  # voxels per index, by number of classes


def blend_kernel(classes: int) -> tuple[str, int]:
    """Name of the kernel that blends so many classes, and its number of voxels per index."""
    if classes in _BLENDED:
        return f"blend_{classes}", _BLENDED[classes]
    largest = 8 if classes < 8 else MOST_CLASSES
    return f"blend_{largest}", _BLENDED[largest]


def groups_along_z(shape: Sequence[int], size: int) -> int:
    """Number of groups of `size` neighbours along Z that hold all voxels of a shape."""
    x, y, z = shape
    return x * y * -(-z // size)


class ScanArgs(ctypes.Structure):
    """Arguments of kernels `scan` and `scan_float`; one index per `SCANNED` voxels of memory."""

    _fields_ = _fields("volume counts box", "shape")


class SumCountsArgs(ctypes.Structure):
    """Arguments of kernel `sum_counts`; one index per value."""

    _fields_ = _fields("counts sums", "")


class RefineArgs(ctypes.Structure):
    """Arguments of kernel `refine`; one index per voxel, in memory order."""

    _fields_ = _fields("volume chosen counts", "")


class MomentArgs(ctypes.Structure):
    """Arguments of kernel `moment`; one index per lane."""

    _fields_ = (
        *_fields("volume sums", ""),
        ("mean", ctypes.c_double),
        ("voxels", ctypes.c_longlong),
        *_ints("lanes squared"),
    )


class NormaliseArgs(ctypes.Structure):
    """Arguments of kernel `normalise`; one index per voxel of the box."""

    _fields_ = (
        *_fields("volume table mask image", ""),
        ("layout", LayoutArg),
        ("shape", Extent),
        ("origin", Extent),
    )


class NormaliseFloatArgs(ctypes.Structure):
    """Arguments of kernel `normalise_float`; one index per voxel of the box."""

    _fields_ = (
        *_fields("volume knots mask image", ""),
        ("layout", LayoutArg),
        ("shape", Extent),
        ("origin", Extent),
        *_ints("count keep_zero"),
    )


class OccupyArgs(ctypes.Structure):
    """Arguments of kernel `occupy`; one index per row of a window along Z."""

    _fields_ = (
        *_fields("image occupied", "shape"),
        ("tiling", Tiling),
        ("transform", TransformArg),
        *_ints("channels"),
    )


class GatherArgs(ctypes.Structure):
    """Arguments of kernel `gather`; one index per group of `GATHERED` voxels of a window."""

    _fields_ = (
        *_fields("image batches windows", ""),
        ("stride", ctypes.c_longlong),
        ("shape", Extent),
        ("tiling", Tiling),
        ("transform", TransformArg),
        ("mirror", Extent),
        *_ints("channels batch half"),
    )


class AverageArgs(ctypes.Structure):
    """Arguments of kernel `average`; one index per voxel of the windows."""

    _fields_ = (
        *_fields("logits sums mean", "window mirror"),
        *_ints("count half half_mean which mirrors"),
    )


class BlendArgs(ctypes.Structure):
    """Arguments of the kernels of `blend_kernel`; one index per group of voxels along Z."""

    _fields_ = (
        *_fields("logits importance places scores classes blended not_finite", "shape"),
        ("tiling", Tiling),
        ("transform", TransformArg),
        ("decision", DecisionArg),
        *_ints("count half half_sums vote which passes"),
        ("background", ctypes.c_float * MOST_CLASSES),
        ("probabilities", ctypes.c_void_p),
        ("region_channels", ctypes.c_uint * MOST_CLASSES),
        *_ints("regions to_probabilities"),
    )


_RESAMPLED = (8, MOST_CLASSES)


def resample_kernel(classes: int) -> str:
    """Name of the kernel that resamples so many channels."""
    return f"resample_{next(most for most in _RESAMPLED if classes <= most)}"


class ResampleArgs(ctypes.Structure):
    """Arguments of the kernels of `resample_kernel`; one index per voxel of the result."""

    _fields_ = (
        *_fields("values first second share", "image start"),
        *_ints("half"),
        ("result", BlendArgs),
    )


LABELLING = ("label_start", "label_merge", "label_flatten", "label_count", "label_remove")
"""Kernels that remove small components, in launch order."""


class LabelArgs(ctypes.Structure):
    """Arguments of the kernels of `LABELLING`; one index per voxel of the image."""

    _fields_ = _fields("classes parents sizes removed", "shape", *_ints("min_voxels faces"))


class EmptyArgs(ctypes.Structure):
    """Arguments of kernel `empty`; one index per voxel of the box."""

    _fields_ = (
        *_fields("volume classes", ""),
        ("layout", LayoutArg),
        *_fields("", "shape origin"),
        *_ints("floating first"),
    )


class FillArgs(ctypes.Structure):
    """Arguments of kernels `open_border`, one index per voxel, and `fill`, one per row along Z."""

    _fields_ = _fields("parents sizes mask voxels", "shape")


class RestoreArgs(ctypes.Structure):
    """Arguments of kernel `restore`; one index per voxel of the box."""

    _fields_ = (
        *_fields("classes labels counts", ""),
        ("layout", LayoutArg),
        ("shape", Extent),
        ("origin", Extent),
        ("values", ctypes.c_ubyte * MOST_CLASSES),
    )


ARGUMENTS: dict[str, type[ctypes.Structure]] = {
    "scan": ScanArgs,
    "scan_float": ScanArgs,
    "sum_counts": SumCountsArgs,
    "refine": RefineArgs,
    "moment": MomentArgs,
    "normalise": NormaliseArgs,
    "normalise_float": NormaliseFloatArgs,
    "occupy": OccupyArgs,
    "gather": GatherArgs,
    "average": AverageArgs,
    **{f"blend_{classes}": BlendArgs for classes in _BLENDED},
    **{f"resample_{classes}": ResampleArgs for classes in _RESAMPLED},
    "label_start": LabelArgs,
    "label_merge": LabelArgs,
    "label_flatten": LabelArgs,
    "label_count": LabelArgs,
    "label_remove": LabelArgs,
    "empty": EmptyArgs,
    "open_border": FillArgs,
    "fill": FillArgs,
    "restore": RestoreArgs,
}
"""Argument structure of each kernel."""
