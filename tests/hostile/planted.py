"""A reader with faults, by which the tests check that the generator finds them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from numpy.random import Generator

from attnseg.runtime.errors import AttnsegError
from tests.hostile.drive import MOST_BYTES, SilentlyWrongError


class Planted:
    """Behaves by the index of the input, which is the name of its folder."""

    def __init__(self, _: Path) -> None:
        self.held = b""

    def make(self, rng: Generator, folder: Path) -> None:
        """See `Reader.make`."""
        (folder / "value").write_text(str(rng.integers(1 << 30)))

    def read(self, folder: Path) -> None:
        """See `Reader.read`."""
        index = int(folder.name)
        if index == 1:
            raise AttnsegError("refused")
        if index == 2:
            raise KeyError("x")
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 4:
            raise SilentlyWrongError("1 is not 2")
        if index == 5:
            self.held = b"\1" * (MOST_BYTES + 1)
        if index == 6:
            time.sleep(60)
        if index == 7:
            raise AttnsegError("")
