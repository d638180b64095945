"""The command line: parse, call one function, print."""

from __future__ import annotations

import importlib.util
import logging
import re
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from attnseg._version import __version__
from attnseg.demo import make_demo_scan, score_demo
from attnseg.doctor import EXPORT_MODULES, examine
from attnseg.runtime.bundle import Bundle
from attnseg.runtime.errors import AttnsegError, ConfigError, ScanError
from attnseg.runtime.folder import CaseResult, segment_folder
from attnseg.runtime.outputs import prepare_output, write_files
from attnseg.runtime.scans import Case, find_cases, find_scans
from attnseg.runtime.segmenter import Segmenter, SegmentOptions
from attnseg.runtime.signature import check_signature

_Function = TypeVar("_Function", bound=Callable[..., Any])
_PATH = click.Path(path_type=Path)
_INTERRUPTED = 130


class _Command(click.Command):
    """A command that also takes `--debug`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(
                ["--debug"],
                is_flag=True,
                expose_value=False,
                callback=lambda ctx, _, value: (
                    ctx.find_root().ensure_object(dict).update(debug=value)
                ),
                help="Show the traceback of an error.",
            )
        )


class _Group(click.Group):
    """Prints errors that the user can mend in one line, without a traceback."""

    command_class = _Command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (AttnsegError, OSError) as error:
            if isinstance(error, BrokenPipeError):  # the reader of our output went away
                raise
            if ctx.ensure_object(dict).get("debug"):
                traceback.print_exc()
            click.echo(f"error: {_in_one_line(error)}", err=True)
            ctx.exit(1)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "attnseg"
            click.echo(f"error: {error.format_message()} See {command} --help", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("stopped; what was finished is kept", err=True)
            ctx.exit(_INTERRUPTED)


def _in_one_line(error: Exception | str) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="attnseg")
def main() -> None:
    """3-D segmentation of medical scans: train, export, run."""


class _ProgressListener:
    """Shows the current case's progress on the terminal."""

    def __init__(self, progress: Progress, cases: int) -> None:
        self._progress, self._cases = progress, cases
        self._task: TaskID | None = None
        self._started = 0

    def case_started(self, name: str) -> None:
        """See `attnseg.runtime.folder.Listener`."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._started += 1
        place = f"{self._started}/{self._cases}"
        self._task = self._progress.add_task(f"{place} {name}", total=1.0)

    def case_advanced(self, share: float) -> None:
        """See `attnseg.runtime.folder.Listener`."""
        if self._task is not None:
            self._progress.update(self._task, completed=share)


def _progress() -> Progress:
    console = _console(stderr=True)
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), TimeElapsedColumn())
    # Elsewhere than on a terminal it would leave empty lines.
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _console(stderr: bool = False) -> Console:
    """A console that prints brackets as they are: they stand in names and in extras."""
    return Console(stderr=stderr, markup=False, highlight=False)


def _parse_window(_: click.Context, __: click.Parameter, value: str | None) -> Any:
    if value is None or value == "full":
        return value
    if not value.isdecimal():
        raise click.BadParameter("give a number of voxels, such as 64, or full")
    return int(value)


def _parse_channels(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> Any:
    pairs = [value.partition("=") for value in values]
    if any(not (name and file) for name, _, file in pairs):
        raise click.BadParameter("give NAME=FILE, such as ct=scan.nii.gz")
    return {name: Path(file) for name, _, file in pairs}


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _parse_bytes(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", value.strip().upper())
    if not found:
        raise click.BadParameter("give a number of bytes with its unit, such as 4GB or 500MB")
    return int(float(found[1]) * _UNITS[found[2] or ""])


_bundle_option = click.option("--model", type=_PATH, help="Bundle.  [default: the shipped one]")
_trained_option = click.option(
    "--model",
    type=_PATH,
    help="Checkpoint (best.pt), weights.safetensors, or bundle.  [default: the shipped bundle]",
)


def _segment_options(function: _Function) -> _Function:
    """The options that `run`, `demo` and `evaluate` share."""
    options = (
        click.option(
            "--engine",
            default="auto",
            show_default=True,
            help="auto (the fastest that runs here), tensorrt, tensorrt-rtx, onnxruntime-cuda, "
            "openvino or onnxruntime.",
        ),
        click.option(
            "--precision",
            default="auto",
            show_default=True,
            help="auto (the engine's fastest), fp16, bf16, fp32 or int8.",
        ),
        click.option(
            "--tta",
            default="none",
            show_default=True,
            help="Test-time passes: none, paper (identity, mirror, rotation) or mirror8.",
        ),
        click.option(
            "--fuse",
            default="vote",
            show_default=True,
            help="How passes are joined: vote, or mean of the probabilities.",
        ),
        click.option(
            "--window",
            callback=_parse_window,
            help="Edge of the window in voxels, or full for one pass.  [default: the model's]",
        ),
        click.option(
            "--overlap", type=float, help="Share of a window in common.  [default: the model's]"
        ),
        click.option(
            "--min-voxels",
            type=int,
            help="Remove components with fewer voxels.  [default: the model's]",
        ),
        click.option("--threads", type=int, help="Processor threads.  [default: all]"),
        click.option(
            "--device",
            default="auto",
            show_default=True,
            help="cuda, cpu, or auto: a GPU if there is one that runs the model.",
        ),
        click.option(
            "--max-memory",
            "max_memory_bytes",
            callback=_parse_bytes,
            metavar="SIZE",
            help="Device memory that may be taken, such as 4GB.  [default: any]",
        ),
        click.option(
            "--fallback",
            type=click.Choice(["cpu"]),
            help="Where to go on when the GPU fails.  [default: the cases fail]",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def _open_segmenter(
    model: Path | None, settings: dict[str, Any], key: Path | None = None
) -> Segmenter:
    bundle = Bundle.load(model) if model else Bundle.default()
    if key:
        check_signature(bundle, key)
    segmenter = Segmenter(bundle, SegmentOptions(**settings))
    for refusal in segmenter.refusals:
        click.echo(f"not used: {refusal}", err=True)
    return segmenter


def _run_cases(
    cases: Sequence[Case],
    segmenter: Segmenter,
    output: Path,
    overwrite: bool,
    problems: Mapping[str, ScanError],
) -> int:
    """Segment, print the summary, and return the number of cases that failed."""
    results = [CaseResult(n, "failed", note=str(e), error=e) for n, e in problems.items()]
    for result in results:
        _print_notes(result)
    with _progress() as progress:
        listener = _ProgressListener(progress, len(cases))
        for result in segment_folder(cases, segmenter, output, listener, overwrite):
            results.append(result)
            _print_notes(result)
    _print_summary(sorted(results, key=lambda r: r.name), segmenter, output)
    return sum(result.status == "failed" for result in results)


def _print_notes(result: CaseResult) -> None:
    if result.error and click.get_current_context().find_root().ensure_object(dict).get("debug"):
        traceback.print_exception(result.error)
    if result.note:
        click.echo(f"{result.name}: {_in_one_line(result.note)}", err=True)
    for warning in result.report.get("warnings", []):
        click.echo(f"{result.name}: warning: {warning}", err=True)


def _print_summary(results: Sequence[CaseResult], segmenter: Segmenter, output: Path) -> None:
    manifest, engine = segmenter.bundle.manifest, segmenter.engine_info
    table = Table()
    table.add_column("case", overflow="fold")
    table.add_column("result")
    for region in manifest.regions:
        table.add_column(f"{region} ml", justify="right")
    table.add_column("s", justify="right")
    for result in results:
        volumes = result.report.get("volumes_ml", {})
        cells = [f"{volumes[r]:.1f}" if r in volumes else "" for r in manifest.regions]
        elapsed_ms = sum(result.report.get("elapsed_ms", {}).values())
        time_s = f"{elapsed_ms / 1000:.1f}" if result.status == "done" else ""
        table.add_row(result.name, result.status, *cells, time_s)
    console = _console()
    console.print(table)
    good = any(result.status != "failed" for result in results)
    where = f"Results in {output}" if good else "No results."
    console.print(
        f"{manifest.name} ({manifest.intended_use}), {engine.name} {engine.version} "
        f"{engine.precision}. {where}",
        soft_wrap=True,
    )


@main.command()
@click.argument("scan_dir", type=_PATH, required=False)
@click.option(
    "-o",
    "--output",
    type=_PATH,
    default=Path("attnseg-out"),
    show_default=True,
    help="Folder for the results.",
)
@_bundle_option
@_segment_options
@click.option("--overwrite", is_flag=True, help="Take finished cases again.")
@click.option(
    "--require-signature",
    "key",
    type=_PATH,
    metavar="PUBLIC_KEY",
    help="Run only a bundle that is signed by this key (PEM, Ed25519).",
)
@click.option("--t1", type=_PATH, help="File of this channel, instead of SCAN_DIR.")
@click.option("--t1ce", type=_PATH, help="File of this channel.")
@click.option("--t2", type=_PATH, help="File of this channel.")
@click.option("--flair", type=_PATH, help="File of this channel.")
@click.option(
    "--channel",
    "channels",
    multiple=True,
    callback=_parse_channels,
    metavar="NAME=FILE",
    help="File of a channel by the name that the model gives it.",
)
@click.pass_context
def run(
    ctx: click.Context,
    /,
    scan_dir: Path | None,
    output: Path,
    model: Path | None,
    overwrite: bool,
    key: Path | None,
    channels: dict[str, Path],
    **settings: Any,
) -> None:
    """Segment one case or a folder of cases.

    For each case, OUTPUT gets CASE_seg.nii.gz (labels in the scan's own grid), CASE.png and
    CASE.json. Finished cases are skipped on a second run. The exit code is 1 if a case failed.
    """
    named = {name: settings.pop(name) for name in ("t1", "t1ce", "t2", "flair")}
    files = {name: file for name, file in named.items() if file}
    if twice := set(files) & set(channels):
        raise click.UsageError(f"channel {twice.pop()} was given twice")
    files.update(channels)
    segmenter = _open_segmenter(model, settings, key)
    inputs = segmenter.bundle.manifest.channels
    scans = find_scans(scan_dir, files, inputs)
    prepare_output(output)
    failed = _run_cases(scans.cases, segmenter, output, overwrite, scans.problems)
    ctx.exit(1 if failed else 0)


@main.command()
@click.option(
    "-o",
    "--output",
    type=_PATH,
    default=Path("attnseg-demo"),
    show_default=True,
    help="Folder for the synthetic scan and the results.",
)
@_bundle_option
@_segment_options
@click.pass_context
def demo(ctx: click.Context, /, output: Path, model: Path | None, **settings: Any) -> None:
    """Segment a synthetic brain with a tumour.

    The scan is made from a seed, so the result is compared with the truth it was made with.
    """
    segmenter = _open_segmenter(model, settings)
    prepare_output(output)
    click.echo("making a synthetic scan", err=True)
    scans = find_cases(make_demo_scan(output), segmenter.bundle.manifest.channels)
    failed = _run_cases(scans.cases, segmenter, output, True, scans.problems)
    if not failed:
        score = score_demo(scans.cases[0], output, segmenter.bundle.manifest)
        dice = ", ".join(f"{region} {value:.3f}" for region, value in score.items())
        click.echo(f"Dice against the synthetic truth: {dice}")
        click.echo(f"Look at {output / (scans.cases[0].name + '.png')}")
    ctx.exit(1 if failed else 0)


def _parse_settings(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> Any:
    pairs = [value.partition("=") for value in values]
    if any(not (name and equals) for name, equals, _ in pairs):
        raise click.BadParameter("give FIELD=VALUE, such as learning_rate=1e-3.")
    return {name: text for name, _, text in pairs}


def _training_options(function: _Function) -> _Function:
    """The options that `train` and `ablate` share."""
    options = (
        click.option("--data", type=_PATH, required=True, help="Folder of labelled cases."),
        click.option(
            "--split", type=_PATH, help="JSON with lists train and validation of case names."
        ),
        click.option(
            "--set",
            "settings",
            multiple=True,
            callback=_parse_settings,
            metavar="FIELD=VALUE",
            help="Change a training setting, such as epochs=30; they are in docs/training.md.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def _show_log() -> None:
    """What the trainer logs goes to the terminal; other packages stay silent."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("attnseg").setLevel(logging.INFO)


def _refuse_data_folder(data: Path, output: Path) -> None:
    if output.exists() and output.resolve() == data.resolve():
        raise ConfigError(f"{output}: is the folder of the data; choose another with -o")


def _network_choices(
    model: str | None, attention: str | None, multi_scale: bool | None, settings: dict[str, str]
) -> dict[str, str]:
    """The settings, with those that have an option of their own."""
    chosen = dict(settings)
    onoff = None if multi_scale is None else str(multi_scale)
    options = {"attention": attention, "multi_scale": onoff}
    for name, value in options.items():
        if value is not None and name in settings:
            raise ConfigError(f"{name} was given as an option and by --set; leave one out")
        if value is not None:
            chosen[name] = value
    if model == "resunet" and (attention not in (None, "none") or multi_scale):
        raise ConfigError(
            "resunet is the network without attention and multi-scale module; give --model "
            "attnresunet --no-multi-scale --attention ... for one part of it"
        )
    return chosen


def _refuse_two_splits(split: Path | None, folds: int) -> None:
    if split and folds:
        raise ConfigError("--split and --set folds both make the split; leave one out")


@main.command()
@_training_options
@click.option("-o", "--output", type=_PATH, required=True, help="Folder for the run.")
@click.option(
    "--preset",
    help="paper: all of its section 3.3, so volumes are resized to 192x192x128 too; wide16: a "
    "wider network.  [default: the paper's network at full resolution]",
)
@click.option(
    "--model",
    help="unet3d, deepmedic, resunet or attnresunet, the paper's own.  [default: attnresunet]",
)
@click.option("--attention", help="On the skips: none, gap (the paper's), se or cbam.")
@click.option(
    "--multi-scale/--no-multi-scale", default=None, help="Dilated convolutions in the decoder."
)
@click.option(
    "--init", "initial", type=_PATH, help="Checkpoint or weights.safetensors to start from."
)
@click.option("--resume", is_flag=True, help="Go on from OUTPUT/last.pt.")
def train(
    data: Path,
    output: Path,
    preset: str | None,
    model: str | None,
    attention: str | None,
    multi_scale: bool | None,
    split: Path | None,
    initial: Path | None,
    resume: bool,
    settings: dict[str, str],
) -> None:
    """Train a network on labelled cases; the defaults are the paper's protocol.

    DATA holds cases with label files (BraTS), or a dataset.json of the Medical Segmentation
    Decathlon. For several GPUs: torchrun --nproc-per-node N -m attnseg train ...
    """
    _need("train", "torch", "matplotlib", "tensorboard", "safetensors")
    from attnseg.trainer.cases import open_data_set
    from attnseg.trainer.checkpoint import run_config, run_split
    from attnseg.trainer.config import TrainConfig
    from attnseg.trainer.devices import first_process
    from attnseg.trainer.loop import train as train_network
    from attnseg.trainer.model import network_settings
    from attnseg.trainer.paper import PROTOCOL
    from attnseg.trainer.split import Split, read_split

    _show_log()
    settings = _network_choices(model, attention, multi_scale, settings)
    _refuse_data_folder(data, output)
    if resume and (preset or model or split or initial or settings):
        raise ConfigError(
            "--resume goes on with the run's own configuration and split; leave --preset, --model, "
            "--attention, --multi-scale, --split, --init and --set out, or start a new run in "
            "another folder"
        )
    if resume:
        config = run_config(output)
        parts: Split | None = run_split(output)
    else:
        protocol = PROTOCOL if preset == "paper" and "spacing_mm" not in settings else {}
        config = TrainConfig(network_settings(model, preset)).with_settings(protocol | settings)
        parts = read_split(split) if split else None
        _refuse_two_splits(split, config.folds)
    best = train_network(open_data_set(data, parts, config), config, output, resume, initial)
    if first_process():
        click.echo(f"Best checkpoint: {best}. Next: attnseg export {best} -o model/")


@contextmanager
def _open_trained(model: Path | None, settings: Mapping[str, Any]) -> Iterator[Segmenter]:
    """A bundle, or a checkpoint exported to one that goes away again."""
    if model is None or model.is_dir():
        yield _open_segmenter(model, dict(settings))
        return
    _need("export", *EXPORT_MODULES)
    from attnseg.export.export import export_bundle

    with tempfile.TemporaryDirectory() as scratch:
        export_bundle(model, Path(scratch) / "bundle", samples=lambda _: ())
        yield _open_segmenter(Path(scratch) / "bundle", dict(settings))


@contextmanager
def _named_progress(count: int) -> Iterator[Callable[[str], None]]:
    """A bar that is told the name of each case that is done."""
    with _progress() as progress:
        task = progress.add_task("", total=count)

        def advance(name: str) -> None:
            progress.update(task, advance=1, description=name)

        yield advance


@main.command()
@click.option("--data", type=_PATH, required=True, help="Folder of labelled cases.")
@_trained_option
@click.option("-o", "--output", type=_PATH, required=True, help="Folder for the results.")
@click.option("--against", type=_PATH, help="Folder of another evaluation, to compare with.")
@click.option(
    "--cases",
    "which",
    type=click.Choice(["held-out", "trained-on", "all"]),
    default="held-out",
    show_default=True,
    help="Cases that the model was not trained on, that it was, or all.",
)
@click.option("--overwrite", is_flag=True, help="Replace an evaluation in OUTPUT.")
@_segment_options
@click.pass_context
def evaluate(
    ctx: click.Context,
    /,
    data: Path,
    model: Path | None,
    output: Path,
    against: Path | None,
    which: str,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Score a model on labelled cases, as attnseg run would segment them.

    OUTPUT gets cases.csv (every score of every case), summary.md, boxes.png and worst/.
    """
    _need("train", "torch", "matplotlib")
    from attnseg.trainer.cases import find_labelled_cases
    from attnseg.trainer.evaluate import CASES, cases_to_evaluate
    from attnseg.trainer.evaluate import evaluate as evaluate_cases

    _refuse_data_folder(data, output)
    if (output / CASES).exists() and not overwrite:
        raise ConfigError(
            f"{output}: holds an evaluation already; add --overwrite or choose another folder"
        )
    scans = find_labelled_cases(data)
    with _open_trained(model, settings) as segmenter:
        cases = cases_to_evaluate(scans, segmenter.bundle.manifest, which)
        prepare_output(output)
        with _named_progress(len(cases)) as advance:
            result = evaluate_cases(cases, segmenter, scans.task, output, against, advance)
    for name, reason in result.failed.items():
        click.echo(f"{name}: {_in_one_line(reason)}", err=True)
    for name, warnings in result.warnings.items():
        for warning in warnings:
            click.echo(f"{name}: warning: {warning}", err=True)
    _print_scores(result.scores)
    of = f"{len(result.scores)} of {len(cases)} cases" if result.failed else f"{len(cases)} case(s)"
    click.echo(f"Means over {of}; spread and more in {output / 'summary.md'}")
    ctx.exit(1 if result.failed else 0)


def _print_scores(scores: Any) -> None:
    from attnseg.trainer.evaluate import column

    table = Table()
    titles = ("", "Dice", "HD95, mm", "sensitivity", "specificity", "lesion-wise Dice")
    for title in titles:
        table.add_column(title, justify="right" if title else "left")
    for structure in next(iter(scores.values())):
        names = ("dice", "hd95_mm", "sensitivity", "specificity", "lesion_wise_dice")
        means = [column(scores, structure, name).mean() for name in names]
        cells = [
            f"{m:.1f}" if n == "hd95_mm" else f"{m:.3f}" for n, m in zip(names, means, strict=True)
        ]
        table.add_row(structure, *cells)
    _console().print(table)


@main.command()
@_training_options
@click.option("-o", "--output", type=_PATH, required=True, help="Folder for the four runs.")
@click.option("--preset", help="Size of the network: paper or wide16.  [default: paper]")
def ablate(
    data: Path, output: Path, preset: str | None, split: Path | None, settings: dict[str, str]
) -> None:
    """Train and evaluate the paper's ablation: attention and multi-scale, each off and on.

    Give the same command again to go on with an ablation that was stopped.
    """
    _need("export", "matplotlib", "tensorboard", *EXPORT_MODULES)
    from attnseg.trainer.ablate import ablate as run_ablation
    from attnseg.trainer.cases import open_data_set
    from attnseg.trainer.config import TrainConfig
    from attnseg.trainer.model import network_settings
    from attnseg.trainer.split import read_split

    _show_log()
    config = TrainConfig(network_settings(None, preset)).with_settings(settings)
    _refuse_two_splits(split, config.folds)
    _refuse_data_folder(data, output)
    data_set = open_data_set(data, read_split(split) if split else None, config)
    prepare_output(output)
    text = run_ablation(data_set, config, output, lambda path: _open_trained(path, {}))
    _console().print(Markdown(text))
    click.echo(f"Results in {output}")


@main.command()
@click.option("--preset", help="Size of the paper's network: paper or wide16.  [default: paper]")
def summary(preset: str | None) -> None:
    """Parameters and work of the networks, beside what the paper prints."""
    _need("train", "torch")
    from attnseg.trainer.model import MODELS, network_settings
    from attnseg.trainer.networks import cost_of
    from attnseg.trainer.paper import ABLATION, DIFFERENCES, RESULTS, Cost, variant_network

    network = network_settings(None, preset)
    rows = {
        f"ablation: {name}": (variant_network(network, variant), variant.paper)
        for name, variant in ABLATION.items()
    }
    rows |= {RESULTS[name].title: (MODELS[name], Cost()) for name in ("unet3d", "deepmedic")}
    table = Table()
    for title in ("", "parameters, M", "paper", "GMAC, 64^3", "paper"):
        table.add_column(title, justify="right" if title else "left")
    for title, (config, paper) in rows.items():
        own = cost_of(config)
        cells = ((own.parameters_m, 3), (paper.parameters_m, 1), (own.gmac, 2), (paper.gmac, 1))
        table.add_row(title, *("-" if v is None else f"{v:.{digits}f}" for v, digits in cells))
    _console().print(table)
    _console().print(DIFFERENCES)


@main.command()
@click.argument("scan_dir", type=_PATH)
@_trained_option
@click.option(
    "-o",
    "--output",
    type=_PATH,
    default=Path("attnseg-explain"),
    show_default=True,
    help="Folder for the pictures.",
)
@click.pass_context
def explain(ctx: click.Context, /, scan_dir: Path, model: Path | None, output: Path) -> None:
    """Draw the attention weights of each stage for one case or a folder of cases.

    OUTPUT gets CASE_attention.png and CASE_attention.csv.
    """
    _need("export", "torch", "safetensors", "matplotlib")
    from attnseg.export.checkpoint import load_trained
    from attnseg.runtime.executor import WindowOptions
    from attnseg.runtime.volume import read_volume
    from attnseg.trainer.explain import (
        attention_weights,
        check_attention,
        draw_weights,
        encode_weights_table,
    )

    if model is None or model.is_dir():
        model = (Bundle.load(model) if model else Bundle.default()).file("weights")
    trained = load_trained(model)
    check_attention(trained.network)
    scans = find_cases(scan_dir, trained.preparation.task.channels)
    prepare_output(output)
    edge = trained.patch
    options = WindowOptions((edge,) * 3, trained.overlap, trained.network.config.stride)
    with _named_progress(len(scans.cases)) as advance:
        for case in scans.cases:
            volume = read_volume(case.files)
            stages = attention_weights(trained.network, trained.preparation, options, volume)
            files = {
                f"{case.name}_attention.png": draw_weights(stages, case.name),
                f"{case.name}_attention.csv": encode_weights_table(stages),
            }
            write_files(output, files)
            advance(case.name)
    for name, problem in scans.problems.items():
        click.echo(f"{name}: {_in_one_line(problem)}", err=True)
    click.echo(f"Results in {output}")
    ctx.exit(1 if scans.problems else 0)


def _gate_options(function: _Function) -> _Function:
    """The options of the parity gate, which `export` and `verify` share."""
    options = (
        click.option(
            "--data",
            type=_PATH,
            help="Labelled cases to compare the precisions on.  [default: a synthetic one]",
        ),
        click.option("--budget-dice", type=float, help="Largest drift of Dice.  [default: 0.002]"),
        click.option(
            "--budget-volume", type=float, help="Largest drift of a volume, in %.  [default: 0.5]"
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


@main.command()
@click.argument("model", type=_PATH)
@click.option("-o", "--output", type=_PATH, required=True, help="Folder for the bundle.")
@click.option("--spec", type=_PATH, help="JSON that says what an ONNX file takes and gives.")
@click.option("--fp16", is_flag=True, help="An fp16 graph too, and an engine built from it.")
@click.option("--int8", is_flag=True, help="An int8 graph too, and an engine built from it.")
@click.option("--calibrate", type=_PATH, metavar="FOLDER", help="Scans to find int8 ranges on.")
@click.option(
    "--io",
    type=click.Choice(["fp16", "fp32"]),
    default="fp16",
    show_default=True,
    help="Type of the fp16 graph's input and output.",
)
@click.option(
    "--builder",
    type=click.Choice(["tensorrt-rtx", "tensorrt", "none"]),
    default="tensorrt-rtx",
    show_default=True,
    help="What builds engines; tensorrt needs the GPU it builds for.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="GPU to build for, such as rtx3090 or sm89; give it again for more.  [default with "
    "--fp16 or --int8: rtx3090; with --builder tensorrt: this machine's]",
)
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Windows at a time."
)
@click.option("--workspace", type=click.IntRange(1), metavar="MB", help="Scratch memory, at most.")
@click.option(
    "--compatible",
    type=click.Choice(["same", "ampere+"]),
    default="same",
    show_default=True,
    help="GPUs that the engine runs on: the target only, or all since Ampere.",
)
@click.option(
    "--version-compatible", is_flag=True, help="For later versions of --builder tensorrt too."
)
@click.option("--timing-cache", type=_PATH, help="File of measured kernels for --builder tensorrt.")
@_gate_options
@click.option("--sign", type=_PATH, help="PEM file of an Ed25519 private key to sign with.")
@click.option("--name", help="Name of the model.")
@click.option("--description", help="What the model is for.")
@click.option("--intended-use", help="Who may use it for what.")
def export(
    model: Path,
    output: Path,
    data: Path | None,
    budget_dice: float | None,
    budget_volume: float | None,
    **settings: Any,
) -> None:
    """Export a model to a bundle for attnseg run.

    MODEL is a checkpoint (best.pt), the weights.safetensors of a bundle, or an ONNX file of a 3-D
    model that was trained elsewhere, with --spec. Every precision is compared with the model before
    anything is written.
    """
    _need("export", *EXPORT_MODULES)
    from attnseg.export.export import export_bundle
    from attnseg.export.options import make_options
    from attnseg.export.samples import read_samples

    options = make_options(budget_dice, budget_volume, settings)
    samples = partial(read_samples, data) if data else None
    with _export_progress() as progress:
        exported = export_bundle(model, output, options, samples, progress)
    _print_report(exported.report)
    if exported.in_fp32:
        click.echo(f"In fp32, as they may overflow: {', '.join(exported.in_fp32)}")
    click.echo(
        f"Bundle: {exported.bundle.folder}. Next: attnseg run scan_dir/ -o out/ --model {output}"
    )


@contextmanager
def _export_progress() -> Iterator[Any]:
    """An `ExportProgress` that moves a bar: silent steps, and the phases of an engine's build."""
    from attnseg.export.export import ExportProgress

    with _progress() as progress:
        task = progress.add_task("", total=None)

        def step(name: str) -> None:
            progress.update(task, description=name, total=None)

        def build(phase: str, done: int, steps: int) -> None:
            progress.update(task, description=phase, completed=done, total=steps)

        yield ExportProgress(step, build)


def _print_report(report: Any) -> None:
    from attnseg.export.card import PARITY_HEADER, not_run_lines, parity_rows

    _print_table(PARITY_HEADER, parity_rows(report))
    for line in not_run_lines(report):
        click.echo(line)


def _print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table()
    for title in header:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*row)
    _console().print(table)


@main.command()
@click.argument("folder", type=_PATH)
@_gate_options
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    folder: Path,
    data: Path | None,
    budget_dice: float | None,
    budget_volume: float | None,
) -> None:
    """Run a bundle's parity gate again, on this machine.

    The exit code is 1 if a precision is over the budget, which is the bundle's own unless given.
    """
    _need("export", *EXPORT_MODULES)
    from attnseg.export.options import make_budget
    from attnseg.export.parity import describe_failure
    from attnseg.export.samples import read_samples
    from attnseg.export.verify import verify_bundle

    own = Bundle.load(folder).manifest.budget
    dice = budget_dice or (own.dice if own else None)
    budget = make_budget(dice, budget_volume or (own.volume_percent if own else None))
    samples = partial(read_samples, data) if data else None
    with _export_progress() as progress:
        report = verify_bundle(folder, budget, samples, progress.step)
    _print_report(report)
    for failed in report.failures():
        reason = describe_failure(failed, budget)
        click.echo(f"over the budget: {failed.precision} by {failed.engine}: {reason}", err=True)
    ctx.exit(1 if report.failures() else 0)


