"""Inference with a trained model: a checkpoint is exported to a temporary bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attnseg.export.export import ExportProgress, export_bundle
from attnseg.runtime.model.bundle import Bundle
from attnseg.runtime.options import SegmentOptions
from attnseg.runtime.segmenter import Segmenter


@contextmanager
def trained_bundle(model: Path, progress: ExportProgress | None = None) -> Iterator[Bundle]:
    """Export a checkpoint to a temporary bundle, which is removed on exit.

    Args:
        model: Checkpoint, see `export_bundle`.
        progress: Callbacks that receive the progress.

    Raises:
        TrainingError, ExportError, EngineError: See `export_bundle`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bundle"
        yield export_bundle(model, folder, samples=lambda _: (), progress=progress).bundle


@contextmanager
def open_trained(model: Path, options: SegmentOptions | None = None) -> Iterator[Segmenter]:
    """Open a checkpoint for inference; its temporary bundle is removed on exit.

    Args:
        model: Checkpoint, see `export_bundle`.
        options: Options of the segmenter.

    Raises:
        TrainingError, ExportError, EngineError: See `export_bundle`.
    """
    with trained_bundle(model) as bundle:
        yield Segmenter(bundle, options)
