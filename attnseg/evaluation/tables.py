"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attnseg.runtime.text import markdown


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format rows of cells as a Markdown table."""
    lines = [map(markdown, header), ["---"] * len(header), *(map(markdown, row) for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
