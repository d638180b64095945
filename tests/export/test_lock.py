"""Engines of the shipped model are the bytes that they were when the lock file was written.

The lock holds one entry for each pair of versions that decide the bytes. A change of ours shows
as a difference; after one that was meant, and for new versions, write the lock again:

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
from attnseg.export.precision import convert_to_fp16
from attnseg.export.tensorrt import TARGETS, BuildOptions, build_engine

LOCK = Path(__file__).with_name("engines.lock.json")
PACKAGES = ("onnxconverter-common", "tensorrt-rtx-cu13-libs")


def versions() -> str:
    """The key of this machine's entry."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)


def checksums() -> dict[str, str]:
    """SHA-256 of the shipped graph, of its fp16 form, and of its engine for each target."""
    bundle = Bundle.default()
    graph = bundle.file("onnx").read_bytes()
    half = convert_to_fp16(graph)
    files = {"model.onnx": graph, "model-fp16.onnx": half}
    for target in sorted(set(TARGETS.values())):
        options = BuildOptions("tensorrt-rtx", target)
        files[target] = build_engine(half, bundle.manifest.inference.window, options).content
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def test_engines_are_those_of_the_lock() -> None:
    # In a process of its own: after a build that failed, TensorRT-RTX 1.7 may build other engines.
    command = [sys.executable, "-m", "tests.export.test_lock", "--print"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, lock = json.loads(done.stdout), json.loads(LOCK.read_text())
    assert found["sm86"] != found["sm89"]
    if versions() in lock:  # with newer packages there is nothing to compare with
        assert found == lock[versions()], "write the lock again if the change was meant"
    assert found["model.onnx"] in {entry["model.onnx"] for entry in lock.values()}, "as above"


if __name__ == "__main__":
    if sys.argv[1:] == ["--print"]:
        print(json.dumps(checksums()))
    else:
        LOCK.write_text(json.dumps({versions(): checksums()}, indent=2) + "\n")
