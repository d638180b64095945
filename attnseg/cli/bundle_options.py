"""Options of the commands that write bundles: content, engines, parity gate and words."""

from __future__ import annotations

import click

from attnseg.cli.parameters import PATH, option, together

WORDS = "Description and signature of the bundle"
GATE = "Parity gate"
BUILD = "TensorRT engines"


gate_options = together(
    option(
        "--data",
        type=PATH,
        heading=GATE,
        help="Folder of labelled cases to compare precisions on.  [default: a synthetic case]",
    ),
    option(
        "--budget-dice",
        type=float,
        metavar="DICE",
        heading=GATE,
        help="Largest change of Dice.  [default: 0.002; for verify, the bundle's]",
    ),
    option(
        "--budget-volume",
        type=float,
        metavar="PERCENT",
        heading=GATE,
        help="Largest change of a volume, in %.  [default: 0.5; for verify, the bundle's]",
    ),
)
"""Options of the parity gate, which `export`, `import` and `verify` share."""


def _parse_megabytes(_: click.Context, __: click.Parameter, value: int | None) -> int | None:
    return None if value is None else value * 1_000_000


content_options = together(
    option("--fp16", is_flag=True, help="Add an fp16 graph, and a TensorRT engine built from it."),
    option("--int8", is_flag=True, help="Add an int8 graph and engine; needs --calibrate."),
    option(
        "--calibrate",
        "calibration",
        type=PATH,
        metavar="FOLDER",
        help="Folder of scans to calibrate the int8 graph on.",
    ),
)
"""Content of a bundle, which `export` and `import` share."""

build_options = together(
    option(
        "--target",
        multiple=True,
        metavar="GPU",
        heading=BUILD,
        help="GPU to build an engine for: rtx2080ti, a100, rtx3090, rtxa6000, rtx4090, l40s, "
        "rtx5090, dgx-spark, or a compute capability such as sm89; may be repeated.  [default with "
        "--fp16 or --int8: rtx3090; with --builder tensorrt: this machine's]",
    ),
    option(
        "--compatible",
        "compatibility",
        type=click.Choice(["same", "ampere+"]),
        default="same",
        show_default=True,
        heading=BUILD,
        help="GPUs that can run the engine: only the target, or all since Ampere.",
    ),
    option(
        "--builder",
        type=click.Choice(["tensorrt-rtx", "tensorrt", "none"]),
        default="tensorrt-rtx",
        show_default=True,
        heading=BUILD,
        help="Library that builds engines; tensorrt needs the target GPU in this machine.",
    ),
    option(
        "--batch",
        type=click.IntRange(1),
        metavar="WINDOWS",
        show_default="12 of 64x64x64 voxels, or as many voxels",
        heading=BUILD,
        help="Batch size of engines, in windows.",
    ),
    option(
        "--io",
        type=click.Choice(["fp16", "fp32"]),
        default="fp16",
        show_default=True,
        heading=BUILD,
        help="Data type of the fp16 graph's input and output.",
    ),
    option(
        "--workspace",
        "workspace_bytes",
        type=click.IntRange(1),
        callback=_parse_megabytes,
        metavar="MB",
        heading=BUILD,
        help="Scratch memory that a layer may use.  [default: no limit]",
    ),
    option(
        "--version-compatible",
        is_flag=True,
        heading=BUILD,
        help="Build engines that later TensorRT versions can run (--builder tensorrt only).",
    ),
    option(
        "--timing-cache",
        type=PATH,
        heading=BUILD,
        help="TensorRT timing cache to read and write (--builder tensorrt only).",
    ),
)
"""TensorRT engines of a bundle, which `export` and `import` share."""

word_options = together(
    option("--name", heading=WORDS, help="Name of the model, stored in the manifest."),
    option("--description", heading=WORDS, help="Description of the model."),
    option(
        "--intended-use", heading=WORDS, help="Intended use of the model, such as 'Research only'."
    ),
    option("--sign", type=PATH, heading=WORDS, help="Private key to sign with (PEM, Ed25519)."),
)
"""Words and signature of a bundle, which `export` and `import` share."""
