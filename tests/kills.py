"""Commands that are killed at random moments: nothing is lost, half-written or left behind.

    python -m tests.kills run --kills 200 --seed 1

Each round starts a command, kills it with SIGKILL, checks what it left, runs the command again to
its end, and compares the result with that of an undisturbed run, byte for byte except for times.
Half of the kills come at a random time. The others come before a random operation on the output, as
when a file is opened, renamed or removed, since these take a small part of the time. Every other
round starts where results exist, which are replaced.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from attnseg.runtime.case.nifti import read_labels
from attnseg.runtime.model.bundle import Bundle
from attnseg.runtime.results.report import output_names
from attnseg.synthetic import make_case, write_case

SHAPE = (48, 52, 44)
LONGEST_S = 600
TIMES = ("written", "elapsed_ms")
"""Fields of a report that differ between runs."""


class Scenario(Protocol):
    """A command that is killed. `folder` holds its output and nothing else."""

    def arguments(self, folder: Path) -> list[str]:
        """Arguments of attnseg, which go on with what a killed command left in `folder`."""

    def check_killed(self, folder: Path) -> None:
        """Check what a killed command left."""

    def content(self, folder: Path) -> dict[str, Any]:
        """Every file and folder below `folder` by its path, with its content besides times."""


def _files(folder: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(folder.rglob("*")):
        found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return found


@dataclass
class Run:
    """`attnseg run` on a folder of `names`."""

    scans: Path
    names: tuple[str, ...]
    overwrite: bool = False

    def arguments(self, folder: Path) -> list[str]:
        """See `Scenario.arguments`."""
        more = ["--overwrite"] if self.overwrite else []
        return ["run", str(self.scans), "-o", str(folder / "out"), "--precision", "fp32", *more]

    def check_killed(self, folder: Path) -> None:
        """A report stands only beside the labels and the picture that it belongs to."""
        for name in self.names:
            files = [folder / "out" / file for file in output_names(name).values()]
            labels, picture, report = files
            if labels.exists():
                read_labels(labels)
            if picture.exists():
                assert picture.read_bytes().endswith(b"IEND\xaeB`\x82"), picture
            if report.exists():
                json.loads(report.read_text())
                assert labels.exists() and picture.exists(), report

    def content(self, folder: Path) -> dict[str, Any]:
        """See `Scenario.content`."""
        found = _files(folder)
        for name, stored in found.items():
            if name.endswith(".json"):
                report = json.loads(stored)
                found[name] = {k: v for k, v in report.items() if k not in TIMES}
        return found


@dataclass
class Export:
    """`attnseg export` of a model, over an earlier bundle."""

    model: Path

    def arguments(self, folder: Path) -> list[str]:
        """See `Scenario.arguments`."""
        return ["export", str(self.model), "-o", str(folder / "model"), "--overwrite"]

    def check_killed(self, folder: Path) -> None:
        """A bundle is absent or complete."""
        if (folder / "model").exists():
            Bundle.load(folder / "model")

    def content(self, folder: Path) -> dict[str, Any]:
        """See `Scenario.content`."""
        return _files(folder)


@dataclass
class Train:
    """`attnseg train` on three cases, continued with `--resume` after a kill."""

    data: Path

    def arguments(self, folder: Path) -> list[str]:
        """See `Scenario.arguments`."""
        start = ["train", "--data", str(self.data), "-o", str(folder / "run")]
        if (folder / "run" / "last.pt").exists():
            return [*start, "--resume"]
        settings = ("epochs=3", "steps_per_epoch=2", "patch=32", "precision=fp32", "batch_size=1")
        widths = ("widths=4,4,4,4", "bottleneck=4")
        return [*start, *(part for s in (*settings, *widths) for part in ("--set", s))]

    def check_killed(self, folder: Path) -> None:
        """Checkpoints are absent or complete."""
        from attnseg.trainer.checkpoint import load_checkpoint

        for name in ("best.pt", "last.pt"):
            if (folder / "run" / name).exists():
                load_checkpoint(folder / "run" / name)

    def content(self, folder: Path) -> dict[str, Any]:
        """Weights of the checkpoints, the log without times, and the names of all other files."""
        from attnseg.trainer.checkpoint import checkpoint_weights, load_checkpoint, weights_digest

        found = dict.fromkeys(_files(folder))
        found = {name: None for name in found if "events.out" not in name}
        for name in ("run/best.pt", "run/last.pt"):
            state = load_checkpoint(folder / name)
            found[name] = (state["epoch"], weights_digest(checkpoint_weights(state)))
        rows = (folder / "run" / "log.csv").read_text().splitlines()
        found["run/log.csv"] = [row.rpartition(",")[0] for row in rows]
        return found


def make_scans(folder: Path, names: tuple[str, ...]) -> Path:
    """Write small synthetic cases."""
    for seed, name in enumerate(names):
        write_case(make_case(seed, SHAPE), folder, name)
    return folder


WATCHED = """
import atexit, os, runpy, signal, sys
folder, counted, last, *arguments = sys.argv[1:]
done = 0

