"""Inference with a trained model: a checkpoint is exported to a temporary bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attnseg.export.export import export_bundle
from attnseg.runtime.options import SegmentOptions
from attnseg.runtime.segmenter import Segmenter


@contextmanager
def open_trained(model: Path, options: SegmentOptions | None = None) -> Iterator[Segmenter]:
    """Open a checkpoint for inference; its temporary bundle is removed on exit.

    Args:
        model: Checkpoint, see `export_bundle`.
        options: Options of the segmenter.

    Raises:
        TrainingError, ExportError, EngineError: See `export_bundle`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        export_bundle(model, bundle, samples=lambda _: ())
        yield Segmenter(bundle, options)
