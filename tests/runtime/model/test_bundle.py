from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from attnseg.export.source.checkpoint import load_trained
from attnseg.runtime.engines.cpu import CPU_ENGINES
from attnseg.runtime.engines.select import EngineRequest, select_engine
from attnseg.runtime.errors import BundleError
from attnseg.runtime.model.bundle import (
    Bundle,
    BundleFile,
    default_folder,
    draft_bundle,
    file_entry,
)
from attnseg.runtime.model.golden import read_golden
from attnseg.runtime.model.manifest import FileEntry
from attnseg.runtime.model.manifest_format import decode_manifest, encode_manifest
from attnseg.runtime.model.verdict import read_verdicts
from attnseg.runtime.steps.resample import Grid
from tests.bundles import small_graph, write_bundle


@pytest.fixture
def bundle_folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(default_folder(), tmp_path / "bundle"))


def edit_manifest(folder: Path, **changes: Any) -> None:
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = manifest
        for parent in parents:
            target = target[parent]
        target[last] = value
    file.write_text(json.dumps(manifest))


BUILD = {
    "builder": "tensorrt-rtx",
    "version": "1.7",
    "target": "sm86",
    "compatibility": "same",
    "version_compatible": False,
    "window": [64, 64, 64],
    "batch": 1,
}


def entry(role: str, precision: str | None, engine: dict[str, Any] | None = None) -> dict[str, Any]:
    """A file's entry in a manifest."""
    kind = {"role": role, "precision": precision, "engine": engine}
    return {**kind, "sha256": "0" * 64, "size_bytes": 1}