def watch(event, given):
    global done
    if event not in ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"):
        return
    path = given[0]
    if isinstance(path, int) or not os.fsdecode(path).startswith(folder + os.sep):
        return
    done += 1
    if done == int(last):
        os.kill(os.getpid(), signal.SIGKILL)

def write_count():
    with open(counted, "w") as stream:
        stream.write(str(done))

sys.addaudithook(watch)
atexit.register(write_count)
sys.argv = ["attnseg", *arguments]
runpy.run_module("attnseg", run_name="__main__")
"""
"""Runs attnseg and counts its operations on a folder; it is killed before the one of a number."""


def start(scenario: Scenario, folder: Path, last: int = 0) -> subprocess.Popen[bytes]:
    """Start the command, with its messages in a file beside `folder`.

    Args:
        scenario: The command.
        folder: Folder of its output.
        last: Number of the operation on `folder` that is not carried out; 0 for none.
    """
    watched = [sys.executable, "-c", WATCHED, str(folder), _count_of(folder), str(last)]
    with folder.with_suffix(".log").open("wb") as messages:
        return subprocess.Popen(
            [*watched, *scenario.arguments(folder)], stdout=messages, stderr=messages
        )


def _count_of(folder: Path) -> str:
    return str(folder.with_suffix(".count"))


def finish(scenario: Scenario, folder: Path) -> dict[str, Any]:
    """Run the command to its end and return the content of its output."""
    code = start(scenario, folder).wait(LONGEST_S)
    assert code == 0, folder.with_suffix(".log").read_text(errors="replace")
    return scenario.content(folder)


def _wait_or_kill(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Wait for a process, or kill it after a time; return whether it was killed."""
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
    return process.wait() == -signal.SIGKILL


def kill_often(first: Scenario, over: Scenario | None, folder: Path, kills: int, seed: int) -> int:
    """Kill a command `kills` times, and check what is left each time.

    Args:
        first: Command that is killed where there are no results.
        over: Command that is killed where there are results, which it replaces, in every other
            round; None for no such rounds.
        folder: Empty folder for all files.
        kills: Number of rounds.
        seed: Seed of the moments.

    Returns:
        Number of kills that came before the end of the command.
    """
    chance, hit = random.Random(seed), 0
    begun = time.monotonic()
    expected = finish(first, folder / "undisturbed")
    elapsed_s = time.monotonic() - begun
    operations = int(Path(_count_of(folder / "undisturbed")).read_text())
    for index in range(kills):
        output, scenario = folder / f"round{index}", first
        output.mkdir()
        if over and index % 2:
            scenario = over
            shutil.copytree(folder / "undisturbed", output, dirs_exist_ok=True)
        if index % 4 < 2:
            process, timeout_s = start(scenario, output, chance.randint(1, operations)), LONGEST_S
        else:
            process, timeout_s = start(scenario, output), chance.uniform(0, elapsed_s)
        hit += _wait_or_kill(process, timeout_s)
        scenario.check_killed(output)
        found = finish(scenario, output)
        assert found.keys() == expected.keys(), f"round {index}: {found.keys() ^ expected.keys()}"
        for name, content in expected.items():
            assert found[name] == content, f"round {index}: {name} differs"
        shutil.rmtree(output)
    return hit


def scenarios(command: str, folder: Path) -> tuple[Scenario, Scenario | None]:
    """Prepare the input of a command in `folder`; see `kill_often` for what is returned."""
    if command == "run":
        names = ("a", "b")
        scans = make_scans(folder / "scans", names)
        return Run(scans, names), Run(scans, names, overwrite=True)
    train = Train(make_scans(folder / "scans", ("a", "b", "c")))
    if command == "train":
        return train, None
    finish(train, folder / "trained")
    export = Export(folder / "trained" / "run" / "best.pt")
    return export, export


def main() -> None:
    """Run the rounds that the command line asks for, and print their numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "export", "train"))
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for part in ("input", "rounds"):
            (folder / part).mkdir()
        first, over = scenarios(given.command, folder / "input")
        hit = kill_often(first, over, folder / "rounds", given.kills, given.seed)
    print(
        f"{given.command}: {given.kills} rounds, {hit} killed before their end, seed {given.seed}"
    )


if __name__ == "__main__":
    main()
