"""First run of an ONNX file of another trainer: what comes out of it for one window."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attnseg.export.source.ending import LOGITS, overlapping, random
from attnseg.runtime.engines.base import Engine
from attnseg.runtime.errors import EngineError, ExportError
from attnseg.runtime.geometry import Shape
from attnseg.runtime.model.manifest import ModelRecord
from attnseg.runtime.task import Activation

_REPEATED = 1e-3  # of the largest logit, between two runs of the same graph
_SUM_TOLERANCE = 1e-2  # of the probabilities of a voxel, some of which are computed in fp16


def check_first_run(
    path: Path, engine: Engine, window: NDArray[np.float32], spec: ModelRecord
) -> None:
    """Run a model twice on a preprocessed window, and check that it gives logits.

    Args:
        path: The ONNX file, for the texts of errors.
        engine: Engine that runs it.
        window: Preprocessed window `(1, C, X, Y, Z)`.
        spec: Spec of the file.

    Raises:
        ExportError: The engine fails, or the output is not finite, has not one channel per label
            and the size of the window, differs between two runs, or is not logits.
    """
    try:
        first = engine.infer(window).copy()
        second = engine.infer(window)
    except EngineError as error:
        raise ExportError(
            f"{path}: {error.cause}",
            "set inference.window and inference.window_multiple of the spec to sizes that it takes",
        ) from error
    _check_shape(path, first, window, spec)
    if not np.isfinite(first).all():
        raise ExportError(
            f"{path}: outputs NaN or infinite values for a window of z-scores",
            "check the file with ONNX Runtime on a window of your own",
        )
    if np.abs(first - second).max() > _REPEATED * np.abs(first).max():
        raise random(path, "gives other values when it runs again, so something in it is random")
    _check_logits(path, first, spec.task.activation)


def _check_shape(
    path: Path, logits: NDArray[np.float32], window: NDArray[np.float32], spec: ModelRecord
) -> None:
    count = spec.task.output_channels
    if logits.ndim != 5 or logits.shape[:2] != (1, count):
        raise ExportError(
            f"{path}: outputs {logits.shape} for a window of {window.shape}, the spec names "
            f"{count} outputs",
            LOGITS,
        )
    if logits.shape[2:] != window.shape[2:]:
        raise ExportError(
            f"{path}: outputs {_size(logits)} voxels for a window of {_size(window)}",
            "export the network with an output of the size of its input",
        )


def _size(array: NDArray[np.float32]) -> str:
    x, y, z = array.shape[2:]
    shape: Shape = (x, y, z)
    return "x".join(map(str, shape))


def _check_logits(path: Path, values: NDArray[np.float32], activation: Activation) -> None:
    """Refuse values that are probabilities, however the graph computes them."""
    lowest, highest = float(values.min()), float(values.max())
    if lowest == highest:
        raise ExportError(
            f"{path}: outputs {lowest:g} for every class and voxel of a window of z-scores",
            "check the file with ONNX Runtime on a window of your own",
        )
    if activation == "sigmoid" and not (lowest < 0 or highest > 1):
        raise ExportError(f"{path}: outputs values from 0 to 1, as after a sigmoid", LOGITS)
    total = values.sum(axis=1)
    mean = float(total.mean())
    if (
        values.shape[1] > 1
        and abs(mean) > _SUM_TOLERANCE
        and np.ptp(total) <= _SUM_TOLERANCE * abs(mean)
    ):
        raise ExportError(
            f"{path}: outputs values that sum to {mean:.3g} over the classes, as probabilities do, "
            "in place of logits",
            LOGITS,
        )
    if lowest < 0 or highest > 1 or values.shape[1] == 1:
        return
    raise overlapping(
        path, "outputs values from 0 to 1 that do not sum to 1 over the classes, as a sigmoid does"
    )
