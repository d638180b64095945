"""A bounded run of every reader on hostile inputs, and the check of the generator itself.

`ATTNSEG_HOSTILE_INPUTS` sets the number of inputs per reader, `ATTNSEG_HOSTILE_SEED` their seed.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.hostile.drive import Tally, drive
from tests.hostile.mutate import change_bytes, change_json
from tests.hostile.readers import READERS

SEED = int(os.environ.get("ATTNSEG_HOSTILE_SEED", "1"))
INPUTS = int(os.environ.get("ATTNSEG_HOSTILE_INPUTS", "0"))
IN_CI = {"nifti": 400, "cases": 100, "weights": 100, "golden": 150, "nnunet": 100, "monai": 100}
"""Number of inputs of the readers that are slower than the others."""


@pytest.mark.parametrize("reader", READERS)
def test_a_hostile_input_is_refused_in_one_line_or_read_as_what_it_is(
    reader: str, tmp_path: Path
) -> None:
    # The machines that run the tests are shared: what is slow is not failed, what hangs is.
    tally = drive(reader, SEED, 0, INPUTS or IN_CI.get(reader, 300), tmp_path, longest_s=60)
    print(tally)
    assert tally.faults == [], "\n".join(tally.faults)
    assert tally.outcomes["accepted"] and tally.outcomes["refused"]


def test_the_generator_finds_every_kind_of_fault(tmp_path: Path) -> None:
    tally = drive("planted", 1, 0, 9, tmp_path, longest_s=15)
    kinds = {
        "accepted": 2,
        "refused": 1,
        "exception": 1,
        "killed": 1,
        "wrong": 1,
        "memory": 1,
        "hang": 1,
        "unclear": 1,
    }
    assert (tally.inputs, dict(tally.outcomes)) == (9, kinds)
    shown = [fault.split(": ", 2)[:2] for fault in tally.faults]
    assert shown[0] == ["planted --seed 1 --first 2 --inputs 1", "exception"]
    assert [kind for _, kind in shown] == [
        "exception",
        "killed",
        "wrong",
        "memory",
        "hang",
        "unclear",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "4", "5", "6", "7"]


def test_the_memory_of_the_parent_does_not_count(tmp_path: Path) -> None:
    held = bytearray(b"\1") * (400 << 20)
    assert drive("planted", 1, 0, 1, tmp_path).peak_bytes < 300 << 20 < len(held)


def test_an_input_depends_on_its_seed_and_its_index_alone(tmp_path: Path) -> None:
    for name, first, seed in (("a", 0, 1), ("b", 2, 1), ("c", 2, 2)):
        drive("planted", seed, first, 3 - first, tmp_path / name)
    values = {name: (tmp_path / name / "2" / "value").read_text() for name in "abc"}
    assert values["a"] == values["b"] != values["c"]


def test_an_input_that_cannot_be_made_is_no_finding(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()  # where the input would be written
    with pytest.raises(RuntimeError, match="planted does not make input 0: "):
        drive("planted", 1, 0, 1, tmp_path)


def test_changes_are_those_of_their_seed_and_leave_the_original() -> None:
    stored, value = bytes(range(200)), {"a": [1, {"b": "c"}], "d": None}
    before = repr(value)
    changed = [change_bytes(np.random.default_rng(s), stored) for s in (1, 1, 2)]
    assert changed[0] == changed[1] != changed[2]
    made = {repr(change_json(np.random.default_rng(s), value)) for s in range(50)}
    assert len(made) > 40 and repr(value) == before


def test_a_tally_is_one_line_of_figures() -> None:
    tally = Tally("nifti", 1)
    tally.add({"index": 0, "outcome": "accepted", "seconds": 0.5, "peak": 100 << 20})
    tally.add({"index": 1, "outcome": "refused", "seconds": 2.0, "peak": 90 << 20})
    assert str(tally) == (
        "nifti, seed 1: 2 inputs, 1 accepted, 1 refused; longest 2.00 s, peak 100 MiB"
    )
