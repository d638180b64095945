"""Build of engines in a separate process.

After a failed build, TensorRT-RTX 1.7 may build the next engine of the process for the wrong
target, and a crash of the builder must not end the export.
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
from attnseg.export.engines.tensorrt import (
    BuildOptions,
    BuildProgress,
    BuiltEngine,
    build_engine,
    check_options,
)
from attnseg.export.graphs.graph import Graph
from attnseg.runtime.errors import ConfigError, ExportError, Setting
from attnseg.runtime.geometry import Shape
from attnseg.runtime.model.manifest import EngineBuild

_PROGRESS = b"attnseg-progress "
_COMPLAINTS = "stderr"
_REQUEST, _GRAPH, _ENGINE, _ANSWER = "request.json", "graph.onnx", "engine", "answer.json"


def build_apart(
    graph: Graph,
    window: Shape,
    options: BuildOptions,
    in_fp32: tuple[str, ...] = (),
    progress: BuildProgress | None = None,
) -> BuiltEngine:
    """`attnseg.export.engines.tensorrt.build_engine` in a new process.

    Raises:
        ExportError: See `build_engine`, or the process ended without an answer.
    """
    check_options(options)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / _GRAPH).write_bytes(graph.content)
        request = {"window": window, "options": asdict(options), "in_fp32": in_fp32}
        (folder / _REQUEST).write_text(json.dumps(request))
        code = _run(folder, progress or (lambda *_: None))
        return _read_answer(folder, options, code)


def _run(folder: Path, progress: BuildProgress) -> int:
    command = [sys.executable, "-P", "-m", __name__, str(folder)]  # -P: no imports from the cwd
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
                if line.startswith(_PROGRESS):  # libraries may print to stdout too
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
            f"{options.builder} stopped while it built for {options.target} ({reason}{last})",
            f"{advice}export with {{}}",
            Setting("builder", "none"),
        )
    answer = json.loads((folder / _ANSWER).read_text())
    if "cause" in answer:
        kind = ConfigError if answer["kind"] == "ConfigError" else ExportError
        settings = (Setting(name, value) for name, value in answer["settings"])
        raise kind(answer["cause"], answer["mend"], *settings)
    content = (folder / _ENGINE).read_bytes()
    return BuiltEngine(
        content,
        EngineBuild(**{**answer["build"], "window": tuple(answer["build"]["window"])}),
        answer["log"],
    )


def _tell(phase: str, done: int, steps: int) -> None:
    print(_PROGRESS.decode() + json.dumps([phase, done, steps]), flush=True)


def _answer(folder: Path) -> None:
    request = json.loads((folder / _REQUEST).read_text())
    options = BuildOptions(**request["options"])
    window, in_fp32 = tuple(request["window"]), tuple(request["in_fp32"])
    try:
        built = build_engine(Graph.read(folder / _GRAPH), window, options, in_fp32, _tell)
    except (ConfigError, ExportError) as error:
        answer: dict[str, Any] = {
            "kind": type(error).__name__,
            "cause": error.cause,
            "mend": error.mend,
            "settings": [(setting.name, setting.value) for setting in error.settings],
        }
    else:
        (folder / _ENGINE).write_bytes(built.content)
        answer = {"build": asdict(built.build), "log": built.log}
    (folder / _ANSWER).write_text(json.dumps(answer))


if __name__ == "__main__":
    _answer(Path(sys.argv[1]))