@main.command()
@click.argument("folder", type=_PATH)
def inspect(folder: Path) -> None:
    """Show what a bundle holds: files, precisions, targets, sizes, checksums, layers."""
    from attnseg.inspect import inspect_bundle

    bundle = Bundle.load(folder)
    found = inspect_bundle(bundle)
    manifest = bundle.manifest
    click.echo(f"{manifest.name}: {manifest.description}")
    click.echo(f"{manifest.intended_use}; made with {manifest.created_with}")
    click.echo(f"sha256 {bundle.sha256}")
    _print_table(("file", "role", "precision", "for", "MB", "sha256"), found.files)
    for line in found.layers:
        click.echo(line)


@main.command()
@click.option("--model", type=_PATH, help="Bundle to try.  [default: the shipped one]")
@click.pass_context
def doctor(ctx: click.Context, model: Path | None) -> None:
    """Say what this machine can run, and what to install for the rest."""
    findings = examine(model)
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        advice = f": {finding.advice}" if finding.advice else ""
        mark = "ok" if finding.well else "--"
        click.echo(f"{mark}  {finding.subject:<{width}}  {finding.state}{advice}")
    engines = [f for f in findings if f.subject.startswith("engine")]
    ctx.exit(0 if any(f.well for f in engines) else 1)


def _need(extra: str, *modules: str) -> None:
    """Name the extra to install when a module of it is missing."""
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        raise ConfigError(
            f"attnseg {extra} needs {', '.join(missing)}; pip install 'attnseg[{extra}]'"
        )
