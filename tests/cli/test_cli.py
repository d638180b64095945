"""The command line, tested through its output and exit codes."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from attnseg import Bundle, Segmenter, __version__
from attnseg.cli.app import main
from attnseg.cli.parameters import parse_bytes
from attnseg.runtime.cuda.gpu import Gpu
from attnseg.runtime.errors import EngineError, UnavailableError
from attnseg.runtime.model.bundle import default_folder, file_entry
from attnseg.runtime.model.manifest import EngineBuild
from tests.bundles import write_bundle
from tests.conftest import WEIGHTS

FP32 = ("--precision", "fp32")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "attnseg", *(str(a) for a in arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_run_prints_a_summary_and_succeeds(small_scan: Path, tmp_path: Path) -> None:
    result = call("run", small_scan, "-o", tmp_path / "out", *FP32)
    assert result.exit_code == 0, result.output
    assert "small" in result.stdout
    assert "WT ml" in result.stdout
    assert "not for clinical use" in result.stdout
    assert (tmp_path / "out" / "small_seg.nii.gz").exists()


def test_run_takes_files_by_channel(small_scan: Path, tmp_path: Path) -> None:
    folder = small_scan / "small"
    names = ("t1", "t1ce", "t2", "flair")
    files = [part for n in names for part in (f"--{n}", folder / f"small_{n}.nii.gz")]
    result = call("run", *files, "-o", tmp_path / "out", *FP32)
    assert result.exit_code == 0, result.output
    channels = [p for n in names for p in ("--channel", f"{n}={folder / f'small_{n}.nii.gz'}")]
    result = call("run", *channels, "-o", tmp_path / "out2", *FP32)
    assert result.exit_code == 0, result.output
    first, second = ((tmp_path / o / "small_seg.nii.gz").read_bytes() for o in ("out", "out2"))
    assert first == second


def test_the_report_holds_what_was_asked_for(small_scan: Path, tmp_path: Path) -> None:
    options = ("--tta", "paper", "--fuse", "mean", "--window", "48", "--overlap", "0.5")
    more = ("--min-voxels", "20", "--engine", "onnxruntime", "--threads", "1")
    result = call("run", small_scan, "-o", tmp_path, *options, *more)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "small.json").read_text())
    assert report["options"] == {
        "tta": "paper",
        "fuse": "mean",
        "window": [48, 48, 48],
        "overlap": 0.5,
        "empty_windows": "skip",
        "min_voxels": 20,
        "resample": "auto",
    }
    assert report["engine"]["name"] == "onnxruntime"


def test_a_folder_with_a_bad_case_ends_with_exit_code_1(small_scan: Path, tmp_path: Path) -> None:
    shutil.copytree(small_scan / "small", small_scan / "lost")
    (small_scan / "lost" / "small_t1.nii.gz").unlink()
    for file in (small_scan / "lost").iterdir():
        file.rename(file.with_name(file.name.replace("small", "lost")))
    result = call("run", small_scan, "-o", tmp_path / "out", *FP32)
    assert result.exit_code == 1
    assert "lost: " in result.stderr
    assert "no file for t1" in result.stderr
    assert (tmp_path / "out" / "small.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "nowhere", "-o", "out"), "error: nowhere: does not exist"),
        (("run", ".", "-o", "out"), "error: .: holds no case"),
        (("run", ".", "-o", "out", "--model", "."), "error: .: is not a bundle"),
        (("train", "--data", "nowhere", "-o", "out"), "error: nowhere: does not exist"),
        (("export", "x.pt", "-o", "out"), "error: x.pt: does not exist"),
        (("verify", "nowhere"), "error: nowhere: is not a bundle"),
        (("inspect", "."), "error: .: is not a bundle"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_failures_are_one_line_without_a_traceback_and_end_with_1(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_error(call(*arguments), message, 1)
    assert list(tmp_path.iterdir()) == []


def check_error(result: Result, message: str, exit_code: int) -> None:
    """Check that a command printed one line, after those that say what is loaded."""
    assert result.exit_code == exit_code, result.stderr
    begun = ("loading ", "bundle")  # steps that begin before the arguments can be judged
    lines = [line for line in result.stderr.splitlines() if not line.startswith(begun)]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(message), result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("run", "-o", "out"),
            "error: no scan was given; give a scan folder or",
        ),
        (("run", ".", "-o", "out", "--engine", "x"), "error: engine x does not exist"),
        (("run", ".", "--device", "tpu"), "error: device tpu does not exist; choose auto, cuda, c"),
        (
            ("run", ".", "--device", "cpu", "--engine", "tensorrt"),
            "error: engine tensorrt runs on cuda, device cpu is requested; leave one of them out",
        ),
        (
            ("run", ".", "--device", "cpu", "--max-memory", "4GB"),
            "error: a limit of device",
        ),
        (("run", ".", "-o", "out", "--window", "33"), "error: window must be full or a multiple"),
        (("train", "--data", ".", "-o", "o", "--preset", "x"), "error: preset x does not exist"),
        (("train", "--data", ".", "-o", "o", "--set", "a=b"), "error: unknown training field a"),
        (("train", "--data", ".", "-o", "."), "error: .: is the folder of the data; choose"),
        (("evaluate", "--data", ".", "-o", "."), "error: .: is the folder of the data; choose"),
        (
            ("train", "--data", ".", "-o", "o", "--attention", "se", "--set", "attention=gap"),
            "error: attention was given twice; leave --attention or --set attention out",
        ),
        (
            ("train", "--data", ".", "-o", "o", "--model", "resunet", "--attention", "se"),
            "error: resunet is the network without attention",
        ),
        (("export", "x.pt", "-o", "out", "--fp16", "--target", "gtx1080"), "error: target gtx1080"),
        (
            ("export", "x.pt", "-o", "out", "--budget-dice", "0"),
            "error: budget.dice must be",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_invalid_value_is_one_line_and_wrong_usage(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_error(call(*arguments), message, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["much", "4 apples", "-1GB", "", "4", "4000000000"])
def test_an_amount_of_memory_that_is_none_is_refused(text: str) -> None:
    result = call("run", ".", "--max-memory", text)
    assert result.exit_code == 2
    assert f"give an amount with its unit, such as 4GB or 500MB, got {text!r}" in result.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4GB", 4 * 10**9), ("1.5 gib", 3 * 2**29), ("500MB", 5 * 10**8)],
)
def test_an_amount_of_memory_is_read_with_its_unit(text: str, expected: int) -> None:
    assert parse_bytes(None, None, text) == expected  # type: ignore[arg-type]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise UnavailableError("no NVIDIA driver on this machine")

    for module in ("tensorrt", "onnxruntime_cuda"):
        monkeypatch.setattr(f"attnseg.runtime.engines.{module}.find_gpu", none)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_cuda_is_refused_unless_there_is_a_fallback(
    small_scan: Path, tmp_path: Path
) -> None:
    refused = call("run", small_scan, "-o", tmp_path / "out", "--device", "cuda")
    assert refused.exit_code == 1
    assert refused.stderr == "error: device cuda: no NVIDIA driver on this machine\n"
    options = ("--device", "cuda", "--fallback", "cpu", "--max-memory", "4GB")
    result = call("run", small_scan, "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith("not used: device cuda: no NVIDIA driver on this machine\n")
    report = json.loads((tmp_path / "out" / "small.json").read_text())
    assert report["engine"]["device"] == "cpu"
    again = call("run", small_scan, "-o", tmp_path / "out", "--device", "cpu")
    assert "skipped" in again.stdout  # same engine, whether by fallback or by choice


def test_debug_shows_the_traceback_of_a_failed_case(small_scan: Path, tmp_path: Path) -> None:
    (small_scan / "small" / "small_t2.nii.gz").write_bytes(b"")
    plain = call("run", small_scan, "-o", tmp_path, *FP32)
    assert "Traceback" not in plain.stderr
    assert plain.stderr.count("\n") == 3  # the model, the case, and its error
    assert "Traceback" in call("run", small_scan, "-o", tmp_path, *FP32, "--debug").stderr


def test_resume_takes_no_other_settings(tmp_path: Path) -> None:
    result = call("train", "--data", ".", "-o", tmp_path, "--resume", "--set", "epochs=9")
    assert result.exit_code == 2
    assert "a resumed run keeps its own configuration" in result.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = call("run", tmp_path / "nowhere", "-o", tmp_path, "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_a_tampered_bundle_is_refused(small_scan: Path, tmp_path: Path) -> None:
    model = shutil.copytree(default_folder(), tmp_path / "model")
    with (model / "model.onnx").open("ab") as stream:
        stream.write(b"x")
    result = call("run", small_scan, "-o", tmp_path / "out", "--model", model)
    assert result.exit_code == 1
    assert "does not match its checksum" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_read_is_named(
    small_scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object) -> None:  # chmod does not restrict root, the user in containers
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    result = call("run", small_scan, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert f"error: {small_scan}: cannot be read (Permission denied)" in result.stderr


def test_an_output_that_cannot_be_made_is_refused(small_scan: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output, reason in (
        (tmp_path / "file" / "out", f"{tmp_path / 'file'}: is a file, not a folder"),
        (Path("/proc/out"), "/proc/out: cannot be written to"),
    ):
        result = call("run", small_scan, "-o", output)
        assert result.exit_code == 1
        assert f"error: {reason}" in result.stderr
        assert "choose another output folder" in result.stderr


def test_a_disk_that_fills_up_fails_the_case_and_leaves_nothing(
    small_scan: Path, tmp_path: Path
) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    process = start("run", small_scan, "-o", tmp_path / "out", *FP32, preexec_fn=limit)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "results could not be written (File too large)" in errors
    assert "Traceback" not in errors
    assert list((tmp_path / "out").iterdir()) == []


def test_ctrl_c_keeps_finished_cases_and_leaves_no_half_ones(
    small_scan: Path, tmp_path: Path
) -> None:
    for index in range(30):
        target = shutil.copytree(small_scan / "small", small_scan / f"c{index:02}")
        for file in target.iterdir():
            file.rename(file.with_name(file.name.replace("small", target.name)))
    out = tmp_path / "out"
    process = start("run", small_scan, "-o", out, "--tta", "mirror8", *FP32)
    deadline = time.monotonic() + 240
    while not list(out.glob("*.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopped; finished cases are kept" in errors
    assert "Traceback" not in errors
    finished = {f.stem for f in out.glob("*.json")}
    assert 1 <= len(finished) < 31
    for name in finished:
        assert (out / f"{name}_seg.nii.gz").exists()
    assert not list(out.glob(".*"))


def test_the_demo_finds_its_tumour(tmp_path: Path) -> None:
    result = call("demo", "-o", tmp_path)
    assert result.exit_code == 0, result.output
    line = next(x for x in result.stdout.splitlines() if x.startswith("Dice"))
    dice = float(line.split("WT ")[1].split(",")[0])
    assert dice >= 0.8
    assert (tmp_path / "synthetic-glioma.png").exists()


def test_doctor_tells_what_runs() -> None:
    result = call("doctor")
    assert result.exit_code == 0
    for text in ("ok  engine openvino", "ok  engine onnxruntime", "ok  attnseg train"):
        assert text in result.stdout
    assert "checksums match" in result.stdout


def test_doctor_and_demo_take_another_model(tmp_path: Path) -> None:
    model = shutil.copytree(default_folder(), tmp_path / "model")
    (model / "model.onnx").write_bytes(b"")
    for command in (("doctor",), ("demo", "-o", tmp_path / "out")):
        result = call(*command, "--model", model)
        assert result.exit_code == 1
        assert "does not match its checksum" in result.output


def test_the_demo_leaves_other_scans_alone(tmp_path: Path, small_scan: Path) -> None:
    shutil.copytree(small_scan / "small", tmp_path / "demo" / "scan" / "small")
    result = call("demo", "-o", tmp_path / "demo", *FP32)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "demo" / "small.json").exists()


def test_overwrite_takes_finished_cases_again(small_scan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "done" in call("run", small_scan, "-o", out, *FP32).stdout
    assert "skipped" in call("run", small_scan, "-o", out, *FP32).stdout
    assert "done" in call("run", small_scan, "-o", out, *FP32, "--overwrite").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "x", "--window", "abc"), "give a number of voxels, such as 64, or full"),
        (("run", "x", "--overlap", "a"), "'a' is not a valid float"),
        (("run", "x", "--channel", "t1"), "give NAME=FILE, such as ct=scan.nii.gz"),
        (("run", "x", "--channel", "t1="), "give NAME=FILE, such as ct=scan.nii.gz, got 't1='"),
        (("run", "--t1", "a", "--channel", "t1=b"), "channel t1 was given twice"),
        (("run", "x", "--quiet", "--verbose"), "--quiet and --verbose exclude each other"),
        (("train", "-o", "x"), "Missing option '--data'"),
        (("train", "--data", "."), "Missing option '-o' / '--output'"),
        (("evaluate", "--data", "."), "Missing option '-o' / '--output'"),
        (("trian",), "No such command 'trian'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_usage_errors_are_one_line_too(arguments: tuple[str, ...], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_two_commands_of_the_readme_work_as_written(
    tmp_path: Path, small_scan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`attnseg export --fp16`, then `attnseg run scan_dir/` with the line that it prints."""
    shutil.copytree(small_scan, tmp_path / "here" / "scan_dir")
    monkeypatch.chdir(tmp_path / "here")
    result = call("export", "--fp16")
    assert result.exit_code == 0, result.output
    assert f"model: {WEIGHTS}" in result.stderr.splitlines()
    for step in ("range audit", "onnxruntime fp16: ", "tensorrt-rtx engine for sm86"):
        assert step in result.stderr
    assert "simulated by" in result.stdout
    assert "model-fp16-sm86.tensorrt-rtx): not run here" in result.stdout
    following = "attnseg run scan_dir/ --model attnseg-model -o attnseg-model-out"
    assert result.stdout.splitlines()[-1].endswith(f"Next: {following}")
    assert {f.name for f in Path("attnseg-model").iterdir()} >= {
        "manifest.json",
        "model-fp16.onnx",
        "model-fp16-sm86.tensorrt-rtx",
    }
    taken = call("export", "--fp16")
    assert taken.exit_code == 1
    error = (
        "error: attnseg-model: holds a bundle already; give --overwrite or choose another folder"
    )
    assert taken.stderr.splitlines()[-1] == error

    result = call("run", "scan_dir/")
    assert result.exit_code == 0, result.output
    shipped = Bundle.default().manifest.name
    assert f"model: {shipped} (shipped with attnseg)" in result.stderr.splitlines()
    assert Path("attnseg-out/small_seg.nii.gz").exists()
    result = call(*following.split()[1:])
    assert result.exit_code == 0, result.output
    assert "(attnseg-model)" in next(x for x in result.stderr.splitlines() if "model: " in x)
    assert Path("attnseg-model-out/small_seg.nii.gz").exists()
    check_engine_of_the_rtx_3090(Path("attnseg-model"))


