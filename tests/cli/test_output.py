"""What commands print: lines for people on either stream, one JSON document for machines."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from attnseg import Bundle, __version__
from attnseg.cli import progress
from attnseg.cli.app import main
from attnseg.evaluation.scores import SCORES, read_scores
from attnseg.runtime.model.bundle import default_folder

FP32 = ("--precision", "fp32")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def document(result: Result) -> dict[str, Any]:
    """The document that is all of a command's standard output."""
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["attnseg"] == __version__
    return found


@pytest.fixture
def scans(small_scan: Path) -> Path:
    """A folder of two cases: `small`, and `lost`, which has no T1."""
    shutil.copytree(small_scan / "small", small_scan / "lost")
    (small_scan / "lost" / "small_t1.nii.gz").unlink()
    for file in (small_scan / "lost").iterdir():
        file.rename(file.with_name(file.name.replace("small", "lost")))
    return small_scan


def test_without_a_terminal_each_case_is_a_line_as_it_ends(scans: Path, tmp_path: Path) -> None:
    first = call("run", scans, "-o", tmp_path / "out", *FP32).stderr.splitlines()
    assert first[1] == "1/2 lost: failed"
    assert re.fullmatch(r"2/2 small: done, \d+\.\d s", first[-1])
    again = call("run", scans, "-o", tmp_path / "out", *FP32).stderr.splitlines()
    assert again[-1] == "2/2 small: skipped"


def test_quiet_leaves_errors_and_the_result(scans: Path, tmp_path: Path) -> None:
    result = call("run", scans, "-o", tmp_path / "out", *FP32, "--quiet")
    assert result.stderr.startswith("lost: ")
    assert result.stderr.count("\n") == 1
    assert "small" in result.stdout and "Results in" in result.stdout


def test_verbose_tells_engine_options_and_times(small_scan: Path, tmp_path: Path) -> None:
    options = ("--engine", "onnxruntime", "--threads", "1", "--verbose")
    result = call("run", small_scan, "-o", tmp_path / "out", *options)
    assert re.search(r"^engine: onnxruntime \S+ fp32 on cpu, 1 threads$", result.stderr, re.M)
    assert re.search(r"^options: tta none, fuse vote, window ", result.stderr, re.M)
    assert re.search(r"^small: load \d+ ms, .*network \d+ ms", result.stderr, re.M)


def test_run_gives_machines_every_case(scans: Path, tmp_path: Path) -> None:
    result = call("run", scans, "-o", tmp_path / "out", *FP32, "--json")
    assert result.exit_code == 1
    found = document(result)
    assert found["command"] == "run"
    assert found["model"]["manifest_sha256"] == Bundle.default().sha256
    assert found["engine"]["precision"] == "fp32"
    assert found["output"] == str(tmp_path / "out")
    lost, small = found["cases"]
    assert (lost["name"], lost["status"], lost["volumes_ml"]) == ("lost", "failed", None)
    assert lost["error"]["type"] == "ScanError"
    assert "case lost has no file for t1" in lost["error"]["cause"]
    assert lost["error"]["mend"] == "add it"
    report = json.loads((tmp_path / "out" / "small.json").read_text())
    assert (small["name"], small["status"], small["error"]) == ("small", "done", None)
    for field in ("volumes_ml", "elapsed_ms", "warnings"):
        assert small[field] == report[field]


