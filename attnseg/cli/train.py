"""`attnseg train`, `attnseg ablate` and `attnseg summary`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markdown import Markdown

from attnseg.cli.console import console, print_document, print_table, show
from attnseg.cli.parameters import PATH, command, option, output_option, parse_pairs, together
from attnseg.cli.progress import keeping, loading
from attnseg.runtime.extras import require

_training_options = together(
    option("--data", type=PATH, required=True, help="Folder of labelled cases."),
    option(
        "--split",
        type=PATH,
        help="JSON file with lists train and validation of case names.  [default: a random split]",
    ),
    option(
        "--set",
        "settings",
        multiple=True,
        callback=parse_pairs("FIELD=VALUE, such as learning_rate=1e-3", empty=True),
        metavar="FIELD=VALUE",
        help="Change a training setting, such as epochs=30 (docs/training.md); may be repeated.",
    ),
)


@command()
@_training_options
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
    metavar="NAME",
    help="Network to train: unet3d, deepmedic, resunet, residualunet, deeplabv3, unetplusplus "
    "(needs MONAI), or attnresunet, the paper's own.  [default: attnresunet]",
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
    with loading("PyTorch", "torch"):
        from attnseg.trainer.devices import first_process
        from attnseg.trainer.start import RunChoices, start_run

    with keeping(lambda: _kept_of_run(output)):
        best = start_run(data, output, RunChoices(**choices), resume)
    if first_process():
        show(f"Best checkpoint: {best}. Next: attnseg export {best} -o model/")


def _kept_of_run(output: Path) -> str:
    if (output / "last.pt").exists():
        return "repeat the command with --resume to continue"
    return "no step was saved; repeat the command"


@command()
@_training_options
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
    with loading("PyTorch", "torch"):
        from attnseg.data.labelled import refuse_data_folder
        from attnseg.export.trained import open_trained
        from attnseg.runtime.results.output import prepare_folder
        from attnseg.trainer.ablate import ablate as run_ablation
        from attnseg.trainer.start import RunChoices, open_choices

    refuse_data_folder(data, output)
    network_only = None if preset == "paper" else preset  # the preset paper also resizes volumes
    choices = RunChoices(preset=network_only, split=split, settings=settings)
    data_set, config = open_choices(data, choices)
    prepare_folder(output)
    with keeping(lambda: "repeat the command to continue"):
        text = run_ablation(data_set, config, output, open_trained)
    console().print(Markdown(text))
    show(f"Results in {output}")


@command()
@option("--preset", metavar="[paper|wide16]", help="Size of the paper's network.  [default: paper]")
def summary(preset: str | None) -> None:
    """Show parameters and GMAC of the networks.

    The paper's values are shown beside them where it states any.
    """
    require("attnseg summary", "train", ("torch",))
    with loading("PyTorch", "torch"):
        from attnseg.trainer.summary import SUMMARY_HEADER, network_costs, summary_rows
        from attnseg.trainer.variants import DIFFERENCES

    costs = network_costs(preset)
    print_table(SUMMARY_HEADER, summary_rows(costs), numbers_from=1)
    console().print(DIFFERENCES)
    networks = [
        {"network": title, "cost": asdict(own), "paper": asdict(paper)}
        for title, (own, paper) in costs.items()
    ]
    print_document({"window_voxels": 64, "networks": networks})
