from __future__ import annotations

import sys
from pathlib import Path

import pytest

from attnseg.export.engines.tensorrt import BuildOptions, build_engine
from attnseg.export.engines.worker import build_apart
from attnseg.export.graphs.fp16 import convert_to_fp16
from attnseg.export.graphs.graph import Graph
from attnseg.export.source.onnx import export_onnx
from attnseg.runtime.errors import ConfigError, ExportError
from attnseg.trainer.model import NetworkConfig
from tests.export.conftest import lively_network

WINDOW = (16, 16, 16)
SM86 = BuildOptions("tensorrt-rtx", "sm86")


@pytest.fixture(scope="module")
def graph() -> Graph:
    return convert_to_fp16(export_onnx(lively_network(NetworkConfig(3, 5, (8, 16), 16))))


def test_an_engine_built_apart_is_the_one_built_here(graph: Graph) -> None:
    told: list[tuple[str, int, int]] = []
    apart = build_apart(graph, WINDOW, SM86, progress=lambda *step: told.append(step))
    here = build_engine(graph, WINDOW, SM86)
    assert (apart.content, apart.build) == (here.content, here.build)
    assert "Half" in apart.log
    assert told and all(0 <= done <= steps for _, done, steps in told)


def test_errors_cross_the_border_as_they_are(graph: Graph) -> None:
    with pytest.raises(ExportError, match=r"workspace.*; give a larger workspace"):
        build_apart(graph, WINDOW, BuildOptions("tensorrt-rtx", "sm86", workspace_bytes=1000))
    with pytest.raises(ConfigError, match="leave target out"):
        build_apart(graph, WINDOW, BuildOptions("tensorrt-rtx", "sm86", compatibility="ampere+"))


def test_a_failed_build_does_not_change_the_next(graph: Graph) -> None:
    with pytest.raises(ExportError):
        build_apart(graph, WINDOW, BuildOptions("tensorrt-rtx", "sm86", workspace_bytes=1000))
    assert build_apart(graph, WINDOW, SM86).content == build_engine(graph, WINDOW, SM86).content


def test_a_builder_that_crashes_is_one_clear_error(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashing, python = tmp_path / "python", sys.executable
    crashing.touch(0o755)
    monkeypatch.setattr(sys, "executable", str(crashing))
    for code, message in (
        ("import os; os.abort()", r"\(signal 6\); try again with more free memory"),
        ("print(9 * chr(10)); 1 / 0", r"\(exit code 1: ZeroDivisionError: .*\); export with"),
    ):
        crashing.write_text(f"#!/bin/sh\nexec {python} -c '{code}'\n")
        with pytest.raises(ExportError, match=f"stopped while it built for sm86 {message}"):
            build_apart(graph, WINDOW, SM86)


def test_modules_in_the_users_folder_are_not_run(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnx.py").write_text("raise SystemExit('this is not onnx')")
    monkeypatch.chdir(tmp_path)
    assert build_apart(graph, WINDOW, SM86).content


def test_a_listener_that_raises_stops_the_build(graph: Graph) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_apart(graph, WINDOW, SM86, progress=stop)
