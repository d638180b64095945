"""Parity: an exported graph must give the logits that torch gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from attnseg.export.checkpoint import TrainedModel, example_windows
from attnseg.runtime.engines.choice import installed_engines, open_engine
from attnseg.runtime.errors import EngineError
from attnseg.runtime.segmenter import available_threads

TOLERANCE = 1e-3  # of fp32 logits, relative to the largest of them


@dataclass(frozen=True)
class Parity:
    """How far an engine's fp32 logits are from torch's.

    Attributes:
        engine: name and version.
        largest_difference: over all logits, relative to the largest logit of torch.
        label_disagreement: share of voxels whose most likely class differs.
    """

    engine: str
    largest_difference: float
    label_disagreement: float


def compare_with_torch(model: TrainedModel, onnx_file: Path) -> list[Parity]:
    """Run every installed engine in fp32 on example windows, batches of 1 and 2.

    Raises:
        EngineError: no engine is installed, or one differs by more than `TOLERANCE`.
    """
    windows = example_windows(model, 2)
    with torch.inference_mode():
        expected = model.network(torch.from_numpy(windows)).numpy()
    scale = float(np.abs(expected).max())
    results = []
    for name in [n for n, version in installed_engines().items() if version]:
        engine = open_engine(name, onnx_file, "fp32", available_threads())
        got = np.concatenate([engine.infer(windows).copy(), engine.infer(windows[:1]).copy()])
        wanted = np.concatenate([expected, expected[:1]])
        difference = float(np.abs(got - wanted).max()) / scale
        disagreement = float(np.mean(got.argmax(axis=1) != wanted.argmax(axis=1)))
        results.append(Parity(f"{name} {engine.info.version}", difference, disagreement))
        if not difference <= TOLERANCE:
            raise EngineError(
                f"{name} differs from torch by {difference:.2e} of the largest logit, more than "
                f"{TOLERANCE:.0e}; no bundle was written"
            )
    if not results:
        raise EngineError("parity needs an inference engine; pip install 'attnseg[cpu]'")
    return results
