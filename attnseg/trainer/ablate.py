"""The paper's ablation (section 4): attention and multi-scale module, each off and on.

Each of the four rows is a separate training run with the same settings, cases and seed,
followed by an evaluation on the validation cases.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from attnseg.evaluation.evaluate import evaluate
from attnseg.evaluation.paper import is_papers_task
from attnseg.evaluation.scores import CaseScores, column
from attnseg.evaluation.tables import markdown_table
from attnseg.runtime.errors import AttnsegError, TrainingError, TrainingSetting
from attnseg.runtime.results.output import write_results
from attnseg.runtime.segmenter import Segmenter
from attnseg.trainer.checkpoint import checkpoint_config, load_checkpoint, load_run
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.data_set import DataSet
from attnseg.trainer.loop import CACHE, refuse_other_files, train
from attnseg.trainer.model import NetworkConfig
from attnseg.trainer.networks import cost_of
from attnseg.trainer.variants import ABLATION, Cost, variant_network

log = logging.getLogger(__name__)

TABLE = "ablation.md"

OpenModel = Callable[[Path], AbstractContextManager[Segmenter]]
"""Function that opens a checkpoint as a segmenter of the runtime."""


def _check_network(network: NetworkConfig) -> None:
    if network.architecture != "attnresunet" or network.attention == "none":
        raise TrainingError(
            "the ablation needs attnresunet with attention",
            "leave {} out",
            TrainingSetting("attention", "none"),
        )


def _train_row(data: DataSet, config: TrainConfig, run: Path, cache: Path) -> Path:
    """Train a row, or continue an earlier call's run, and return its best checkpoint."""
    stored = load_run(run) if (run / "last.pt").exists() else None
    if stored is not None:
        task = data.task.task
        network = replace(config.network, in_channels=len(task.channels), classes=len(task.labels))
        wanted = replace(config, network=network)
        if checkpoint_config(stored) != wanted or stored["split"] != data.split:
            raise TrainingError(
                f"{run}: was trained with other settings or another split",
                "give the same, or choose another folder",
            )
    return train(data, config, run, stored, cache=cache)


def _logged_cases(count: int) -> Callable[[str, AttnsegError | None], None]:
    """Function that logs each evaluated case, for `evaluate`."""
    ended = itertools.count(1)

    def log_case(name: str, error: AttnsegError | None) -> None:
        log.info("%d/%d %s: %s", next(ended), count, name, error or "done")

    return log_case


def ablate(data: DataSet, config: TrainConfig, output: Path, open_model: OpenModel) -> str:
    """Train and evaluate the four rows; a second call continues where the first was stopped.

    Args:
        data: Cases and their split; the rows are evaluated on its validation part.
        config: Configuration of every row, except attention and multi-scale module.
        output: Folder for `ablation.md` and one run per row, which holds its own evaluation.
        open_model: Function that opens a checkpoint for the evaluation.

    Returns:
        The text of `ablation.md`.

    Raises:
        TrainingError: See `train`; or the network has no attention, `output` holds other files,
            or an existing row was trained with other settings or another split.
    """
    _check_network(config.network)
    refuse_other_files(output, (TABLE, CACHE, *ABLATION))
    scores = {}
    for name, variant in ABLATION.items():
        log.info("%s", name)
        run = output / name
        row = replace(config, network=variant_network(config.network, variant))
        best = _train_row(data, row, run, output / CACHE)
        with open_model(best) as segmenter:
            cases = data.part("validation")
            progress = _logged_cases(len(cases))
            output_of_row = run / "evaluation"
            scores[name] = evaluate(
                cases, segmenter, data.task, output_of_row, progress=progress
            ).scores
    text = _table(data, config, output, scores)
    write_results(output, {TABLE: text.encode()})
    return text


def _table(data: DataSet, config: TrainConfig, output: Path, scores: dict[str, CaseScores]) -> str:
    regions = list(data.task.task.regions)
    compared = is_papers_task(regions)
    paper = " (paper)" if compared else ""
    header = [
        "",
        f"M params{paper}",
        f"GMAC{paper}",
        f"Dice {' / '.join(regions)}",
        "HD95, mm",
        "epoch",
    ]
    rows = []
    for name, variant in ABLATION.items():
        state = load_checkpoint(output / name / "best.pt")
        cost = cost_of(checkpoint_config(state).network)
        costs = _costs(cost, variant.paper if compared else None)
        dice = " / ".join(f"{column(scores[name], r, 'dice').mean():.3f}" for r in regions)
        hd95 = " / ".join(f"{column(scores[name], r, 'hd95_mm').mean():.1f}" for r in regions)
        rows.append([name, *costs, dice, hd95, str(state["epoch"])])
    part = data.split["validation"]
    known = "; the paper's values in brackets where they are known" if compared else ""
    return (
        f"# Ablation on {data.name}\n\n{len(data.split['train'])} training cases, {len(part)} "
        f"validation cases, {config.epochs} epochs at most, seed {config.seed}. Means over the "
        f"validation cases, on which the epoch was chosen too{known}.\n\n"
        f"{markdown_table(header, rows)}"
    )


def _costs(own: Cost, paper: Cost | None) -> list[str]:
    """Parameters and GMAC of a network, with the paper's in brackets if there is a paper's."""
    assert own.parameters_m is not None and own.gmac is not None
    costs = [f"{own.parameters_m:.2f}", f"{own.gmac:.2f}"]
    if paper is None:
        return costs
    theirs = ("-" if v is None else f"{v:.1f}" for v in (paper.parameters_m, paper.gmac))
    return [f"{cost} ({value})" for cost, value in zip(costs, theirs, strict=True)]
