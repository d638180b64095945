"""Runs a reader on generated inputs in a child process, and judges what happens.

The child reads one input after the other and prints one line of JSON for each. The parent waits for
each line: a child that is silent for too long hangs, one that ends early was killed. Either is a
fault of that input, and another child goes on with the next one.
"""

from __future__ import annotations

import json
import os
import resource
import select
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
from numpy.random import Generator

from attnseg.cli.app import main
from attnseg.cli.console import in_one_line
from attnseg.runtime.errors import AttnsegError

ROOT = Path(__file__).parents[2]
LONGEST_S = 10.0
"""Longest time for one input, on a machine that has a core for it."""
MOST_BYTES = 2 << 30
"""Largest resident memory of a process that reads inputs of less than 10 MB."""
_LONGEST_LINE = 5000  # characters
_LONGEST_MAKE_S = 300.0  # for imports and inputs on a busy machine


class Reader(Protocol):
    """Makes inputs for one reader of attnseg, and reads them."""

    def make(self, rng: Generator, folder: Path) -> None:
        """Write one input to an empty folder."""

    def read(self, folder: Path) -> None:
        """Read the input, and check what was read.

        Raises:
            AttnsegError: The input is refused.
            SilentlyWrongError: The input is accepted, but was not read as what it is.
        """


class SilentlyWrongError(Exception):
    """An input was accepted and read as something that it is not."""


@dataclass
class Tally:
    """What happened to the inputs of one reader.

    Attributes:
        reader: Name of the reader.
        seed: Seed of the inputs.
        inputs: Number of inputs.
        outcomes: Number of inputs by outcome: `accepted`, `refused`, or the kind of the fault.
        faults: Description of each fault.
        longest_s: Longest time of an input.
        peak_bytes: Largest resident memory of a child.
    """

    reader: str
    seed: int
    inputs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    peak_bytes: int = 0

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
        return (
            f"{self.reader}, seed {self.seed}: {self.inputs} inputs, {counts}; longest "
            f"{self.longest_s:.2f} s, peak {self.peak_bytes / 2**20:.0f} MiB"
        )

    def add(self, line: dict[str, Any]) -> None:
        """Count one input, by the line that the child printed for it."""
        self.inputs += 1
        self.outcomes[line["outcome"]] += 1
        self.longest_s = max(self.longest_s, line["seconds"])
        self.peak_bytes = max(self.peak_bytes, line.get("peak", 0))
        if line.get("fault"):
            again = f"--seed {self.seed} --first {line['index']} --inputs 1"
            self.faults.append(f"{self.reader} {again}: {line['outcome']}: {line['fault']}")


def shown(error: Exception) -> str:
    """The line that `attnseg run` prints for an error."""
    group = click.Context(main, info_name="attnseg")
    with click.Context(main.commands["run"], parent=group):
        return in_one_line(error)


def is_message(line: str) -> bool:
    """Whether a printed error is one line of text that a person can read."""
    return bool(line.strip()) and line.isprintable() and len(line) <= _LONGEST_LINE


def judge(reader: Reader, folder: Path) -> tuple[str, str]:
    """Read one input; return the outcome, and the description of a fault if it is one."""
    try:
        reader.read(folder)
    except AttnsegError as error:
        line = shown(error)
        if not is_message(line):
            return "unclear", repr(line[:300])
        return "refused", ""
    except SilentlyWrongError as error:
        return "wrong", str(error)[:1000]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit among them
        return "exception", "".join(traceback.format_exception(error)[-4:])[-1500:]
    return "accepted", ""


def input_folder(folder: Path, index: int) -> Path:
    """Folder of one input."""
    return folder / str(index)


