"""No command opens a network socket, or writes outside its output, cache and temporary folders."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attnseg.runtime.model.bundle import default_folder

ROOT = Path(__file__).parents[1]


def _usable_strace() -> str | None:
    """Path of strace, None where it is missing or where processes may not be traced."""
    found = shutil.which("strace")
    traced = found and subprocess.run([found, "-f", "true"], capture_output=True, check=False)
    return found if traced and traced.returncode == 0 else None


STRACE = _usable_strace()
CALLS = "trace=socket,connect,sendto,openat,creat,mkdir,rename,renameat,renameat2"
SOCKET = re.compile(r"\b(socket|connect|sendto)\((?!.*AF_UNIX)")


def observed(tmp_path: Path, *arguments: object) -> tuple[list[str], set[Path]]:
    """Socket calls of a command, and the files that exist in its home folder afterwards."""
    assert STRACE
    home, log = tmp_path / "home", tmp_path / "strace"
    home.mkdir()
    unset = ("XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT)}
    command = [STRACE, "-f", "-qq", "-e", CALLS, "-o", log, sys.executable, "-m", "attnseg"]
    subprocess.run(
        [*map(str, command), *map(str, arguments)],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
    )
    lines = log.read_text(errors="replace").splitlines()
    return [line for line in lines if SOCKET.search(line)], set(home.rglob("*"))


@pytest.mark.skipif(STRACE is None, reason="processes cannot be traced")
@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "SCAN", "-o", "out"),
        ("run", "SCAN", "-o", "out", "--engine", "onnxruntime"),
        ("doctor",),
        ("inspect", default_folder()),
        ("explain", "SCAN", "-o", "out"),
        ("verify", default_folder()),
        ("export", "-o", "model", "--overwrite"),
    ],
    ids=lambda arguments: " ".join(map(str, arguments[:1] + arguments[-1:])),
)
def test_nothing_goes_out_and_nothing_but_a_cache_of_fonts_is_left(
    tmp_path: Path, small_scan: Path, arguments: tuple[object, ...]
) -> None:
    given = [small_scan if a == "SCAN" else a for a in arguments]
    sockets, home = observed(tmp_path, *given)
    assert sockets == []
    assert {file for file in home if file.is_file() and "matplotlib" not in file.parts} == set()


def test_the_libraries_are_imported_in_one_place() -> None:
    importing = re.compile(r"^\s*(import|from) (openvino|onnxruntime)\b", re.MULTILINE)
    for file in (ROOT / "attnseg").rglob("*.py"):
        allowed = file.name == "libraries.py" or "export" in file.relative_to(ROOT).parts
        assert allowed or not importing.search(file.read_text()), file
