"""An error's cause and mend, as the library and as the command line say them."""

from __future__ import annotations

import click
import pytest

from attnseg import AttnsegError
from attnseg.cli.app import main
from attnseg.cli.console import as_option, in_one_line
from attnseg.runtime.errors import ConfigError, EngineError, Setting, TrainingSetting


def test_the_text_of_an_error_is_its_cause_and_its_mend() -> None:
    assert str(EngineError("the GPU failed")) == "the GPU failed"
    assert str(EngineError("the GPU failed", "restart")) == "the GPU failed; restart"


def test_a_long_value_is_shortened_in_the_middle() -> None:
    error = AttnsegError(f"a.json: name {'x' * 100_000} is too long", "shorten it")
    assert str(error).startswith("a.json: name xxx") and "xxx [...] xxx" in str(error)
    assert str(error).endswith("xxx is too long; shorten it")
    assert len(str(error)) < 4100
    assert str(error.detached()) == str(error)


def test_a_mend_names_settings_as_python_writes_them() -> None:
    error = ConfigError(
        "x", "give {} or {}, not {}", Setting("device", "cpu"), Setting("fp16", True), Setting("y")
    )
    assert str(error) == "x; give device='cpu' or fp16=True, not y"
    assert (error.cause, error.mend) == ("x", "give {} or {}, not {}")


def test_braces_of_a_name_before_a_setting_are_left_as_they_are() -> None:
    error = AttnsegError("a", "rename {}_t1.nii, or give {} {}", Setting("x"), Setting("y", 1))
    assert str(error) == "a; rename {}_t1.nii, or give x y=1"


def test_braces_of_a_name_are_no_place_for_a_setting() -> None:
    assert str(AttnsegError("scan{}.nii: is empty", "delete scan{}.nii")) == (
        "scan{}.nii: is empty; delete scan{}.nii"
    )
    error = AttnsegError("scan{}.nii: is empty", "use {}", Setting("engine", "openvino"))
    assert str(error) == "scan{}.nii: is empty; use engine='openvino'"


@pytest.mark.parametrize(
    ("command", "setting", "text"),
    [
        ("run", Setting("device", "cpu"), "--device cpu"),
        ("run", Setting("device"), "--device"),
        ("run", Setting("max_memory_bytes"), "--max-memory"),
        ("run", Setting("overwrite", True), "--overwrite"),
        ("evaluate", Setting("cases", "all"), "--cases all"),
        ("export", Setting("fp16", True), "--fp16"),
        ("train", Setting("multi_scale", False), "--no-multi-scale"),
        ("train", TrainingSetting("epochs", 30), "--set epochs=30"),
        ("train", TrainingSetting("amp", False), "--set amp=false"),
        ("train", TrainingSetting("spacing_mm", (1.0, 1.0, 2.5)), "--set spacing_mm=1,1,2.5"),
        # an option of another command, and a setting that no command has
        ("run", Setting("resume", True), "--resume"),
        ("run", Setting("stream"), "stream"),
    ],
)
def test_the_command_line_names_its_own_options(command: str, setting: Setting, text: str) -> None:
    root = click.Context(main, info_name="attnseg")
    with click.Context(main.commands[command], parent=root, info_name=command):
        assert as_option(setting) == text
        assert in_one_line(ConfigError("x", "say {}", setting)) == f"x; say {text}"


def test_an_error_is_one_line_whatever_a_library_puts_into_it() -> None:
    with click.Context(main):
        assert in_one_line(EngineError("first\n  second", "third")) == "first second; third"
