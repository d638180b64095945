"""Attention weights of a case: how much each skip connection passes on (the paper's figure 2).

There is one weight per channel and window, because attention averages over the window. The
picture shows the mean over the case's windows and the range from the 10th to the 90th percentile.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from attnseg.runtime.case.nifti import read_volume
from attnseg.runtime.case.scans import Case
from attnseg.runtime.case.volume import Volume
from attnseg.runtime.errors import ConfigError
from attnseg.runtime.results.output import write_results
from attnseg.runtime.steps.preprocess import preprocess
from attnseg.runtime.steps.windows import WindowOptions, pad_image
from attnseg.trainer.model import AttentionResNetUNet
from attnseg.trainer.networks import Network
from attnseg.trainer.preparation import Preparation


@dataclass(frozen=True)
class StageWeights:
    """Attention weights of one stage.

    Attributes:
        stage: Index, from 1, of the encoder stage whose skip connection is weighted.
        weights: `(windows, channels)` float32, 0 to 1.
    """

    stage: int
    weights: NDArray[np.float32]


def check_attention(network: Network) -> None:
    """Raise `ConfigError` for a network without attention."""
    kind = network.config.attention
    if not isinstance(network, AttentionResNetUNet) or kind == "none":
        raise ConfigError(
            f"the model has no attention ({network.config.architecture}, {kind})",
            "give one with gap, se or cbam",
        )


def _attention_of(network: Network) -> list[nn.Module]:
    """Attention module of each stage, first stage first."""
    check_attention(network)
    assert isinstance(network, AttentionResNetUNet)
    return [stage.attention for stage in reversed(network.decoder)]  # type: ignore[misc]


@contextmanager
def _recorded(modules: list[nn.Module], rows: list[list[NDArray[np.float32]]]) -> Iterator[None]:
    """Append each module's weights, `(C,)`, to its list in `rows` on every forward pass."""

    def hook(into: list[NDArray[np.float32]]):  # type: ignore[no-untyped-def]
        def record(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
            into.append(module.weights(inputs[0])[0, :, 0, 0, 0].numpy())  # type: ignore[operator]

        return record

    pairs = zip(modules, rows, strict=True)
    handles = [module.register_forward_hook(hook(into)) for module, into in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention_weights(
    network: Network, preparation: Preparation, windows: WindowOptions, volume: Volume
) -> list[StageWeights]:
    """Run a case window by window and collect the attention weights.

    Args:
        network: Network in evaluation mode, on the CPU.
        preparation: Preparation of the network's inputs.
        windows: Size and overlap of the windows; windows of zeros are skipped.
        volume: Volume of the case, one channel per modality.

    Returns:
        Weights of each stage, first stage first.

    Raises:
        ConfigError: The network has no attention.
        VolumeError: The case cannot be normalised.
    """
    modules = _attention_of(network)
    rows: list[list[NDArray[np.float32]]] = [[] for _ in modules]
    image = preprocess(volume, preparation.preprocessing).image
    plan = windows.plan(image.shape[1:])
    padded = pad_image(image, plan)
    with torch.inference_mode(), _recorded(modules, rows):
        for window in plan.windows:
            content = padded[(slice(None), *window.slices())]
            if content.any():
                network(torch.from_numpy(np.ascontiguousarray(content))[None])
    return [StageWeights(stage, np.stack(row)) for stage, row in enumerate(rows, start=1)]


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


def explain_cases(
    cases: Sequence[Case],
    network: Network,
    preparation: Preparation,
    windows: WindowOptions,
    output: Path,
) -> Iterator[str]:
    """Write `CASE_attention.png` and `CASE_attention.csv` of each case, and yield its name.

    Raises:
        ConfigError: The network has no attention.
        VolumeError: A case cannot be read or normalised.
        OutputError: A file cannot be written.
    """
    for case in cases:
        volume = read_volume(case.files)
        stages = attention_weights(network, preparation, windows, volume)
        files = {
            f"{case.name}_attention.png": draw_weights(stages, case.name),
            f"{case.name}_attention.csv": encode_weights_table(stages),
        }
        write_results(output, files)
        yield case.name