def check_engine_of_the_rtx_3090(model: Path) -> None:
    """A bundle is inspected, and verified with a budget that nothing keeps."""
    found = call("inspect", model)
    assert found.exit_code == 0, found.output
    convolutions = dict(re.findall(r"(model\S*\.onnx): .*?(\d+ Conv) ", found.stdout))
    assert convolutions["model.onnx"] == convolutions["model-fp16.onnx"], found.stdout
    assert f"{convolutions['model.onnx']} float16" in found.stdout
    strict = call("verify", model, "--budget-volume", "1e-9")
    assert strict.exit_code == 1, strict.output
    assert "over the budget: fp16 (simulated by onnxruntime" in strict.stderr


def test_what_is_over_the_budget_is_left_out_with_the_option_that_keeps_it(
    tmp_path: Path, small_scan: Path
) -> None:
    choices = ("--int8", "--calibrate", small_scan, "--builder", "none", "--budget-dice", "1")
    result = call("export", WEIGHTS, "-o", tmp_path / "model", *choices)
    assert result.exit_code == 1, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: model-int8.onnx is left out of the bundle: int8 (onnxruntime")
    option = re.search(r"; keep it with --budget-volume (\S+), or leave --int8 out$", last)
    assert option and float(option[1]) > 0.5, last
    assert "Bundle: " in result.stdout
    files = Bundle.load(tmp_path / "model").manifest.files
    assert "model.onnx" in files and "model-int8.onnx" not in files


@pytest.mark.parametrize("command", ["export", "verify"])
@pytest.mark.parametrize("option", ["--budget-dice", "--budget-volume"])
def test_a_budget_of_nothing_is_refused(command: str, option: str, tmp_path: Path) -> None:
    arguments = (default_folder(),) if command == "verify" else ("-o", tmp_path / "model")
    result = call(command, *arguments, option, 0)
    assert result.exit_code == 2
    name = option[2:].replace("-", ".")
    assert re.search(rf"error: {name}\w* must be above 0 and at most \d+, got 0", result.stderr)
    assert not (tmp_path / "model").exists()


def test_help_shows_everyday_options_before_the_rest() -> None:
    for command, everyday, later in (
        ("run", ("--model", "--output"), ("Engine and device:", "--stream", "--engine")),
        ("export", ("--fp16", "--output"), ("TensorRT engines:", "--workspace")),
    ):
        text = call(command, "--help").stdout
        first, *headed = re.split(r"^(?=\S.*:$)", text.split("\nOptions:\n")[1], flags=re.M)
        assert all(name in first for name in everyday), text
        assert len(headed) >= 2
        for name in later:
            assert name not in first
        assert first.count(" --") <= 10


def test_train_export_run_is_one_straight_way(tmp_path: Path, small_scan: Path) -> None:
    for name in ("b", "c"):
        target = shutil.copytree(small_scan / "small", small_scan / name)
        for file in target.iterdir():
            file.rename(file.with_name(file.name.replace("small", name)))
    settings = ("epochs=1", "steps_per_epoch=1", "patch=32", "precision=fp32")
    flags = [part for s in settings for part in ("--set", s)]
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["b", "small"], "validation": ["c"]}))
    more = ("--split", split, "--preset", "wide16")
    result = call("train", "--data", small_scan, "-o", tmp_path / "run", *more, *flags)
    assert result.exit_code == 0, result.output
    assert f"attnseg export {tmp_path / 'run' / 'best.pt'}" in result.stdout
    words = ("--name", "mine", "--description", "for me", "--intended-use", "none")
    result = call("export", tmp_path / "run" / "best.pt", "-o", tmp_path / "model", *words)
    assert result.exit_code == 0, result.output
    assert "fp32 openvino" in result.stdout
    manifest = Bundle.load(tmp_path / "model").manifest
    assert (manifest.name, manifest.description, manifest.intended_use) == (
        "mine",
        "for me",
        "none",
    )
    assert manifest.network["widths"] == [16, 32, 64, 128]
    assert manifest.training is not None
    assert manifest.training.validation_cases == ("c",)
    result = call("run", small_scan, "-o", tmp_path / "out", "--model", tmp_path / "model", *FP32)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "b.json").read_text())
    assert report["options"]["window"] == [32, 32, 32]
    check_evaluation(small_scan, tmp_path)


