"""Engines are built in a process of their own.

After a build that failed, TensorRT-RTX 1.7 may build the next engine of the process for the wrong
target, and a builder that crashes must not take the export with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import attnseg
from attnseg.export.tensorrt import BuildOptions, BuiltEngine, Progress, build_engine, check_options
from attnseg.runtime.bundle import EngineBuild
from attnseg.runtime.errors import ConfigError, ExportError

_PROGRESS = b"attnseg-progress "
_COMPLAINTS = "stderr"
_REQUEST, _GRAPH, _ENGINE, _ANSWER = "request.json", "graph.onnx", "engine", "answer.json"


def build_apart(
    content: bytes,
    window: tuple[int, int, int],
    options: BuildOptions,
    in_fp32: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> BuiltEngine:
    """`attnseg.export.tensorrt.build_engine` in a new process: the same arguments and errors.

    Raises:
        ExportError: also when the process ends without an answer.
    """
    check_options(options)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / _GRAPH).write_bytes(content)
        request = {"window": window, "options": asdict(options), "in_fp32": in_fp32}
        (folder / _REQUEST).write_text(json.dumps(request))
        code = _run(folder, progress or (lambda *_: None))
        return _read_answer(folder, options, code)


def _run(folder: Path, progress: Progress) -> int:
    command = [sys.executable, "-P", "-m", __name__, str(folder)]  # never a module of this folder
    root = str(Path(attnseg.__file__).parents[1])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    with (
        (folder / _COMPLAINTS).open("wb") as complaints,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env={**os.environ, "PYTHONPATH": paths},
        ) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(_PROGRESS):  # libraries may print there too
                    progress(*json.loads(line[len(_PROGRESS) :]))
        except BaseException:
            process.kill()
            raise
    return process.returncode


def _read_answer(folder: Path, options: BuildOptions, code: int) -> BuiltEngine:
    if not (folder / _ANSWER).exists():
        lines = (folder / _COMPLAINTS).read_text(errors="replace").strip().splitlines()
        last = f": {lines[-1].strip()}" if lines else ""
        reason = f"signal {-code}" if code < 0 else f"exit code {code}"
        advice = "try again with more free memory, or " if code < 0 else ""
        raise ExportError(
            f"{options.builder} stopped while it built for {options.target} ({reason}{last}); "
            f"{advice}export with --builder none"
        )
    answer = json.loads((folder / _ANSWER).read_text())
    if "error" in answer:
        kind = ConfigError if answer["kind"] == "ConfigError" else ExportError
        raise kind(answer["error"])
    content = (folder / _ENGINE).read_bytes()
    return BuiltEngine(content, EngineBuild.model_validate(answer["build"]), answer["log"])


def _tell(phase: str, done: int, steps: int) -> None:
    print(_PROGRESS.decode() + json.dumps([phase, done, steps]), flush=True)


def _answer(folder: Path) -> None:
    request = json.loads((folder / _REQUEST).read_text())
    options = BuildOptions(**request["options"])
    window, in_fp32 = tuple(request["window"]), tuple(request["in_fp32"])
    try:
        built = build_engine((folder / _GRAPH).read_bytes(), window, options, in_fp32, _tell)
    except (ConfigError, ExportError) as error:
        answer: dict[str, Any] = {"kind": type(error).__name__, "error": str(error)}
    else:
        (folder / _ENGINE).write_bytes(built.content)
        answer = {"build": built.build.model_dump(), "log": built.log}
    (folder / _ANSWER).write_text(json.dumps(answer))


if __name__ == "__main__":
    _answer(Path(sys.argv[1]))
