from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from attnseg import Bundle, Segmenter, SegmentOptions, Volume
from attnseg.doctor import examine
from attnseg.export.engines.tensorrt import BuildOptions
from attnseg.export.export import ExportOptions, export_bundle
from attnseg.export.source.foreign import read_foreign, read_spec
from attnseg.export.verify import verify_bundle
from attnseg.runtime.errors import ConfigError, ExportError, TrainingError
from tests.export.conftest import Plain, spec_file


@pytest.fixture(scope="module")
def bundle(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("exported")
    engines = (BuildOptions("tensorrt-rtx", "sm86"),)
    options = ExportOptions(fp16=True, engines=engines, spec=spec_file(folder))
    return export_bundle(graph, folder / "model", options).bundle


def test_a_model_trained_elsewhere_gives_torchs_labels(bundle: Bundle, network: Plain) -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(40, 20, (32, 32, 32)).astype(np.float32)
    result = Segmenter(bundle, SegmentOptions(precision="fp32")).segment(Volume([image], np.eye(4)))
    z_scores = (image - image.mean()) / image.std()
    with torch.inference_mode():
        logits = network(torch.from_numpy(z_scores)[None, None])[0].numpy()
    assert set(np.unique(result.labels)) == {0, 1, 2}
    assert np.mean(result.labels == logits.argmax(axis=0)) > 0.999
    assert set(result.volumes_ml) == {"liver", "tumour"}


def test_its_bundle_is_whole_and_is_measured_again(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert (manifest.name, manifest.network) == ("liver-ct", {"onnx": "any_model.onnx"})
    assert (manifest.inference.window, manifest.inference.overlap) == ((32, 32, 32), 0.5)
    roles = {entry.role for entry in manifest.files.values()}
    assert roles == {"onnx", "engine", "golden", "parity", "card", "sbom", "log"}
    report = verify_bundle(bundle.folder)
    assert report.failures() == []
    assert {m.precision for m in report.measured} >= {"fp32", "fp16"}
    assert "Nothing is known of its training." in bundle.file("card").path.read_text()


def test_it_runs_from_the_command_line(bundle: Bundle, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from attnseg.cli import main

    image = np.random.default_rng(1).normal(40, 20, (40, 36, 33)).astype(np.float32)
    (tmp_path / "scan").mkdir()
    nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / "scan" / "a_ct.nii.gz")
    arguments = ["run", tmp_path / "scan", "-o", tmp_path / "out", "--model", bundle.folder]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    assert nib.load(tmp_path / "out" / "a_seg.nii.gz").shape == image.shape


def test_an_onnx_file_and_its_spec_need_each_other(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"any_model\.onnx: .*give spec='model"):
        export_bundle(graph, tmp_path / "model")
    checkpoint = tmp_path / "best.pt"
    checkpoint.touch()
    with pytest.raises(ConfigError, match="a spec is for ONNX files"):
        export_bundle(checkpoint, tmp_path / "model", ExportOptions(spec=spec_file(tmp_path)))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": None}, r"model\.json: channels: Field required"),
        ({"labels": []}, "labels must start with background, 0"),
        ({"name": None}, "name: Field required"),
        ({"windw": 3}, "windw: Extra inputs"),
        ({"inference": {"window": [32, 32]}}, r"inference\.window"),
        ({"inference": {"window": [33, 32, 32], "window_multiple": 2}}, "not a multiple"),
        ({"orientation": "RRS"}, "does not name each axis once"),
        ({"regions": {"all": [7]}}, "names a label that does not exist"),
        ({"regions": {}}, "regions: must not be empty"),
    ],
)
def test_a_spec_that_breaks_a_rule_names_it(
    graph: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    options = ExportOptions(spec=spec_file(tmp_path, **changes))
    with pytest.raises(ConfigError, match=message) as caught:
        export_bundle(graph, tmp_path / "model", options)
    assert "\n" not in str(caught.value)
    assert "model.json" in str(caught.value)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "spec: ")])
