"""Command line of the fuzzer: `python -m tests.fuzz TARGET`, then options of libFuzzer."""

from __future__ import annotations

import sys
import warnings

import atheris

INSTRUMENTED = ("attnseg", "nibabel.nifti1", "nibabel.wrapstruct", "isal.igzip", "zipfile", "json")


def main() -> None:
    """Fuzz one target from its corpus until a fault is found, or as long as it is told."""
    with atheris.instrument_imports(include=list(INSTRUMENTED)):
        from tests.fuzz.targets import CORPUS, TARGETS

    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in TARGETS:
        sys.exit(f"usage: python -m tests.fuzz {{{','.join(TARGETS)}}} [options of libFuzzer]")
    warnings.simplefilter("error")  # as in the tests
    target = TARGETS[name]()
    # New inputs are written to a folder of their own, not to the files of the tests.
    found = target.folder / "found"
    found.mkdir()
    arguments = [sys.argv[0], *sys.argv[2:], str(found), str(CORPUS / name)]
    atheris.Setup(arguments, lambda content: target(content))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
