"""Commands under limits of the system: success, or one line, and never a hang or a traceback."""

from __future__ import annotations

import _thread
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from attnseg.cli.app import main
from attnseg.runtime.errors import AttnsegError, EngineError
from attnseg.runtime.model.bundle import Bundle
from attnseg.runtime.segmenter import Segmenter
from attnseg.synthetic import make_case, write_case

RESULTS = {"a.json", "a.png", "a_seg.nii.gz"}


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_case(make_case(0, (48, 52, 44)), tmp_path_factory.mktemp("scans"), "a")


def limited(name: str, value: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command with a limit of the system."""
    code = (
        f"import os, resource; resource.setrlimit(resource.{name}, ({value}, {value})); "
        "os.execv(os.sys.executable, [os.sys.executable, '-m', 'attnseg', *os.sys.argv[1:]])"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("gigabytes", [0.1, 0.55, 1.09, 1.1, 1.15, 1.2, 4])
def test_too_little_address_space_is_one_line(scan: Path, tmp_path: Path, gigabytes: float) -> None:
    out = tmp_path / "out"
    value = int(gigabytes * 1e9)
    result = limited("RLIMIT_AS", value, "run", scan, "-o", out, "--precision", "fp32")
    written = {file.name for file in out.iterdir()} if out.exists() else set()
    assert "Traceback" not in result.stderr
    if gigabytes < 1.1:
        assert (result.returncode, written) == (1, set())
        assert result.stderr == (
            "error: attnseg needs 1.1 GB of address space, the limit of this process is "
            f"{gigabytes:.2f} GB; raise it with ulimit -v 1074219 or more\n"
        )
    elif result.returncode == 0:
        assert written == RESULTS
    else:  # the system decides how much fits
        assert gigabytes < 4
        assert (result.returncode, written) == (1, set())
        last = result.stderr.splitlines()[-1]
        assert "ulimit -v" in last


def test_pytorch_is_not_loaded_where_it_would_end_the_process(tmp_path: Path) -> None:
    result = limited("RLIMIT_AS", 1_900_000_000, "train", "--data", tmp_path, "-o", tmp_path / "o")
    assert (result.returncode, list(tmp_path.iterdir())) == (1, [])
    assert result.stderr.startswith(
        "error: PyTorch needs 2.0 GB of address space, the limit of this process is 1.90 GB"
    )
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("files", [5, 16, 64])
def test_few_open_files_are_enough(scan: Path, tmp_path: Path, files: int) -> None:
    result = limited("RLIMIT_NOFILE", files, "run", scan, "-o", tmp_path, "--precision", "fp32")
    assert result.returncode == 0, result.stderr
    assert {file.name for file in tmp_path.iterdir()} == RESULTS


def test_modules_that_cannot_be_opened_are_one_line(tmp_path: Path) -> None:
    code = (
        "import os, resource, sys; from attnseg.__main__ import main; "
        "sys.argv = ['attnseg', '--version']; "
        "limit = resource.RLIMIT_NOFILE; resource.setrlimit(limit, (3, 3)); main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr == (
        "error: too many open files; raise the limit on open files (ulimit -n)\n"
    )


def test_a_limit_on_the_size_of_files_is_named(scan: Path, tmp_path: Path) -> None:
    result = limited("RLIMIT_FSIZE", 1000, "run", scan, "-o", tmp_path, "--precision", "fp32")
    assert (result.returncode, list(tmp_path.iterdir())) == (1, [])
    line = f"a: {tmp_path}: results could not be written (File too large); raise the limit on "
    assert f"{line}the size of files (ulimit -f) and run again\n" in result.stderr


def test_a_run_without_a_further_thread_is_one_line(
    scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Segmenter()

    def refuse(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("attnseg.cli.run.open_segmenter", lambda *_: opened)
    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    result = CliRunner().invoke(main, ["run", str(scan), "-o", str(tmp_path), "--quiet"])
    assert (result.exit_code, list(tmp_path.iterdir())) == (1, [])
    assert result.stderr == (
        "error: no further thread can be started; raise the limits on processes (ulimit -u) and "
        "memory (ulimit -v)\n"
    )


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "error: not enough memory; close other programs, raise the limit on "),
        (OSError(24, "Too many open files", "x"), "error: too many open files; raise the limit"),
        (OSError(13, "Permission denied", "x"), "error: x: Permission denied\n"),
        (AttnsegError("cause", "mend"), "error: cause; mend\n"),
        (EngineError("it failed (std::bad_alloc)", "wait"), "error: it failed (std::bad_alloc); "),
        (KeyError("x"), "error: unexpected KeyError ('x') (--debug shows the traceback)\n"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_any_exception_of_a_command_is_one_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Bundle, "load", fail)
    result = CliRunner().invoke(main, ["inspect", "x"])
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert result.stderr.startswith(line)
    shown = CliRunner().invoke(main, ["inspect", "x", "--debug"])
    assert "Traceback" in shown.stderr
    assert shown.stderr.splitlines()[-1].startswith(line.split(" (--debug")[0].rstrip("\n"))


def test_a_limit_of_openblas_that_the_user_has_set_is_kept() -> None:
    code = (
        "import os, sys; sys.argv = ['attnseg', '--version']\n"
        "from attnseg.__main__ import main\n"
        "try:\n    main()\nfinally:\n    print(os.environ['OPENBLAS_NUM_THREADS'])"
    )
    for given, wanted in (({}, "1"), ({"OPENBLAS_NUM_THREADS": "2"}, "2")):
        environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"}
        command = [sys.executable, "-c", code]
        result = subprocess.run(
            command, env=environment | given, capture_output=True, text=True, check=True
        )
        assert result.stdout.splitlines()[-1] == wanted


def test_modules_of_the_current_folder_are_not_imported(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("print('taken')")
    (tmp_path / "signal.py").write_text("print('taken')")
    root = str(Path(__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-m", "attnseg", "--version"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("attnseg, version")
