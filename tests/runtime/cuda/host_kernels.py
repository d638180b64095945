"""`kernels.cu` compiled as host C++: the same kernel bodies in a loop, on numpy memory."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

from attnseg.runtime.cuda.kernels import ARGUMENTS, SOURCE

FLAGS = ("-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")


class HostKernels:
    """Compiled by g++ into a folder."""

    def __init__(self, folder: Path) -> None:
        library = folder / "kernels.so"
        command = ["g++", "-x", "c++", *FLAGS, "-o", str(library), str(SOURCE)]
        subprocess.run(command, check=True, capture_output=True)
        self._library = ctypes.CDLL(str(library))

    def launch(self, name: str, count: int, args: ctypes.Structure) -> None:
        assert isinstance(args, ARGUMENTS[name])
        self._library[name](ctypes.c_uint(count), ctypes.byref(args))
