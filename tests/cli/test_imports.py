"""The command line of `attnseg import`."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from attnseg.cli.app import main
from tests.imports.models import NnUNetFolder, write_scan


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return NnUNetFolder().write(tmp_path / "model")


@pytest.mark.parametrize("folds", ["", ",", " , ", "0-1", "x", "0,-1"])
def test_folds_are_all_or_numbers(folder: Path, tmp_path: Path, folds: str) -> None:
    command = ["import", "nnunet", str(folder), "-o", str(tmp_path / "bundle"), "--folds", folds]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2  # wrong usage
    assert f"give all, or numbers such as 0,1, got {folds!r}." in " ".join(result.stderr.split())
    assert not (tmp_path / "bundle").exists()


def test_nnunetv2_is_named_with_its_version_where_it_is_missing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnseg.cli.imports.missing", lambda names: list(names))
    command = ["import", "nnunet", str(folder), "-o", str(tmp_path / "bundle")]
    result = CliRunner().invoke(main, [*command, "--verify", str(tmp_path)])
    assert "--verify needs nnunetv2; pip install nnunetv2==2.8.1" in result.stderr


def test_a_folder_to_verify_on_is_searched_before_the_export(folder: Path, tmp_path: Path) -> None:
    bundle, cases = tmp_path / "bundle", tmp_path / "nothing"
    command = ["import", "nnunet", str(folder), "-o", str(bundle), "--verify", str(cases)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert str(cases) in result.stderr
    assert not bundle.exists()


def test_the_console_of_verify_holds_the_comparison_only(folder: Path, tmp_path: Path) -> None:
    bundle, cases = tmp_path / "bundle", tmp_path / "scans"
    write_scan(cases, "case")
    command = ["import", "nnunet", str(folder), "-o", str(bundle), "--verify", str(cases)]
    result = CliRunner().invoke(main, command)
    assert "1 of 1 cases equal nnU-Net's labels" in result.output
    assert "perform_everything_on_device" not in result.output
    assert result.exit_code == 0


def test_a_folder_without_a_model_is_named_before_the_scans(tmp_path: Path) -> None:
    command = ["import", "nnunet", str(tmp_path / "no"), "-o", str(tmp_path / "bundle")]
    result = CliRunner().invoke(main, [*command, "--verify", str(tmp_path)])
    assert "no: is not a folder; give a model folder of nnU-Net" in result.stderr


@pytest.mark.parametrize("name", ["nnunet", "monai", "torchscript"])
def test_the_help_tells_the_exit_code(name: str) -> None:
    text = " ".join(CliRunner().invoke(main, ["import", name, "--help"]).output.split())
    assert "The exit code is 1 if an engine or precision was left out of the bundle" in text
