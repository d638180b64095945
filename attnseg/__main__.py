"""The command line, as `attnseg` and as `python -m attnseg`."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and "-m" in sys.orig_argv and not sys.flags.safe_path:
    del sys.path[0]  # the current folder, which may hold a click.py of somebody else

from attnseg.interrupt import leaving_on_interrupt
from attnseg.runtime.errors import ResourceError
from attnseg.runtime.limits import check_address_space, limit_reached

_LEAST_BYTES = 1_100_000_000  # of address space; less is never enough for a case


def main() -> None:
    """Load the command line, which takes most of a second, and run it."""
    # No step multiplies large matrices, and OpenBLAS raises SIGINT if it cannot start its threads.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        check_address_space(_LEAST_BYTES, "attnseg")
        with leaving_on_interrupt():
            from attnseg.cli.app import main as command_line
    except (ResourceError, ImportError, MemoryError, OSError) as error:
        reached = error if isinstance(error, ResourceError) else limit_reached(error)
        if reached is None:
            raise
        sys.exit(f"error: {reached}")  # with exit code 1
    command_line()


if __name__ == "__main__":
    main()
