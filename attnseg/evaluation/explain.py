"""Attention weights of a case: how much each skip connection passes on (the paper's figure 2).

There is one weight per channel and window, because attention averages over the window. The
picture shows the mean over the case's windows and the range from the 10th to the 90th percentile.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from attnseg.evaluation.attention import AttentionGraph
from attnseg.runtime.case.nifti import read_volume
from attnseg.runtime.case.scans import Case
from attnseg.runtime.case.volume import Volume
from attnseg.runtime.errors import AttnsegError
from attnseg.runtime.folder import case_error
from attnseg.runtime.model.bundle import Bundle
from attnseg.runtime.model.manifest import Manifest
from attnseg.runtime.options import SegmentOptions, resolve
from attnseg.runtime.results.output import write_results
from attnseg.runtime.steps.check import check_input
from attnseg.runtime.steps.preprocess import preprocess
from attnseg.runtime.steps.windows import pad_image


@dataclass(frozen=True)
class StageWeights:
    """Attention weights of one stage.

    Attributes:
        stage: Index, from 1, of the encoder stage whose skip connection is weighted.
        weights: `(windows, channels)` float32, 0 to 1.
    """

    stage: int
    weights: NDArray[np.float32]


def attention_weights(
    graph: AttentionGraph, manifest: Manifest, volume: Volume
) -> list[StageWeights]:
    """Run a case window by window and collect the attention weights.

    Args:
        graph: Graph of the model.
        manifest: Manifest of the model, whose windows are used; windows of zeros are skipped.
        volume: Volume of the case, one channel per modality.

    Returns:
        Weights of each stage, first stage first.

    Raises:
        VolumeError: The case cannot be normalised.
    """
    settings = resolve(SegmentOptions(), manifest)
    checked = check_input(volume, settings.rules)
    image = preprocess(checked.volume, checked.preprocessing).image
    plan = settings.windows.plan(image.shape[1:])
    padded = pad_image(image, plan)
    contents = (padded[(slice(None), *window.slices())] for window in plan.windows)
    rows = [graph.weights(np.ascontiguousarray(c)) for c in contents if c.any()]
    by_stage = zip(*rows, strict=True)
    return [StageWeights(stage, np.stack(found)) for stage, found in enumerate(by_stage, start=1)]


def draw_weights(stages: list[StageWeights], title: str) -> bytes:
    """Draw a PNG file: one row per stage, one bar per channel, largest mean first."""
    figure = Figure(figsize=(9, 1.8 * len(stages) + 0.6), layout="constrained")
    for axes, stage in zip(
        figure.subplots(len(stages), 1, squeeze=False)[:, 0], stages, strict=True
    ):
        mean = stage.weights.mean(axis=0)
        low, high = np.percentile(stage.weights, (10, 90), axis=0)
        order = np.argsort(-mean)
        places = range(len(mean))
        axes.bar(places, mean[order], color="#6a9fd4")
        axes.vlines(places, low[order], high[order], color="#333333", linewidth=1)
        axes.axhline(0.5, color="#999999", linewidth=0.8, linestyle="--")
        axes.set(ylim=(0, 1), ylabel=f"stage {stage.stage}", xlim=(-0.7, len(mean) - 0.3))
        axes.set_xticks([])
    axes.set_xlabel("channels, largest mean first; lines: 10th to 90th percentile of the windows")
    figure.suptitle(title)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()


def encode_weights_table(stages: list[StageWeights]) -> bytes:
    """Return a CSV file in UTF-8 with one row per stage and channel."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("stage", "channel", "mean", "p10", "p90", "windows"))
    for stage in stages:
        mean = stage.weights.mean(axis=0)
        low, high = np.percentile(stage.weights, (10, 90), axis=0)
        for channel, values in enumerate(zip(mean, low, high, strict=True)):
            cells = (f"{value:.5f}" for value in values)
            writer.writerow((stage.stage, channel, *cells, len(stage.weights)))
    return stream.getvalue().encode()


def _explain(case: Case, graph: AttentionGraph, manifest: Manifest, output: Path) -> None:
    stages = attention_weights(graph, manifest, read_volume(case.files))
    files = {
        f"{case.name}_attention.png": draw_weights(stages, case.name),
        f"{case.name}_attention.csv": encode_weights_table(stages),
    }
    write_results(output, files)


def explain_cases(
    cases: Sequence[Case],
    bundle: Bundle,
    output: Path,
    progress: Callable[[str, AttnsegError | None], None] | None = None,
) -> dict[str, AttnsegError]:
    """Write `CASE_attention.png` and `CASE_attention.csv` of each case.

    Args:
        cases: Cases to explain; the failure of one does not stop the others.
        bundle: Model with attention.
        output: Folder for the files; must exist.
        progress: Function called with the name of each finished case and its error, if any.

    Returns:
        Error of each failed case, by name.

    Raises:
        ConfigError: The network has no attention.
        DependencyError, EngineError: ONNX Runtime is not installed, or rejects the graph.
    """
    graph, failed = AttentionGraph(bundle), dict[str, AttnsegError]()
    for case in cases:
        try:
            _explain(case, graph, bundle.manifest, output)
        except Exception as error:  # no error of one case may stop the others
            failed[case.name] = case_error(case, error)
        if progress:
            progress(case.name, failed.get(case.name))
    return failed
