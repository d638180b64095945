"""`attnseg train`, `attnseg ablate` and `attnseg summary`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click
from rich.markdown import Markdown

from attnseg.cli.console import console, print_table
from attnseg.cli.parameters import PATH, command, option, output_option, training_options
from attnseg.runtime.extras import require


def _show_log() -> None:
    """Print the trainer's log on the terminal, and no other package's."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("attnseg").setLevel(logging.INFO)


@command()
@training_options
@output_option(None, "Folder for the run.")
@option("--resume", is_flag=True, help="Resume the run in OUTPUT from its last.pt.")
@option(
    "--preset",
    metavar="[paper|wide16]",
    help="paper: the complete protocol of section 3.3, with volumes resized to 192x192x128; "
    "wide16: a wider network.  [default: the paper's network at full resolution]",
)
@option(
    "--model",
    metavar="[unet3d|deepmedic|resunet|attnresunet]",
    help="Network to train; attnresunet is the paper's own.  [default: attnresunet]",
)
@option(
    "--attention",
    metavar="[none|gap|se|cbam]",
    help="Attention on the skip connections; gap is the paper's.  [default: that of --model]",
)
@option(
    "--multi-scale/--no-multi-scale",
    default=None,
    help="Dilated convolutions in the decoder.  [default: that of --model]",
)
@option("--init", "initial", type=PATH, help="Checkpoint or weights.safetensors to start from.")
def train(
    data: Path,
    output: Path,
    resume: bool,
    **choices: Any,
) -> None:
    """Train a network on labelled cases.

    The defaults are the paper's protocol. DATA holds cases with label files (BraTS), or a
    dataset.json of the Medical Segmentation Decathlon or of nnU-Net. On several GPUs, run
    torchrun --nproc-per-node N -m attnseg train ...
    """
    require("attnseg train", "train")
    from attnseg.trainer.devices import first_process
    from attnseg.trainer.start import RunChoices, start_run

    _show_log()
    try:
        best = start_run(data, output, RunChoices(**choices), resume)
    except KeyboardInterrupt as stop:
        again = " with --resume" if (output / "last.pt").exists() else ""
        raise KeyboardInterrupt(f"repeat the command{again} to continue") from stop
    if first_process():
        click.echo(f"Best checkpoint: {best}. Next: attnseg export {best} -o model/")


@command()
@training_options
@output_option(None, "Folder for the four runs.")
@option("--preset", metavar="[paper|wide16]", help="Size of the network.  [default: paper]")
def ablate(
    data: Path, output: Path, preset: str | None, split: Path | None, settings: dict[str, str]
) -> None:
    """Train and evaluate the paper's ablation.

    Trains four networks: attention and multi-scale module, each off and on. Repeat the same
    command to continue an ablation that was stopped.
    """
    require("attnseg ablate", "export")
    from attnseg.data.labelled import refuse_data_folder
    from attnseg.export.trained import open_trained
    from attnseg.runtime.results.output import prepare_folder
    from attnseg.trainer.ablate import ablate as run_ablation
    from attnseg.trainer.start import RunChoices, open_choices

    _show_log()
    refuse_data_folder(data, output)
    network_only = None if preset == "paper" else preset  # the preset paper also resizes volumes
    choices = RunChoices(preset=network_only, split=split, settings=settings)
    data_set, config = open_choices(data, choices)
    prepare_folder(output)
    text = run_ablation(data_set, config, output, open_trained)
    console().print(Markdown(text))
    click.echo(f"Results in {output}")


@command()
@option("--preset", metavar="[paper|wide16]", help="Size of the paper's network.  [default: paper]")
def summary(preset: str | None) -> None:
    """Show parameters and GMAC of the networks.

    The paper's values are shown beside them where it states any.
    """
    require("attnseg summary", "train", ("torch",))
    from attnseg.trainer.summary import SUMMARY_HEADER, summary_rows
    from attnseg.trainer.variants import DIFFERENCES

    print_table(SUMMARY_HEADER, summary_rows(preset), numbers_from=1)
    console().print(DIFFERENCES)