def test_a_spec_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_spec(tmp_path / "model.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_spec(tmp_path / "gone.json")
    with pytest.raises(ConfigError, match=r"cannot be read \(embedded null byte\)"):
        read_spec(tmp_path / "a\0b")


def save(folder: Path, shape: list[Any], kind: int = TensorProto.FLOAT, **node: Any) -> Path:
    """A file whose one node gives its input, three times over if it is a Concat."""
    out = [shape[0], 3, *shape[2:]]
    names = ["image"] * 3 if node.get("op_type", "Concat") == "Concat" else ["image"]
    fields = {"op_type": "Concat", "axis": 1, **node}
    ends = [
        helper.make_tensor_value_info(name, kind, dims)
        for name, dims in (("image", shape), ("logits", out))
    ]
    made = helper.make_node(inputs=names, outputs=["logits"], **fields)
    graph = helper.make_graph([made], "g", ends[:1], ends[1:])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)]
    path = folder / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ([1, 1, 32, 32], TensorProto.FLOAT, "is a 2-D model .*attnseg runs 3-D models"),
        ([1, 1], TensorProto.FLOAT, "is no model of images"),
        ([1, 1, 32, 32, 32], TensorProto.FLOAT16, "image is float16; give the fp32 model"),
        (["n", "x", "y", "z", 1], TensorProto.FLOAT, "channels last; transpose it in the graph"),
        ([1, 2, 32, 32, 32], TensorProto.FLOAT, "image has 2 channels, the spec names 1"),
        ([1, 1, 48, 32, 32], TensorProto.FLOAT, "takes 48x32x32 voxels.* window is 32x32x32"),
        ([4, 1, 32, 32, 32], TensorProto.FLOAT, "takes 4 windows at a time"),
    ],
)
def test_a_graph_that_does_not_fit_is_refused(
    tmp_path: Path, shape: list[Any], kind: int, message: str
) -> None:
    path = save(tmp_path, shape, kind)
    if isinstance(shape[1], int):
        # Three classes per input channel; the input is checked before the output.
        model = onnx.load(path)
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 3 * shape[1]
        onnx.save(model, path)
    with pytest.raises(ExportError, match=message):
        read_foreign(path, read_spec(spec_file(tmp_path)))


def test_an_operator_that_is_not_onnxs_own_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, ["n", 1, "x", "y", "z"], op_type="Magic", domain="mine")
    options = ExportOptions(spec=spec_file(tmp_path))
    with pytest.raises(ExportError, match=r"m\.onnx: ONNX Runtime cannot run it .*Magic") as caught:
        export_bundle(path, tmp_path / "model", options)
    assert "standard ONNX operators" in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_files_that_are_no_graphs_are_refused(tmp_path: Path, graph: Path) -> None:
    spec = read_spec(spec_file(tmp_path))
    with pytest.raises(TrainingError, match=r"gone\.onnx: does not exist; give an ONNX file"):
        export_bundle(tmp_path / "gone.onnx", tmp_path / "model", ExportOptions(spec=Path("s")))
    (tmp_path / "cut.onnx").write_bytes(graph.read_bytes()[:-50])
    with pytest.raises(ExportError, match=r"cut\.onnx: is damaged or not valid ONNX"):
        read_foreign(tmp_path / "cut.onnx", spec)


def test_a_dynamic_channel_is_fixed_and_shapes_are_not_rounded(tmp_path: Path) -> None:
    """A graph as exporters write them: channels unknown, and a reshape by the input's own shape."""
    ends = [
        helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", "c", "x", "y", "z"]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3, "x", "y", "z"]),
    ]
    weight = np.random.default_rng(0).standard_normal((3, 1, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["conv"], pads=[1] * 6),
        helper.make_node("Shape", ["conv"], ["shape"]),
        helper.make_node("Cast", ["shape"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["real"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["conv", "whole"], ["logits"]),
    ]
    weights = [onnx.numpy_helper.from_array(weight, "w")]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=9), tmp_path / "m.onnx")
    options = ExportOptions(fp16=True, spec=spec_file(tmp_path))
    report = export_bundle(tmp_path / "m.onnx", tmp_path / "model", options).report
    assert {"fp32", "fp16"} <= {m.precision for m in report.measured}


def test_doctor_runs_a_model_of_one_size_on_its_own_window(tmp_path: Path) -> None:
    path = save(tmp_path, [1, 1, 32, 32, 32])
    inference = {"window": [32, 32, 32]}
    spec = spec_file(tmp_path, inference=inference)
    bundle = export_bundle(path, tmp_path / "model", ExportOptions(spec=spec)).bundle
    found = {f.subject: f for f in examine(bundle.folder)}
    assert found["engine openvino"].well and found["engine onnxruntime"].well


def test_every_node_gets_a_name(tmp_path: Path) -> None:
    path = save(tmp_path, ["n", 1, "x", "y", "z"])
    graph, _ = read_foreign(path, read_spec(spec_file(tmp_path)))
    assert [n.name for n in graph.model.graph.node] == ["Concat_0"]


def test_a_name_that_two_nodes_have_is_kept_by_the_first(tmp_path: Path) -> None:
    path = save(tmp_path, ["n", 1, "x", "y", "z"])
    model = onnx.load(path)
    (first,) = model.graph.node
    first.name, first.output[0] = "twice", "joined"
    model.graph.node.append(helper.make_node("Identity", ["joined"], ["logits"], name="twice"))
    onnx.save(model, path)
    graph, _ = read_foreign(path, read_spec(spec_file(tmp_path)))
    assert [n.name for n in graph.model.graph.node] == ["twice", "Identity_1"]


def test_the_spec_of_the_documentation_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs/export.md").read_text()
    start = text.index("    {\n")
    block = text[start : text.index("\n\n", start)]
    (tmp_path / "model.json").write_text(block)
    spec = read_spec(tmp_path / "model.json")
    assert (spec.name, spec.inference.window) == ("prostate-t2", (96, 96, 96))
    assert spec.task.regions == {"prostate": (1,)}
    assert spec.task.display == ("t2",)
