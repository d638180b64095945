"""Command line: each command parses its options, calls one function, and prints."""

from attnseg.cli.app import main

__all__ = ["main"]
