from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from attnseg import Bundle, Segmenter, SegmentOptions
from attnseg.export.engines.tensorrt import BuildOptions
from attnseg.export.export import ExportOptions, export_bundle
from attnseg.export.graphs.graph import Graph
from attnseg.export.graphs.int8 import kept_in_float, quantise
from attnseg.export.source.onnx import export_onnx
from attnseg.runtime.errors import ExportError, ScanError
from attnseg.runtime.model.manifest import Budget
from attnseg.trainer.model import NetworkConfig
from tests.export.conftest import lively_network, spec_file


def windows(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((3, 16, 16, 16)).astype(np.float32) for _ in range(count)]


@pytest.fixture(scope="module")
def exact() -> Graph:
    return export_onnx(lively_network(NetworkConfig(3, 5, (8, 16), 16)))


def run(graph: Graph, window: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(graph.content, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": window[None]})[0]


def test_all_convolutions_but_the_first_and_last_have_int8_weights(exact: Graph) -> None:
    made = quantise(exact, windows(2)).model.graph
    weights = {i.name: i for i in made.initializer}
    producers = {o: node for node in made.node for o in node.output}
    floats = []
    for node in made.node:
        if node.op_type == "Conv":
            source = producers.get(node.input[1])
            if source is None:
                floats.append(node.name)
            else:
                assert source.op_type == "DequantizeLinear"
                assert weights[source.input[0]].data_type == TensorProto.INT8
                # Symmetric: TensorRT takes no other zero point than 0.
                assert not numpy_helper.to_array(weights[source.input[2]]).any()
    assert floats == kept_in_float(exact) and len(floats) == 2


def test_the_quantised_graph_computes_nearly_the_same(exact: Graph) -> None:
    seen = windows(4)
    content = quantise(exact, seen)
    expected, found = run(exact, seen[0]), run(content, seen[0])
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    assert 1e-4 < difference < 0.2  # really int8, not fp32


def test_the_same_windows_give_the_same_bytes(exact: Graph) -> None:
    assert quantise(exact, windows(2)).content == quantise(exact, windows(2)).content


def test_a_graph_without_convolutions_is_refused() -> None:
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 4, 4, 4])
        for name in ("image", "logits")
    ]
    node = helper.make_node("Relu", ["image"], ["logits"], name="r")
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(
        helper.make_graph([node], "g", ends[:1], ends[1:]), opset_imports=opsets, ir_version=9
    )
    with pytest.raises(ExportError, match="holds no convolution to quantise"):
        quantise(Graph(model), windows(1))


def test_what_cannot_be_quantised_is_said_in_words(exact: Graph) -> None:
    with pytest.raises(ExportError, match="contain only zeros; give other scans"):
        quantise(exact, [])
    old = exact.copy()
    old.opset_import[0].version = 11
    with pytest.raises(ExportError, match="needs ONNX opset 13 or later, the graph has 11"):
        quantise(Graph(old), windows(1))
    with pytest.raises(ExportError, match=r"cannot be quantised \(.*\); leave int8 out") as e:
        quantise(exact, [np.zeros((2, 16, 16, 16), np.float32)])  # two channels, not three
    assert "\n" not in str(e.value)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("a", "b", "c"):
        image = np.random.default_rng(ord(name)).normal(40, 20, (40, 40, 40)).astype(np.float32)
        nib.save(nib.Nifti1Image(image, np.eye(4)), folder / f"{name}_ct.nii.gz")
    return folder


def test_int8_is_exported_measured_and_run(graph: Path, tmp_path: Path, scans: Path) -> None:
    options = ExportOptions(
        engines=(BuildOptions("tensorrt-rtx", "sm86"),),
        budget=Budget(dice=1, volume_percent=100),
        spec=spec_file(tmp_path),
        calibration=scans,
    )
    exported = export_bundle(graph, tmp_path / "model", options)
    files = exported.bundle.manifest.files
    assert {e.precision for e in files.values() if e.role == "onnx"} == {"fp32", "int8"}
    (engine,) = [e for e in files.values() if e.role == "engine"]
    assert engine.precision == "int8"
    measured = {m.precision: m for m in exported.report.measured}
    assert measured["int8"].gated and measured["int8"].logits > 10 * measured["fp32"].logits
    info = Segmenter(Bundle.load(tmp_path / "model"), SegmentOptions(precision="int8")).engine
    assert (info.name, info.precision) == ("onnxruntime", "int8")


def test_int8_over_the_budget_is_left_out_and_the_rest_is_written(
    graph: Path, tmp_path: Path, scans: Path
) -> None:
    budget = Budget(dice=1e-9, volume_percent=1e-9)
    engines = (BuildOptions("tensorrt-rtx", "sm86"),)
    spec = spec_file(tmp_path)
    options = ExportOptions(spec=spec, calibration=scans, budget=budget, engines=engines)
    exported = export_bundle(graph, tmp_path / "model", options)
    (error,) = exported.left_out
    assert "model-int8.onnx is left out of the bundle: int8 (onnxruntime" in error.cause
    names = [setting.name for setting in error.settings]
    assert "budget_dice" in names and names[-1] == "int8"
    # Neither the int8 graph nor an engine from another graph than the one that was asked for.
    files = exported.bundle.manifest.files
    assert {e.precision for e in files.values() if e.role in ("onnx", "engine")} == {"fp32"}
    assert not [e for e in files.values() if e.role == "engine"]
    assert error.cause in exported.bundle.file("card").path.read_text()
    kept = {s.name: s.value for s in error.settings}
    enough = Budget(kept["budget_dice"], kept.get("budget_volume", 100))
    again = export_bundle(graph, tmp_path / "kept", replace(options, budget=enough, engines=()))
    assert again.left_out == () and again.bundle.has("onnx", "int8")


def test_calibration_needs_scans_of_the_models_channels(
    graph: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "empty").mkdir()
    options = ExportOptions(spec=spec_file(tmp_path), calibration=tmp_path / "empty")
    with pytest.raises(ScanError, match="empty"):
        export_bundle(graph, tmp_path / "model", options)
