from __future__ import annotations

import codecs

import pytest

from attnseg.runtime.errors import ConfigError
from attnseg.runtime.user_json import parse_json


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_byte_order_mark_is_skipped(mark: bytes) -> None:
    assert parse_json(mark + b'{"a": [1, "\xc3\xa4"]}') == {"a": [1, "\u00e4"]}
    assert parse_json('{"a": 1}'.encode("utf-16")) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n "a": 1,\n}', r"is not JSON: a comma before the closing } \(line [23]\)"),
        ("[1,\n2,\n ]", r"is not JSON: a comma before the closing ] \(line [23]\)"),
        ('{"a" 1}', r"is not JSON: Expecting ':' delimiter \(line 1\)"),
        ("", r"is not JSON: Expecting value \(line 1\)"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "is not JSON: 'c' occurs twice"),
        ("[" * 100_000, "is not JSON: nested too deeply"),
        ("\udcff", "is not JSON: .*can't decode"),
        ("[" + "9" * 5000 + "]", "is not JSON: .*digits"),
        ("[NaN]", "is not JSON: a number is not finite or too large, NaN"),
        ("[-Infinity]", "is not JSON: a number is not finite or too large, -Infinity"),
        ("[1e999]", "is not JSON: a number is not finite or too large, 1e999"),
    ],
)
def test_what_is_no_json_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_json(text.encode("utf-8", "surrogateescape"))
