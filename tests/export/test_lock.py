"""Engines of the shipped model are identical to those recorded in the lock file.

The lock holds one entry for each set of versions that determines the bytes. A change in attnseg
shows as a difference; after an intended change, or for new versions, write the lock again:

    python -m tests.export.test_lock
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

from attnseg import Bundle
from attnseg.export.engines.tensorrt import TARGETS, BuildOptions, build_engine
from attnseg.export.graphs.fp16 import convert_to_fp16
from attnseg.export.graphs.graph import Graph

LOCK = Path(__file__).with_name("engines.lock.json")
PACKAGES = ("onnxconverter-common", "tensorrt-rtx-cu13-libs")


def versions() -> str:
    """The key of this machine's entry."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)


def checksums() -> dict[str, str]:
    """SHA-256 of the shipped graph, of its fp16 form, and of its engine for each target."""
    bundle = Bundle.default()
    graph = Graph.read(bundle.file("onnx"))
    half = convert_to_fp16(graph)
    files = {"model.onnx": graph.content, "model-fp16.onnx": half.content}
    for target in sorted(set(TARGETS.values())):
        options = BuildOptions("tensorrt-rtx", target)
        files[target] = build_engine(half, bundle.manifest.inference.window, options).content
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def test_engines_are_those_of_the_lock() -> None:
    # In a separate process: after a failed build, TensorRT-RTX 1.7 may build different engines.
    command = [sys.executable, "-m", "tests.export.test_lock", "--print"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, lock = json.loads(done.stdout), json.loads(LOCK.read_text())
    assert found["sm86"] != found["sm89"]
    if versions() in lock:  # other versions have no entry to compare with
        assert found == lock[versions()], "write the lock again if the change was meant"
    assert found["model.onnx"] in {entry["model.onnx"] for entry in lock.values()}, "as above"


if __name__ == "__main__":
    if sys.argv[1:] == ["--print"]:
        print(json.dumps(checksums()))
    else:
        LOCK.write_text(json.dumps({versions(): checksums()}, indent=2) + "\n")