def as_version_1(folder: Path) -> None:
    """Turn the manifest into what the first version of the format was."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["format_version"] = 1
    for name in ("budget", "grid"):
        manifest.pop(name, None)
    kept = ("role", "sha256", "size_bytes")
    manifest["files"] = {
        name: {key: found[key] for key in kept}
        for name, found in manifest["files"].items()
        if found["role"] in ("onnx", "weights") and found.get("precision") in (None, "fp32")
    }
    file.write_text(json.dumps(manifest))


def test_a_bundle_of_version_1_is_read_as_one_in_fp32(bundle_folder: Path) -> None:
    as_version_1(bundle_folder)
    bundle = Bundle.load(bundle_folder)
    assert bundle.manifest.budget is None
    assert bundle.manifest.preprocessing.grid is None
    kinds = {(e.role, e.precision) for e in bundle.manifest.files.values()}
    assert kinds == {("onnx", "fp32"), ("weights", None)}
    edit_manifest(bundle_folder, colour="red")
    with pytest.raises(BundleError, match="colour: Extra inputs"):
        Bundle.load(bundle_folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("inference__placement", "even"),
        ("inference__mirror_axes", [0]),
        ("inference__empty_windows", "run"),
        ("grid", {"shape": [64, 64, 64], "order": 3}),
        ("grid", {"shape": [64, 64, 64], "back": "probabilities"}),
        ("activation", "sigmoid"),
    ],
)
def test_version_2_has_no_field_of_version_3(bundle_folder: Path, field: str, value: Any) -> None:
    assert json.loads((bundle_folder / "manifest.json").read_text())["format_version"] == 2
    edit_manifest(bundle_folder, grid={"shape": [64, 64, 64]})
    assert Bundle.load(bundle_folder).manifest.preprocessing.grid == Grid(shape=(64, 64, 64))
    edit_manifest(bundle_folder, **{field: value})
    with pytest.raises(BundleError, match="Extra inputs"):
        Bundle.load(bundle_folder)


def test_a_file_is_found_by_role_and_precision(bundle_folder: Path) -> None:
    (bundle_folder / "half.onnx").write_bytes(small_graph())
    half = file_entry("onnx", small_graph(), "fp16")
    files = Bundle.load(bundle_folder).manifest.files
    kept = {name: asdict(e) for name, e in files.items()}
    changes = {"files": {**kept, "half.onnx": asdict(half)}}
    upgraded = {"format_version": 2, "budget": None, "grid": None, **changes}
    edit_manifest(bundle_folder, **upgraded)
    bundle = Bundle.load(bundle_folder)
    assert bundle.file("onnx").name == "model.onnx"
    assert bundle.file("onnx", "fp16").name == "half.onnx"
    assert bundle.has("onnx", "fp16") and not bundle.has("onnx", "int8")
    with pytest.raises(BundleError, match="no file of role onnx int8; export the model"):
        bundle.file("onnx", "int8")


def test_the_shipped_bundle_says_what_it_is() -> None:
    manifest = Bundle.default().manifest
    assert manifest.intended_use == "research demonstration, not for clinical use"
    assert [c.name for c in manifest.task.channels] == ["t1", "t1ce", "t2", "flair"]
    assert [label.value for label in manifest.task.labels] == [0, 1, 2, 4]
    assert manifest.task.regions == {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}
    assert manifest.training is not None
    assert len(manifest.training.train_cases) == 24
    assert len(manifest.training.validation_cases) == 6
    assert manifest.validation is not None
    assert set(manifest.validation.dice) == {"WT", "TC", "ET"}


def test_the_checksum_changes_with_any_file(bundle_folder: Path) -> None:
    before = Bundle.load(bundle_folder).sha256
    edit_manifest(bundle_folder, description="another")
    assert Bundle.load(bundle_folder).sha256 != before


@pytest.mark.parametrize("name", ["model.onnx", "weights.safetensors"])
def test_a_changed_file_is_refused(bundle_folder: Path, name: str) -> None:
    content = bytearray((bundle_folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle_folder / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name}: does not match its checksum"):
        Bundle.load(bundle_folder)


def test_a_missing_file_is_named(bundle_folder: Path) -> None:
    (bundle_folder / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx: cannot be read"):
        Bundle.load(bundle_folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.onnx", "is an ONNX file, .*attnseg export {}/m.onnx --spec model.json -o m$"),
        ("best.pt", "is a checkpoint, .* attnseg export {}/best.pt -o best$"),
        ("w.safetensors", "is a file of weights, .* attnseg export {}/w.safetensors -o w$"),
    ],
)
def test_a_model_file_is_refused_with_the_line_that_exports_it(
    tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / name).touch()
    with pytest.raises(BundleError, match=message.format(re.escape(str(tmp_path)))):
        Bundle.load(tmp_path / name)


def test_a_file_of_a_bundle_is_refused_with_the_name_of_the_bundle(bundle_folder: Path) -> None:
    message = f"is a file of a bundle; give the bundle, {re.escape(str(bundle_folder))}$"
    with pytest.raises(BundleError, match=message):
        Bundle.load(bundle_folder / "model.onnx")


def test_folders_and_files_that_are_no_bundle_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BundleError, match="is not a bundle"):
            Bundle.load(path)
    file = tmp_path / "model.onnx"
    file.write_bytes(b"onnx")
    with pytest.raises(BundleError, match="attnseg export"):
        Bundle.load(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 4}, "format_version 4 is not known .*, which reads 1 to 3; install"),
        ({"format": "zip"}, "format: "),
        ({"colour": "red"}, "colour: Extra inputs"),
        ({"inference__colour": "red"}, r"inference\.colour"),
        ({"normalisation__colour": "red"}, r"normalisation\.colour"),
        ({"orientation": "XYZ"}, "orientation XYZ does not name each axis once"),
        ({"orientation": "LRS"}, "orientation LRS does not name each axis once"),
        ({"display": []}, "display names a channel that does not exist"),
        ({"normalisation": {}}, r"normalisation\.foreground: Field required"),
        ({"normalisation": {"foreground": "nonzero"}}, r"normalisation\.landmarks: Field required"),
        ({"channels": [{"name": "t1", "suffixes": []}]}, "channel t1 needs suffixes"),
        ({"channels": [{"name": "t1", "suffixes": ["_T1"]}]}, "in lower case"),
        (
            {"channels": [{"name": "a", "suffixes": [""]}, {"name": "b", "suffixes": ["_b"]}]},
            "an empty suffix stands for any file",
        ),
        ({"inference": {"overlap": 0.25}}, r"inference\.window"),
        ({"spacing_mm": [0, 1, 1]}, "spacing_mm"),
        ({"files": {}}, "one file of role onnx in fp32"),
        ({"files": {"a.onnx": entry("onnx", "fp16")}}, "one file of role onnx in fp32"),
        (
            {"files": {"a.onnx": entry("onnx", "fp32"), "b.onnx": entry("onnx", "fp32")}},
            "no precision twice",
        ),
        ({"files": {"a": entry("weights", "fp32")}}, "precision belongs to files of role onnx"),
        ({"files": {"a": entry("onnx", None)}}, "precision belongs to files of role onnx"),
        ({"files": {"a": entry("engine", "fp16")}}, "engine belongs to files of role engine"),
        ({"files": {"a": entry("onnx", "fp32", BUILD)}}, "engine belongs to files of role engine"),
        (
            {"files": {"a": entry("engine", "fp16", {**BUILD, "target": "8.6"})}},
            r"files\.a\.engine: target",
        ),
        ({"budget": {"dice": 0, "volume_percent": 1}}, r"budget\.dice"),
        ({"labels": [{"name": "a", "value": 0}, {"name": "b", "value": 0}]}, "labels must start"),
        ({"labels": [{"name": "a", "value": 3}, {"name": "b", "value": 0}]}, "labels must start"),
        ({"inference__window": [60, 64, 64]}, "not a multiple"),
        ({"inference__overlap": 1.0}, r"inference\.overlap"),
        ({"regions": {"WT": [9]}}, "region WT names a label"),
        ({"display": ["ct"]}, "display names a channel"),
        ({"labels": []}, "labels"),
        ({"channels": []}, "channels"),
        ({"normalisation__landmarks__percentiles": [1, 0]}, "one value per percentile"),
    ],
    ids=str,
)
def test_a_manifest_that_breaks_the_format_is_refused(
    bundle_folder: Path, change: dict[str, Any], message: str
) -> None:
    edit_manifest(bundle_folder, **change)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.load(bundle_folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "a/b", "a\\b", "..", ""])
def test_file_names_cannot_leave_the_folder(bundle_folder: Path, name: str) -> None:
    entry = {"role": "onnx", "precision": "fp32", "engine": None, "sha256": "0" * 64}
    edit_manifest(bundle_folder, files={name: entry | {"size_bytes": 1}})
    with pytest.raises(BundleError, match="is not a plain file name"):
        Bundle.load(bundle_folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\xff"])
def test_a_manifest_that_is_no_json_is_refused(bundle_folder: Path, text: str) -> None:
    (bundle_folder / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json: "):
        Bundle.load(bundle_folder)


def test_a_manifest_is_written_again_byte_for_byte() -> None:
    """So that a model that is exported again keeps the checksum that its results name."""
    shipped = decode_manifest((default_folder() / "manifest.json").read_bytes())
    stored = encode_manifest(shipped)
    assert json.loads(stored)["format_version"] == 3
    assert encode_manifest(decode_manifest(stored)) == stored
    assert decode_manifest(stored) == shipped


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_manifest_says_what_its_version_3_does(bundle_folder: Path, version: int) -> None:
    """Every field that version 3 added has the value that the older versions meant."""
    if version == 1:
        as_version_1(bundle_folder)
    older = (bundle_folder / "manifest.json").read_bytes()
    assert json.loads(older)["format_version"] == version
    stored = json.loads(encode_manifest(decode_manifest(older)))
    added = {name: stored[name] for name in ("activation", "outputs", "axes", "order", "crop")}
    assert added == {
        "activation": "softmax",
        "outputs": [],
        "axes": "xyz",
        "order": ["resample", "crop", "normalise"],
        "crop": "nonzero",
    }
    assert stored["inference"] == {
        **json.loads(older)["inference"],
        "placement": "stride",
        "weights": "gaussian",
        "mirror_axes": [],
        "accumulate": "single",
        "empty_windows": "skip",
    }
    landmarks = json.loads(older)["normalisation"]["landmarks"]
    assert stored["normalisation"] == [
        {
            "scheme": "landmarks",
            "region": "nonzero",
            "percentiles": landmarks["percentiles"],
            "values": values,
        }
        for values in landmarks["values"]
    ]


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("sha256", "zz", "sha256 must be 64 hexadecimal digits, got zz"),
        ("size_bytes", 0, "size_bytes must be positive and at most 4294967296, got 0"),
        ("precision", None, "precision belongs to files of role onnx and engine"),
    ],
)
def test_an_entry_that_breaks_a_rule_is_named(
    bundle_folder: Path, field: str, value: object, rule: str
) -> None:
    files = json.loads((bundle_folder / "manifest.json").read_text())["files"]
    files["model.onnx"][field] = value
    edit_manifest(bundle_folder, files=files)
    with pytest.raises(BundleError, match=rf"files\.model\.onnx: {rule}"):
        Bundle.load(bundle_folder)


def test_a_failure_beside_the_bundle_is_no_failure_to_write_it(tmp_path: Path) -> None:
    manifest = Bundle.default().manifest
    with pytest.raises(FileNotFoundError), draft_bundle(tmp_path / "model", manifest):
        (tmp_path / "scratch" / "file").read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_read_back_as_written(tmp_path: Path) -> None:
    manifest = Bundle.default().manifest
    files = {"model.onnx": small_graph()}
    entry = file_entry("onnx", small_graph(), "fp32")
    manifest = replace(manifest, files={"model.onnx": entry})
    bundle = write_bundle(tmp_path / "deep" / "bundle", manifest, files)
    assert bundle.manifest == manifest
    assert bundle.file("onnx").read_bytes() == small_graph()
    with pytest.raises(BundleError, match="no file of role weights"):
        bundle.file("weights")


def test_a_taken_folder_is_left_as_it_was(bundle_folder: Path) -> None:
    before = sorted(bundle_folder.iterdir())
    with pytest.raises(BundleError, match="holds a bundle already; give overwrite=True"):
        write_bundle(bundle_folder, Bundle.default().manifest, {})
    assert sorted(bundle_folder.iterdir()) == before


def rewrite(folder: Path) -> None:
    shipped = Bundle.default()
    with draft_bundle(folder, shipped.manifest, overwrite=True) as draft:
        for name, entry in shipped.manifest.files.items():
            draft.add(name, (shipped.folder / name).read_bytes(), entry)
        draft.commit()


def test_a_bundle_is_replaced_once_the_new_one_is_complete(bundle_folder: Path) -> None:
    edit_manifest(bundle_folder, name="old")
    with (
        pytest.raises(ZeroDivisionError),
        draft_bundle(bundle_folder, Bundle.default().manifest, overwrite=True),
    ):
        _ = 1 / 0
    assert Bundle.load(bundle_folder).manifest.name == "old"
    rewrite(bundle_folder)
    assert Bundle.load(bundle_folder).manifest == Bundle.default().manifest
    assert [f.name for f in bundle_folder.parent.iterdir() if f.name.endswith(".part")] == []


def test_a_folder_with_other_files_is_never_replaced(bundle_folder: Path, tmp_path: Path) -> None:
    (bundle_folder / "thesis.docx").touch()
    with pytest.raises(BundleError, match=r"holds thesis\.docx, which is no file of its bundle"):
        rewrite(bundle_folder)
    other = tmp_path / "web"
    other.mkdir()
    (other / "manifest.json").write_text("{}")
    with pytest.raises(BundleError, match=r"manifest\.json: "):
        rewrite(other)
    assert (bundle_folder / "thesis.docx").exists() and (other / "manifest.json").exists()


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = Bundle.default()
    manifest, (name, *_) = shipped.manifest, shipped.manifest.files
    (tmp_path / "deep").touch()
    with pytest.raises(BundleError, match="could not be written"):
        write_bundle(tmp_path / "deep" / "bundle", manifest, {name: b"x"})
    (tmp_path / "deep").unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(BundleError, match=r"could not be written \(No space left"):
        write_bundle(tmp_path / "made" / "deep" / "bundle", manifest, {name: b"x"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", ["format", "format_version", "labels"])
def test_every_field_must_be_there(bundle_folder: Path, field: str) -> None:
    file = bundle_folder / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest[field]
    file.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=field):
        Bundle.load(bundle_folder)


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz"])
def test_a_file_that_is_no_regular_file_is_refused_and_not_waited_for(
    bundle_folder: Path, name: str
) -> None:
    file = bundle_folder / name
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(BundleError, match=f"{name}: is not a regular file"):
        Bundle.load(bundle_folder)
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(BundleError, match=f"{name}: is not a regular file"):
        Bundle.load(bundle_folder)
    file.unlink()
    file.mkdir()
    with pytest.raises(BundleError, match=rf"{name}: cannot be read \(Is a directory\)"):
        Bundle.load(bundle_folder)


def test_a_link_stands_for_the_file_that_it_names(bundle_folder: Path, tmp_path: Path) -> None:
    """Caches of models keep files under their checksums and link to them."""
    expected = Bundle.load(bundle_folder)
    for name in ("model.onnx", "golden.npz", "manifest.json"):
        (bundle_folder / name).rename(tmp_path / name)
        (bundle_folder / name).symlink_to(tmp_path / name)
    assert Bundle.load(bundle_folder) == expected
    (tmp_path / "golden.npz").write_bytes(b"another")
    with pytest.raises(BundleError, match=r"golden\.npz: does not match its checksum"):
        Bundle.load(bundle_folder)
    (tmp_path / "golden.npz").unlink()
    with pytest.raises(BundleError, match=r"golden\.npz: cannot be read \(No such file"):
        Bundle.load(bundle_folder)


@pytest.mark.parametrize("name", ["README.md", "golden.npz", "weights.safetensors"])
def test_a_file_of_another_size_is_not_read(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with (bundle_folder / name).open("ab") as stream:
        stream.write(b"x")
    read = []
    digest = hashlib.file_digest

    def recorded(stream: Any, kind: str) -> Any:
        read.append(Path(stream.name).name)
        return digest(stream, kind)

    monkeypatch.setattr(hashlib, "file_digest", recorded)
    with pytest.raises(BundleError, match=f"{name}: does not match its checksum"):
        Bundle.load(bundle_folder)
    assert name not in read


def test_a_graph_is_read_to_its_size_in_the_manifest_and_no_further(bundle_folder: Path) -> None:
    with (bundle_folder / "model.onnx").open("ab") as stream:
        stream.truncate(1 << 33)  # 8 GB of zeros, which take no space
    tracemalloc.start()
    with pytest.raises(BundleError, match=r"model\.onnx: does not match its checksum"):
        Bundle.load(bundle_folder)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_a_file_of_another_size_never_matches(bundle_folder: Path) -> None:
    """The checksum is that of no bytes at all."""
    files = json.loads((bundle_folder / "manifest.json").read_text())["files"]
    files["README.md"] |= {"sha256": hashlib.sha256().hexdigest(), "size_bytes": 5}
    edit_manifest(bundle_folder, files=files)
    with pytest.raises(BundleError, match=r"README\.md: does not match its checksum"):
        Bundle.load(bundle_folder)
    entry = FileEntry("card", None, None, hashlib.sha256().hexdigest(), 5)
    with pytest.raises(BundleError, match=r"README\.md: does not match its checksum"):
        BundleFile(bundle_folder / "README.md", entry).read_bytes()


def test_a_manifest_has_a_largest_size(bundle_folder: Path) -> None:
    with (bundle_folder / "manifest.json").open("ab") as stream:
        stream.truncate(1 << 33)
    with pytest.raises(BundleError, match=r"json: has 8589934592 bytes, more than 16777216"):
        Bundle.load(bundle_folder)


def test_the_size_of_a_file_in_the_manifest_has_a_largest_value(bundle_folder: Path) -> None:
    files = json.loads((bundle_folder / "manifest.json").read_text())["files"]
    files["golden.npz"]["size_bytes"] = 1 << 40
    edit_manifest(bundle_folder, files=files)
    message = "size_bytes must be positive and at most 4294967296, got 1099511627776"
    with pytest.raises(BundleError, match=message):
        Bundle.load(bundle_folder)


def test_a_file_that_is_exchanged_after_loading_is_never_given_out(bundle_folder: Path) -> None:
    loaded = Bundle.load(bundle_folder)
    for file in loaded.files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.path.write_bytes(content)
    for file in loaded.files:
        with pytest.raises(BundleError, match=f"{file.name}: does not match its checksum"):
            file.read_bytes()
    for read in (read_golden, read_verdicts):
        with pytest.raises(BundleError, match="does not match its checksum"):
            read(loaded)
    for engine in CPU_ENGINES:
        request = EngineRequest(engine=engine, precision="fp32")
        with pytest.raises(BundleError, match=r"model\.onnx: does not match its checksum"):
            select_engine(loaded, request)
    with pytest.raises(BundleError, match=r"weights\.safetensors: does not match its checksum"):
        load_trained(loaded.file("weights"))


@pytest.mark.parametrize("version", [True, 1.0, 2.0])
def test_a_version_that_is_only_equal_to_a_number_is_refused(
    bundle_folder: Path, version: object
) -> None:
    edit_manifest(bundle_folder, format_version=version)
    with pytest.raises(BundleError, match=f"format_version: must be a whole number, got {version}"):
        Bundle.load(bundle_folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "a", "format": "b"}', "'format' occurs twice"),
        ('{"a":' * 5000, "nested too deeply"),
        ("[1, 2", "is not JSON"),
        ("[]", "manifest"),
    ],
)
def test_a_manifest_that_is_no_plain_json_is_refused(
    bundle_folder: Path, text: str, message: str
) -> None:
    (bundle_folder / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=rf"manifest\.json: .*{message}"):
        Bundle.load(bundle_folder)


@pytest.mark.parametrize("name", ["core\nother", "core\x1b[31m", "core\x00", "core\u202e"])
@pytest.mark.parametrize("kind", ["labels", "channels", "regions"])
def test_a_name_with_a_control_character_is_refused(
    bundle_folder: Path, name: str, kind: str
) -> None:
    stored = json.loads((bundle_folder / "manifest.json").read_text())[kind]
    if kind == "regions":
        stored[name] = [1]
    else:
        stored[0]["name"] = name
    edit_manifest(bundle_folder, **{kind: stored})
    message = f"name {name!r} must be one line of printable characters"
    with pytest.raises(BundleError, match=re.escape(message)) as caught:
        Bundle.load(bundle_folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inference__window": [512, 512, 512]}, "has more than 16777216 voxels"),
        ({"grid": {"shape": [1200, 1200, 1200], "spacing_mm": None}}, "at most 268435456 voxels"),
        ({"grid": {"shape": [100_000_000, 1, 1000], "spacing_mm": None}}, "at most 268435456"),
    ],
)
def test_sizes_that_would_take_all_memory_are_refused(
    bundle_folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit_manifest(bundle_folder, **changes)
    with pytest.raises(BundleError, match=message):
        Bundle.load(bundle_folder)
