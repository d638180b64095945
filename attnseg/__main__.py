"""The command line, as `attnseg` and as `python -m attnseg`."""

from __future__ import annotations

from attnseg.interrupt import leaving_on_interrupt


def main() -> None:
    """Load the command line, which takes most of a second, and run it."""
    with leaving_on_interrupt():
        from attnseg.cli.app import main as command_line
    command_line()


if __name__ == "__main__":
    main()
