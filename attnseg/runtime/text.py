"""Text of others, such as file names and words of a bundle, made harmless for each kind of output.

A file name may hold escape sequences that a terminal obeys, a formula that a spreadsheet computes,
or markup that a viewer renders.
"""

from __future__ import annotations

import re

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_MARKUP = re.compile(r"[\\`*\[\]<>|&]")


def one_line(text: str) -> str:
    """Text in one line of printable characters; others are written as Python escapes them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def markdown(text: str) -> str:
    """Text that Markdown shows as it is."""
    return _MARKUP.sub(lambda found: f"\\{found[0]}", one_line(text))


def csv_cell(text: str) -> str:
    """Text with an apostrophe in front if a spreadsheet would take it for a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def from_csv_cell(cell: str) -> str:
    """Inverse of `csv_cell`."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA) else cell
