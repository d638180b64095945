"""The paper's ablation (section 4): attention and multi-scale module, each off and on.

Each of the four rows is a training run of its own with the same settings, cases and seed,
then an evaluation on the validation cases.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from attnseg.runtime.errors import TrainingError
from attnseg.runtime.outputs import write_files
from attnseg.runtime.segmenter import Segmenter
from attnseg.trainer.cases import DataSet
from attnseg.trainer.checkpoint import checkpoint_config, load_checkpoint, load_run
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.evaluate import CaseScores, column, evaluate, markdown_table
from attnseg.trainer.loop import CACHE, train
from attnseg.trainer.model import NetworkConfig
from attnseg.trainer.networks import cost_of
from attnseg.trainer.paper import ABLATION, Cost, variant_network

log = logging.getLogger(__name__)

TABLE = "ablation.md"

OpenModel = Callable[[Path], AbstractContextManager[Segmenter]]
"""Opens a checkpoint as the runtime runs it."""


def _check_network(network: NetworkConfig) -> None:
    if network.architecture != "attnresunet" or network.attention == "none":
        raise TrainingError(
            "the ablation is of attnresunet with an attention; leave attention=none out"
        )


def _train_row(data: DataSet, config: TrainConfig, run: Path, cache: Path) -> Path:
    """The best checkpoint of a row, trained from where an earlier call left off."""
    started = (run / "last.pt").exists()
    if started:
        state = load_run(run)
        stored = checkpoint_config(state)
        channels, classes = len(data.task.channels), len(data.task.labels)
        network = replace(config.network, in_channels=channels, classes=classes)
        if stored != replace(config, network=network) or state["split"] != data.split:
            raise TrainingError(
                f"{run}: was trained with other settings or another split; give the same, or "
                "choose another folder"
            )
    return train(data, config, run, resume=started, cache=cache)


def ablate(data: DataSet, config: TrainConfig, output: Path, open_model: OpenModel) -> str:
    """Train and evaluate the four rows; a second call goes on where the first was stopped.

    Args:
        data: cases and their split; the rows are evaluated on its validation part.
        config: of every row, but for what the ablation switches.
        output: folder: a run for each row, with its evaluation in it, and `ablation.md`.
        open_model: opens a checkpoint for the evaluation.

    Returns:
        The text of `ablation.md`.

    Raises:
        TrainingError: as for `train`, or a row was trained with other settings before.
    """
    _check_network(config.network)
    scores = {}
    for name, variant in ABLATION.items():
        log.info("%s", name)
        run = output / name
        row = replace(config, network=variant_network(config.network, variant))
        best = _train_row(data, row, run, output / CACHE)
        with open_model(best) as segmenter:
            cases = data.part("validation")
            scores[name] = evaluate(cases, segmenter, data.task, run / "evaluation").scores
    text = _table(data, config, output, scores)
    write_files(output, {TABLE: text.encode()})
    return text


def _both(own: float, paper: float | None, digits: int) -> str:
    return f"{own:.{digits}f} ({'-' if paper is None else f'{paper:.1f}'})"


def _table(data: DataSet, config: TrainConfig, output: Path, scores: dict[str, CaseScores]) -> str:
    regions = list(data.task.regions)
    header = [
        "",
        "M params (paper)",
        "GMAC (paper)",
        f"Dice {' / '.join(regions)}",
        "HD95, mm",
        "epoch",
    ]
    rows = []
    for name, variant in ABLATION.items():
        state = load_checkpoint(output / name / "best.pt")
        cost, paper = cost_of(checkpoint_config(state).network), variant.paper
        dice = " / ".join(f"{column(scores[name], r, 'dice').mean():.3f}" for r in regions)
        hd95 = " / ".join(f"{column(scores[name], r, 'hd95_mm').mean():.1f}" for r in regions)
        rows.append([name, *_costs(cost, paper), dice, hd95, str(state["epoch"])])
    part = data.split["validation"]
    return (
        f"# Ablation on {data.name}\n\n{len(data.split['train'])} training cases, {len(part)} "
        f"validation cases, {config.epochs} epochs at most, seed {config.seed}. Means over the "
        "validation cases, on which the epoch was chosen too; the paper's values in brackets "
        f"where they are known.\n\n{markdown_table(header, rows)}"
    )


def _costs(cost: Cost, paper: Cost) -> list[str]:
    assert cost.parameters_m is not None and cost.gmac is not None
    return [_both(cost.parameters_m, paper.parameters_m, 2), _both(cost.gmac, paper.gmac, 2)]
