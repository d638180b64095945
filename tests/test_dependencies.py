"""What a command imports, what its extra installs and what its error names are the same."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import attnseg
from attnseg.runtime.extras import MODULES

ROOT = Path(attnseg.__file__).parent
PROJECT = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]


def _name(requirement: str) -> str:
    return re.split(r"[\s<>=\[;]", requirement)[0].lower()


def _distributions(extra: str | None) -> set[str]:
    """Distributions that an extra installs beside the base, with the extras that it includes."""
    required = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    found: set[str] = set()
    for requirement in required:
        included = re.match(r"attnseg\[(.+)\]", requirement)
        if included:
            found |= set().union(*(_distributions(name) for name in included[1].split(",")))
        else:
            found.add(_name(requirement))
    return found


def _modules(distributions: set[str]) -> set[str]:
    """Top-level modules of distributions that are installed here."""
    return {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if distributions & {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners}
    }


def _imported(file: Path) -> Iterator[str]:
    """Modules imported when a file is loaded: not those in functions or for types only."""
    pending: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))


def _third_party(package: str) -> set[str]:
    """Top-level third-party modules that loading every file of a package loads."""
    pending, seen, found = list((ROOT / package).rglob("*.py")), set[Path](), set[str]()
    while pending:
        file = pending.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in _imported(file):
            first, *rest = name.split(".")
            if first != "attnseg":
                found.add(first)
                continue
            for length in range(len(rest) + 1):
                base = ROOT.joinpath(*rest[:length])
                pending.extend(
                    f for f in (base.with_suffix(".py"), base / "__init__.py") if f.is_file()
                )
    return found - set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("package", "extra"),
    [
        ("runtime", None),
        ("cli", None),
        ("data", None),
        ("evaluation", "evaluate"),
        ("trainer", "train"),
        ("export", "export"),
    ],
)
def test_a_package_loads_only_what_its_extra_installs(package: str, extra: str | None) -> None:
    allowed = _modules(_distributions(None) | (_distributions(extra) if extra else set()))
    loaded = _third_party(package)
    assert "numpy" in loaded
    assert loaded <= allowed, f"attnseg.{package} needs {loaded - allowed}"


@pytest.mark.parametrize(
    ("package", "extra"), [("evaluation", "evaluate"), ("trainer", "train"), ("export", "export")]
)
def test_what_a_package_loads_is_looked_for_before_it_starts(package: str, extra: str) -> None:
    loaded = _third_party(package) - _modules(_distributions(None))
    assert loaded <= set(MODULES[extra]), f"extras.MODULES['{extra}'] lacks {loaded}"


@pytest.mark.parametrize("extra", MODULES)
def test_what_is_looked_for_is_installed_by_the_extra(extra: str) -> None:
    assert set(MODULES[extra]) <= _modules(_distributions(extra))


def test_the_reader_of_imports_sees_what_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "import scipy.ndimage\ntry:\n    from torch import nn\nexcept ImportError:\n    pass\n"
        "if TYPE_CHECKING:\n    import onnx\ndef f():\n    import monai\n"
        "class A:\n    import rich\n"
    )
    assert set(_imported(file)) == {"scipy.ndimage", "torch.nn", "rich"}


def _run(code: str) -> str:
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return found.stdout


@pytest.mark.parametrize("statement", ["from attnseg import *", "import attnseg.runtime.segmenter"])
def test_importing_the_runtime_loads_numpy_and_nothing_heavier(statement: str) -> None:
    print_modules = "\nimport sys; print(' '.join(sys.modules))"
    alone = set(_run("import numpy" + print_modules).split())
    added = set(_run(f"import numpy\n{statement}" + print_modules).split()) - alone
    third_party = {name.split(".")[0] for name in added} - set(sys.stdlib_module_names)
    assert third_party == {"attnseg", "numpy"}  # numpy loads more of itself
    assert not [name for name in added if name.startswith("attnseg.runtime.cuda")]
    assert "attnseg.runtime.segmenter" in added


def test_the_command_line_is_loaded_where_ctrl_c_is_handled() -> None:
    """`attnseg.__main__`, the entry point, loads neither numpy nor the commands by itself."""
    loaded = set(_run("import attnseg.__main__, sys; print(' '.join(sys.modules))").split())
    assert {name for name in loaded if name.startswith("attnseg")} == {
        "attnseg",
        "attnseg.__main__",
        "attnseg._version",
        "attnseg.interrupt",
        "attnseg.runtime",
        "attnseg.runtime.errors",
        "attnseg.runtime.limits",
    }
    assert not {"numpy", "click"} & loaded
    assert PROJECT["scripts"]["attnseg"] == "attnseg.__main__:main"