@contextmanager
def _deep_recursion() -> Iterator[None]:
    """Let the generator copy and store values that are nested more deeply than a reader takes."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def child(reader: Reader, seed: int, first: int, count: int, folder: Path) -> None:
    """Read inputs and print a line for each; ends after one that took too much memory."""
    warnings.simplefilter("error")  # as in the tests: a warning would be a second line
    resource.setrlimit(resource.RLIMIT_DATA, (3 * MOST_BYTES, resource.RLIM_INFINITY))
    # Libraries may print: only the lines of this function go to the parent.
    with os.fdopen(os.dup(1), "w", buffering=1) as lines:
        os.dup2(2, 1)
        print('{"ready": true}', file=lines)
        for index in range(first, first + count):
            own = input_folder(folder, index)
            line = _make(reader, seed, index, own)
            print(json.dumps(line), file=lines)
            if "broken" in line:
                return
            line = _read(reader, index, own)
            print(json.dumps(line), file=lines)
            if line["outcome"] == "memory":
                return


def _make(reader: Reader, seed: int, index: int, folder: Path) -> dict[str, Any]:
    """Make one input; return the line that says so."""
    try:
        folder.mkdir(parents=True)
        with _deep_recursion():
            reader.make(np.random.default_rng([seed, index]), folder)
    except Exception:
        return {"broken": f"{index}: {traceback.format_exc()}"}
    return {"made": index}


def _peak_bytes() -> int:
    """Largest resident memory of this process; `ru_maxrss` counts that before exec as well."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def _read(reader: Reader, index: int, folder: Path) -> dict[str, Any]:
    """Read one input; return the line with what happened."""
    began = time.monotonic()
    outcome, fault = judge(reader, folder)
    seconds = time.monotonic() - began
    peak = _peak_bytes()
    if peak > MOST_BYTES and not fault:
        outcome, fault = "memory", f"took {peak / 2**30:.2f} GiB"
    if not fault:
        shutil.rmtree(folder)
    return {"index": index, "outcome": outcome, "fault": fault, "seconds": seconds, "peak": peak}


def _lines(process: subprocess.Popen[bytes], longest_s: float) -> Iterator[dict[str, Any] | None]:
    """Lines of a child, whose pipe is not buffered; None if a reader is silent for too long."""
    assert process.stdout
    wait = _LONGEST_MAKE_S
    while select.select([process.stdout], [], [], wait)[0]:
        stored = process.stdout.readline()
        if not stored:
            return
        line = json.loads(stored)
        wait = longest_s if "made" in line else _LONGEST_MAKE_S
        yield line
    yield None


def drive(
    name: str, seed: int, first: int, count: int, folder: Path, longest_s: float = LONGEST_S
) -> Tally:
    """Run a reader on the inputs `first` to `first + count - 1` of a seed.

    The folders of inputs that showed a fault are kept in `folder`. An input hangs if it takes more
    than `longest_s`.
    """
    tally, index = Tally(name, seed), first
    while index < first + count:
        command = [sys.executable, "-m", "tests.hostile", name, "--child", f"--seed={seed}"]
        command += [f"--first={index}", f"--inputs={first + count - index}", f"--folder={folder}"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, bufsize=0) as process:
            began, ready = time.monotonic(), False
            for line in _lines(process, longest_s):
                if line is None:
                    process.kill()
                    fault = {"index": index, "outcome": "hang", "fault": f"over {longest_s:g} s"}
                    tally.add({**fault, "seconds": time.monotonic() - began})
                    index += 1
                    break
                began = time.monotonic()
                if "broken" in line:
                    raise RuntimeError(f"{name} does not make input {line['broken']}")
                if "outcome" not in line:
                    ready = True
                    continue
                tally.add(line)
                index += 1
                if line["outcome"] == "memory":
                    process.wait()
                    break
            else:
                if index < first + count:
                    if not ready:
                        raise RuntimeError(f"the reader {name} could not be started")
                    code = process.wait()
                    fault = {"index": index, "outcome": "killed", "fault": f"exit code {code}"}
                    tally.add({**fault, "seconds": time.monotonic() - began})
                    index += 1
    return tally
