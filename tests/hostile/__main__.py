"""Command line of the generator: `python -m tests.hostile READER... --seed 1 --inputs 10000`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.hostile.drive import child, drive
from tests.hostile.readers import READERS, open_reader


def main() -> int:
    """Run readers on generated inputs; the exit code is 1 if an input showed a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(READERS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="index of the first input")
    parser.add_argument("--inputs", type=int, default=1000, help="number of inputs per reader")
    parser.add_argument("--folder", type=Path, help="folder for inputs; those with a fault stay")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        (name,) = given.readers
        with tempfile.TemporaryDirectory() as seeds:
            child(
                open_reader(name, Path(seeds)), given.seed, given.first, given.inputs, given.folder
            )
        return 0
    if unknown := set(given.readers) - set(READERS):
        parser.error(f"unknown reader {', '.join(sorted(unknown))}")
    folder, faults = given.folder or Path(tempfile.mkdtemp(prefix="hostile-")), 0
    for name in given.readers or READERS:
        tally = drive(name, given.seed, given.first, given.inputs, folder / name)
        faults += len(tally.faults)
        print("\n".join((str(tally), *tally.faults)), flush=True)
    print(f"{faults} faults" + (f"; inputs in {folder}" if faults else ""))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
