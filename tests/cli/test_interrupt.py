"""Ctrl-C in the first second of a command, while modules are loaded."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

SLOW_IMPORT = """
import sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            print("loading", flush=True)
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                raise ImportError("initialisation failed")  # as extension modules do
sys.meta_path.insert(0, Slow())
sys.argv = ["attnseg", *{arguments!r}]
from attnseg.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("numpy", ["--version"]), ("click", ["run", "x"]), ("rich", ["--help"])],
)
def test_ctrl_c_while_modules_are_loaded_is_one_line(module: str, arguments: list[str]) -> None:
    code = SLOW_IMPORT.format(module=module, arguments=arguments)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "stopped\n")
    assert time.monotonic() - begun < 30
