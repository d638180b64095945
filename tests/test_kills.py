"""A few rounds of `tests.kills`; `python -m tests.kills` makes as many as wanted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from attnseg.runtime.files import new_folder
from attnseg.runtime.model.bundle import Bundle
from tests.kills import Run, kill_often, make_scans, scenarios


def test_runs_that_are_killed_lose_nothing_and_leave_nothing(tmp_path: Path) -> None:
    first, over = scenarios("run", tmp_path / "input")
    (tmp_path / "rounds").mkdir()
    assert kill_often(first, over, tmp_path / "rounds", kills=8, seed=0) > 0


def test_a_training_that_is_killed_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    train, _ = scenarios("train", tmp_path / "input")
    (tmp_path / "rounds").mkdir()
    assert kill_often(train, None, tmp_path / "rounds", kills=1, seed=0) == 1


WRITE_BUNDLES = """
import sys
from pathlib import Path
from attnseg.runtime.model.bundle import Bundle, draft_bundle
shipped, target = Bundle.default(), Path(sys.argv[1])
while True:
    with draft_bundle(target, shipped.manifest, overwrite=True) as draft:
        for name, entry in shipped.manifest.files.items():
            draft.add(name, (shipped.folder / name).read_bytes(), entry)
        draft.commit()
    print("written", flush=True)
"""


def test_a_bundle_is_complete_whenever_its_export_is_killed(tmp_path: Path) -> None:
    target, command = tmp_path / "model", [sys.executable, "-c", WRITE_BUNDLES]
    for wait_s in (0.02, 0.05, 0.09, 0.14):
        with subprocess.Popen([*command, str(target)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"written\n"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(wait_s)
            process.kill()
        # The shipped manifest has version 2 of the format, and a new one version 3.
        assert Bundle.load(target).manifest == Bundle.default().manifest
    with new_folder(target, replace=True):
        assert len(list(tmp_path.iterdir())) == 2  # the bundle, and the draft of this process
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"{"),
        ("a.png", b"\x89PNG"),
        ("a_seg.nii.gz", b"\x1f\x8b"),
        ("b.json", b"{}"),  # without labels and picture
    ],
)
def test_the_check_after_a_kill_sees_what_is_half_written(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(content)
    with pytest.raises(Exception, match=r"a\.json|a\.png|a_seg|b\.json|Expecting property"):
        Run(tmp_path, ("a", "b")).check_killed(tmp_path)


class Forgetful(Run):
    """A run that leaves a file after every start where there are no results yet."""

    def arguments(self, folder: Path) -> list[str]:
        """See `Run.arguments`."""
        if folder.name.startswith("round"):
            (folder / "left").touch()
        return super().arguments(folder)


def test_a_file_that_is_left_behind_is_found(tmp_path: Path) -> None:
    scans = make_scans(tmp_path / "scans", ("a",))
    (tmp_path / "rounds").mkdir()
    with pytest.raises(AssertionError, match="left"):
        kill_often(Forgetful(scans, ("a",)), None, tmp_path / "rounds", kills=1, seed=0)
