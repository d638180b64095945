"""Trainers whose models are imported, beside those that nnU-Net ships."""

from __future__ import annotations

import ast
from pathlib import Path

import nnunetv2
import pytest

from attnseg.imports.nnunet_trainers import is_own_trainer

SOURCES = sorted((Path(nnunetv2.__file__).parent / "training" / "nnUNetTrainer").rglob("*.py"))
BUILDS = "build_network_architecture"


def classes() -> dict[str, ast.ClassDef]:
    nodes = (node for file in SOURCES for node in ast.parse(file.read_text()).body)
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}


def builder(name: str, known: dict[str, ast.ClassDef]) -> str:
    """Class whose method builds the network of a trainer."""
    node = known[name]
    if any(isinstance(own, ast.FunctionDef) and own.name == BUILDS for own in node.body):
        return name
    return builder(ast.unparse(node.bases[0]), known)


def test_nnunets_trainers_with_the_network_of_the_plans_are_accepted() -> None:
    known = classes()
    assert len(known) > 60
    plain = {n for n in known if builder(n, known) in ("nnUNetTrainer", "nnUNetTrainerBN")}
    assert {name for name in known if is_own_trainer(name)} == plain
    assert "nnUNet_Primus_S_Trainer" not in plain


@pytest.mark.parametrize(
    "name",
    [
        "nnUNetTrainer_100epochs_MyReLUNetwork",
        "nnUNetTrainerDA5_mine",
        "nnUNetTrainer_DASegOrd0_MyNetwork",
        "nnUNetTrainerBN_NoMirroring",
        "MyTrainer",
        "",
    ],
)
def test_other_trainers_are_custom(name: str) -> None:
    assert not is_own_trainer(name)


def test_any_number_of_epochs_is_a_name_of_nnunets_form() -> None:
    assert is_own_trainer("nnUNetTrainer_300epochs")
    assert is_own_trainer("nnUNetTrainer_300epochs_NoMirroring")
