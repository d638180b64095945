"""Rules on the structure of the project, checked against its source files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import attnseg

ROOT = Path(attnseg.__file__).parent
ABOVE = ("attnseg.cli", "attnseg.demo", "attnseg.doctor", "attnseg.inspect", "attnseg.interrupt")
FORBIDDEN = {
    "runtime": (
        "attnseg.data",
        "attnseg.evaluation",
        "attnseg.trainer",
        "attnseg.export",
        "attnseg.imports",
        "attnseg.synthetic",
        "torch",
        *ABOVE,
    ),
    "data": ("attnseg.evaluation", "attnseg.trainer", "attnseg.export", "torch", *ABOVE),
    "evaluation": ("attnseg.trainer", "attnseg.export", "torch", *ABOVE),
    "trainer": ("attnseg.export", *ABOVE),
    "export": ("attnseg.imports", "attnseg.cli"),
    "imports": ("attnseg.cli",),
}
"""What no file of a package imports."""

FLOORS = ("case", "steps", "model", "cuda", "engines", "pipelines", "results")
"""Folders of the runtime: each imports only those before it."""
OPTIONAL = (
    "torch",
    "tensorrt",
    "tensorrt_rtx",
    "monai",
    "dynamic_network_architectures",
    "nnunetv2",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "safetensors",
    "cryptography",
    "matplotlib",
    "tensorboard",
    "cupy",
    "cuda",
    "medpy",
    "SimpleITK",
    "hypothesis",
    "pytest",
)


def imported_names(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        for name in imported_names(file):
            for forbidden in FORBIDDEN[package]:
                assert not f"{name}.".startswith(f"{forbidden}."), f"{file} imports {name}"


@pytest.mark.parametrize("floor", FLOORS)
def test_folders_of_the_runtime_import_only_those_below(floor: str) -> None:
    above = [f"attnseg.runtime.{name}." for name in FLOORS[FLOORS.index(floor) + 1 :]]
    above += ["attnseg.runtime.segmenter.", "attnseg.runtime.folder."]
    if floor not in ("pipelines", "results"):
        above.append("attnseg.runtime.options.")
    for file in (ROOT / "runtime" / floor).rglob("*.py"):
        for name in imported_names(file):
            assert not f"{name}.".startswith(tuple(above)), f"{file} imports {name}"


def test_only_the_folder_of_cases_knows_the_segmenter() -> None:
    users = {
        file.name
        for file in (ROOT / "runtime").rglob("*.py")
        if "attnseg.runtime.segmenter" in imported_names(file)
    }
    assert users == {"folder.py"}


def test_only_the_pipelines_know_the_flow() -> None:
    """No step, engine or kernel imports a pipeline."""
    for folder in ("case", "steps", "model", "cuda", "engines"):
        for file in (ROOT / "runtime" / folder).rglob("*.py"):
            assert not [n for n in imported_names(file) if n.startswith("attnseg.runtime.pipel")]


def test_threads_are_started_in_one_place() -> None:
    """Those of the standard library may be waited for without end (`runtime/threads.py`)."""
    for file in ROOT.rglob("*.py"):
        names, own = imported_names(file), file.name == "threads.py"
        assert not [n for n in names if n.startswith(("concurrent", "threading.Thread"))], file
        assert own or ("_thread" not in names and "threading.Thread(" not in file.read_text()), file


def test_the_reader_of_imports_sees_every_way_to_import(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("import torch\nfrom attnseg import cli\nfrom attnseg.runtime import volume")
    assert {"torch", "attnseg.cli", "attnseg.runtime.volume"} <= imported_names(file)


def test_a_wheel_holds_the_model_and_the_types(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT.parent, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    models = "attnseg/runtime/model/default"
    for name in ("manifest.json", "model.onnx", "weights.safetensors"):
        assert f"{models}/{name}" in names
    assert "attnseg/py.typed" in names
    assert not [n for n in names if n.startswith(("tests", "benchmarks"))]


NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


@pytest.mark.parametrize("document", ["docs/reliability.md", "README.md", "SECURITY.md"])
def test_the_tests_that_a_document_names_exist(document: str) -> None:
    named = NAMED_TEST.findall((ROOT.parent / document).read_text(encoding="utf-8"))
    assert named
    for file, test in named:
        text = (ROOT.parent / file).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in text, f"{file} has no {test}"


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


BLOCK = f"""
import sys
class Without:
    def __init__(self, finder):
        self._finder = finder
    def __getattr__(self, name):
        return getattr(self._finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            return None
        return self._finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def test_the_runtime_imports_with_every_optional_package_blocked() -> None:
    modules = [
        "attnseg." + ".".join(f.relative_to(ROOT).with_suffix("").parts)
        for f in sorted((ROOT / "runtime").rglob("*.py"))
        if f.name != "__init__.py"
    ]
    assert "attnseg.runtime.segmenter" in modules
    imports = "\n".join(f"import {m}" for m in ["attnseg", "attnseg.cli", "attnseg.demo", *modules])
    result = run_python(BLOCK + imports)
    assert result.returncode == 0, result.stderr


def test_without_optional_packages_the_command_line_says_what_to_install(tmp_path: Path) -> None:
    call = BLOCK + "from attnseg.cli import main\nmain(ARGUMENTS)"
    for arguments, advice in (
        (["demo", "-o", str(tmp_path)], "pip install '.[cpu]'"),
        (["train", "--data", ".", "-o", str(tmp_path)], "pip install '.[train]'"),
        (["evaluate", "--data", ".", "-o", str(tmp_path)], "pip install '.[evaluate]'"),
        (["explain", "."], "pip install '.[evaluate]'"),
        (["summary"], "attnseg summary needs torch; pip install '.[train]'"),
        (["export", "x.pt", "-o", str(tmp_path)], "pip install '.[export]'"),
    ):
        result = run_python(call.replace("ARGUMENTS", repr(arguments)))
        assert result.returncode == 1
        assert advice in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1
    result = run_python(call.replace("ARGUMENTS", "['doctor']"))
    assert result.returncode == 1
    for text in ("not installed", ".[cpu]", ".[evaluate]", ".[train]", ".[export]"):
        assert text in result.stdout


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["train", "--data", ".", "-o", "o"], "train"),
        (["summary"], "train"),
        (["explain", "."], "evaluate"),
        (["evaluate", "--data", ".", "-o", "o"], "evaluate"),
        (["ablate", "--data", ".", "-o", "o"], "export"),
        (["export", "x.pt"], "export"),
        (["verify", "x"], "export"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_missing_package_is_needed_by_the_command_that_was_called(
    arguments: list[str], extra: str
) -> None:
    call = BLOCK + f"from attnseg.cli import main\nmain({arguments!r})"
    result = run_python(call)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: attnseg {arguments[0]} needs "), result.stderr
    assert f"'.[{extra}]'" in result.stderr


def test_verification_loads_no_package_of_the_trainer() -> None:
    code = """
import sys
import attnseg.export.verify
assert not {"torch", "safetensors", "onnxconverter_common", "onnxscript"} & set(sys.modules)
assert not [name for name in sys.modules if name.startswith("attnseg.trainer")]
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_running_a_case_never_loads_torch() -> None:
    code = """
import sys
import attnseg
from attnseg.synthetic import make_case
case = make_case(0, (64, 64, 64))
attnseg.Segmenter().segment(attnseg.Volume(case.images, case.affine))
assert not {"torch", "monai", "onnx"} & set(sys.modules)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


WITHOUT_TRAINER = BLOCK.replace(
    repr(OPTIONAL), repr(("torch", "onnx", "onnxscript", "safetensors"))
)


def test_a_bundle_is_evaluated_and_explained_without_pytorch(
    small_scan: Path, tmp_path: Path
) -> None:
    for arguments in (
        ["evaluate", "--data", str(small_scan), "--cases", "all", "-o", str(tmp_path / "e")],
        ["explain", str(small_scan), "-o", str(tmp_path / "x")],
    ):
        call = f"from attnseg.cli import main\nmain({arguments!r})"
        result = run_python(WITHOUT_TRAINER + call)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "e" / "summary.md").exists()
    assert (tmp_path / "x" / "small_attention.png").exists()