def check_evaluation(data: Path, folder: Path) -> None:
    """Evaluate and explain the bundle in `folder`, whose model was not trained on case c."""
    common = ("--data", data, "--model", folder / "model", *FP32)
    result = call("evaluate", *common, "-o", folder / "evaluation")
    assert result.exit_code == 0, result.output
    assert "Means over 1 case(s)" in result.stdout
    taken = call("evaluate", *common, "-o", folder / "evaluation")
    assert taken.exit_code == 1
    assert "holds an evaluation already; give --overwrite" in taken.stderr
    assert {f.name for f in (folder / "evaluation").iterdir()} == {
        "cases.csv",
        "summary.md",
        "boxes.png",
        "confusion.csv",
        "confusion.png",
        "worst",
    }
    again = ("-o", folder / "again", "--against", folder / "evaluation", "--cases", "all")
    result = call("evaluate", *common, *again)
    assert result.exit_code == 0, result.output
    assert "1 cases that both evaluate" in (folder / "again" / "summary.md").read_text()
    result = call("explain", data / "c", "--model", folder / "model", "-o", folder / "explained")
    assert result.exit_code == 0, result.output
    names = {f.name for f in (folder / "explained").iterdir()}
    assert names == {"c_attention.png", "c_attention.csv"}


def test_summary_prints_costs_beside_the_papers_and_says_why_they_differ() -> None:
    result = call("summary", "--preset", "paper")
    assert result.exit_code == 0, result.output
    both = next(line for line in result.stdout.splitlines() if "both" in line)
    assert [cell.strip() for cell in both.split("│")[2:6]] == ["3.493", "3.6", "12.75", "13.1"]
    words = " ".join(result.stdout.split("┘")[1].split())
    assert words.count(". ") == 1  # two sentences
    assert words.startswith("The paper prints neither widths nor strides")


