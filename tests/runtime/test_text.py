from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnseg.runtime.text import csv_cell, from_csv_cell, markdown, one_line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("caf\u00e9 \u5cf6", "caf\u00e9 \u5cf6"),
        ("red \x1b[31m", "red \\x1b[31m"),
        ("two\nlines", "two\\nlines"),
        ("right \u202e left", "right \\u202e left"),
        ("lost \udc80 byte", "lost \\udc80 byte"),
    ],
)
def test_what_does_not_print_is_escaped(text: str, expected: str) -> None:
    assert one_line(text) == expected


@given(st.text())
def test_one_line_is_printable_and_stays_as_it_is(text: str) -> None:
    assert one_line(text).isprintable()
    assert one_line(one_line(text)) == one_line(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a_1", "a_1"),
        ("a|b", "a\\|b"),
        ("<img src=x>", "\\<img src=x\\>"),
        ("[x](http://y)", "\\[x\\](http://y)"),
    ],
)
def test_markup_is_shown_and_not_rendered(text: str, expected: str) -> None:
    assert markdown(text) == expected


@pytest.mark.parametrize("text", ['=HYPERLINK("x")', "@SUM(A1)", "+1", "-1", "\t=1"])
def test_a_formula_becomes_text(text: str) -> None:
    assert csv_cell(text) == "'" + text


@given(st.text())
def test_a_cell_is_read_back(text: str) -> None:
    assert from_csv_cell(csv_cell(text)) == text or text.startswith("'")