@pytest.mark.parametrize(
    ("arguments", "error", "exit_code"),
    [
        (("run", "nowhere"), {"type": "ScanError", "cause": "nowhere: does not exist"}, 1),
        (("run", ".", "--threads", "0"), {"type": "ConfigError"}, 2),
        (("run", ".", "--max-memory", "4"), {"type": "UsageError"}, 2),
        (
            ("evaluate", "--data", ".", "-o", "."),
            {"type": "ConfigError", "mend": "choose another output folder"},
            2,
        ),
        (("verify", "nowhere"), {"type": "BundleError", "mend": "make one with attnseg export"}, 1),
        (
            ("run", ".", "--device", "cpu", "--max-memory", "4GB"),
            {"mend": "leave --max-memory out, or give --device cuda to see why no GPU is used"},
            2,
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_error_is_a_document_too(
    arguments: tuple[str, ...],
    error: dict[str, str],
    exit_code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*arguments, "--json")
    assert result.exit_code == exit_code
    assert "error: " in result.stderr
    assert document(result)["error"].items() >= error.items()


def test_evaluate_gives_machines_scores_and_means(small_scan: Path, tmp_path: Path) -> None:
    options = ("--data", small_scan, "--cases", "all", *FP32, "-o", tmp_path / "out")
    result = call("evaluate", *options, "--json")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"^1/1 small: done, \d+\.\d s$", result.stderr, re.M)
    found = document(result)
    (case,) = found["cases"]
    assert (case["name"], case["status"], case["error"]) == ("small", "done", None)
    scores = read_scores(tmp_path / "out")["small"]
    for structure, values in scores.items():
        expected = {name: getattr(values, name) for name in SCORES}
        assert case["scores"][structure] == pytest.approx(expected)
        assert found["means"][structure] == pytest.approx(expected)  # of one case


def test_the_other_commands_give_machines_what_they_show() -> None:
    inspected = document(call("inspect", default_folder(), "--json"))
    manifest = Bundle.default().manifest
    assert inspected["name"] == manifest.name
    assert inspected["files"]["model.onnx"]["sha256"] == manifest.files["model.onnx"].sha256
    assert any("Conv" in line for line in inspected["layers"])

    examined = document(call("doctor", "--json"))
    assert examined["usable"] is True
    engines = {f["subject"]: f for f in examined["findings"] if f["subject"].startswith("engine")}
    assert engines["engine openvino"]["well"] is True

    summary = document(call("summary", "--json"))
    both = next(n for n in summary["networks"] if n["network"] == "ablation: both")
    assert both["cost"]["parameters_m"] == pytest.approx(3.493, abs=1e-3)
    assert both["paper"] == {"parameters_m": 3.6, "gmac": 13.1}


def test_verify_gives_machines_what_was_measured() -> None:
    result = call("verify", default_folder(), "--json")
    assert result.exit_code == 0, result.stderr
    found = document(result)
    assert found["within_budget"] is True
    assert {m["precision"] for m in found["measured"]} >= {"fp32"}
    assert "openvino fp32: synthetic brain" in result.stderr  # a line as each stage begins


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal in place of standard error, and what it receives."""
    received = io.StringIO()
    shown = Console(file=received, force_terminal=True, width=80, markup=False)
    monkeypatch.setattr(progress, "console", lambda stderr: shown)
    return received


def test_a_terminal_shows_a_bar_over_all_cases(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    received = on_terminal(monkeypatch)
    with progress.case_progress(3) as bar:
        bar.case_started("a")
        bar.case_advanced(0.5)
        (task,) = bar._bar.tasks
        assert (task.description, task.completed, task.total) == ("1/3 a", 0.5, 3)
        bar.case_ended("a", "done", 1.0)
        bar.case_started("b")
        assert (task.description, task.completed) == ("2/3 b", 1)
    assert "2/3 b" in received.getvalue()
    assert capsys.readouterr().err == ""  # no lines beside it


def test_ended_cases_are_timed_and_failed_ones_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.case_progress(2) as shown:
        ended = progress.ended_cases(shown)
        ended("a", None)
        ended("b", ValueError())
    assert re.fullmatch(r"1/2 a: done, 0\.\d s\n2/2 b: failed\n", capsys.readouterr().err)


def leaves(group: click.Group, *before: str) -> dict[tuple[str, ...], click.Command]:
    """Every command, by the words that call it; a group is none."""
    found: dict[tuple[str, ...], click.Command] = {}
    for name, command in sorted(group.commands.items()):
        inner = isinstance(command, click.Group)
        found |= leaves(command, *before, name) if inner else {(*before, name): command}
    return found


COMMANDS = leaves(main)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_takes_the_options_on_messages_and_names_its_choices(
    words: tuple[str, ...],
) -> None:
    text = call(*words, "--help").stdout
    assert all(option in text for option in ("--quiet", "--verbose", "--debug"))
    types = re.findall(r"--[\w-]+ (?:TEXT|INTEGER|FLOAT)\b", text)
    assert set(types) <= {"--name TEXT", "--description TEXT", "--intended-use TEXT"}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_no_path_may_be_empty(words: tuple[str, ...]) -> None:
    """An unset variable of the shell would otherwise be the current folder."""
    kinds = {p.name: p for p in COMMANDS[words].params if "Path" in type(p.type).__name__}
    for parameter in kinds.values():
        given = [max(parameter.opts, key=len), ""] if parameter.opts[0][0] == "-" else [""]
        result = call(*words, *given)
        assert result.exit_code == 2
        assert "the path is empty; give . for the current folder" in result.stderr, given