def test_the_version_is_told() -> None:
    assert __version__ in call("--version").output


def test_a_run_folder_that_is_a_file_is_refused_before_any_work(
    tmp_path: Path, small_scan: Path
) -> None:
    (tmp_path / "run").touch()
    result = call("train", "--data", small_scan, "-o", tmp_path / "run")
    assert result.exit_code == 1
    assert f"error: {tmp_path / 'run'}: is a file, not a folder" in result.stderr


@pytest.mark.parametrize(
    "command", [("run", "SCAN"), ("demo",), ("export",), ("train", "--data", "SCAN")]
)
def test_an_output_at_a_dangling_link_is_refused_before_any_work(
    command: tuple[str, ...], small_scan: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    given = [small_scan if a == "SCAN" else a for a in command]
    result = call(*given, "-o", link)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: {link}: is a link to {tmp_path}")
    assert not (tmp_path / "nowhere").exists()


def test_a_path_with_a_null_character_is_refused(small_scan: Path) -> None:
    result = call("run", small_scan, "-o", "a\0b")
    assert result.exit_code == 2
    assert "'a\\x00b' holds a null character, which no path can. See" in result.stderr


def test_doctor_shows_every_engine_of_a_bundle_and_why_it_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = Bundle.default()
    build = EngineBuild(
        builder="tensorrt-rtx",
        version="1.7.1",
        target="sm86",
        compatibility="same",
        version_compatible=False,
        window=(64, 64, 64),
        batch=1,
    )
    files = {
        **shipped.manifest.files,
        "for-3090": file_entry("engine", b"engine", "fp16", build),
    }
    contents = {n: (shipped.folder / n).read_bytes() for n in shipped.manifest.files}
    manifest = replace(shipped.manifest, files=files)
    write_bundle(tmp_path / "model", manifest, {**contents, "for-3090": b"engine"})
    ada = Gpu("NVIDIA GeForce RTX 4090", "sm89", 24 << 30, "13.0")
    for module in ("doctor", "runtime.engines.tensorrt"):
        monkeypatch.setattr(f"attnseg.{module}.find_gpu", lambda: ada)
    result = call("doctor", "--model", tmp_path / "model")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert any("gpu" in x and "RTX 4090, compute capability 8.9" in x for x in lines)
    (engine,) = [x for x in lines if "engine tensorrt-rtx (for-3090)" in x]
    assert engine.startswith("--")
    assert "compute capability 8.6, this GPU is 8.9; export the model with --target sm89" in engine
    used = [x for x in lines if "used by default" in x]
    assert len(used) == 1 and "engine openvino" in used[0]


def test_run_says_why_an_engine_of_the_bundle_is_not_used(
    small_scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Segmenter.__init__

    def opened(self: Segmenter, *args: Any, **rest: Any) -> None:
        kept(self, *args, **rest)
        self.refusals = (EngineError("tensorrt-rtx (e): no NVIDIA driver"),)

    monkeypatch.setattr(Segmenter, "__init__", opened)
    result = call("run", small_scan, "-o", tmp_path / "out", *FP32)
    assert result.exit_code == 0, result.output
    assert "not used: tensorrt-rtx (e): no NVIDIA driver" in result.stderr
