from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from onnx import numpy_helper
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from attnseg import Bundle, Segmenter, SegmentOptions, Volume
from attnseg.export import export as export_module
from attnseg.export.engines.tensorrt import BuildOptions
from attnseg.export.export import Exported, ExportOptions, export_bundle
from attnseg.export.gate.samples import Sample, sample_windows, synthetic_sample
from attnseg.export.graphs.fp16 import convert_to_fp16
from attnseg.export.graphs.graph import Graph
from attnseg.export.source.checkpoint import encode_weights, load_trained
from attnseg.export.source.onnx import export_onnx, fold_batch_norms
from attnseg.runtime.engines.cpu import CPU_ENGINES, open_engine
from attnseg.runtime.errors import BundleError, EngineError, ExportError, Setting, TrainingError
from attnseg.runtime.model.bundle import file_entry
from attnseg.runtime.model.golden import read_golden
from attnseg.runtime.model.manifest import Manifest
from attnseg.runtime.steps.resample import Grid
from attnseg.synthetic import SyntheticCase, make_case
from attnseg.trainer.model import NetworkConfig
from attnseg.trainer.networks import Network
from attnseg.trainer.preparation import Preparation
from tests.conftest import WEIGHTS
from tests.export.conftest import lively_network, spec_file
from tests.export.source.graphs import node, save_model

SM86 = BuildOptions("tensorrt-rtx", "sm86")
GRAPH_ALONE = {"model.onnx": file_entry("onnx", b"graph", "fp32")}


def one_window(_: Manifest) -> list[Sample]:
    """A phantom whose brain fits into one window."""
    phantom = make_case(5, (64, 64, 64))
    return [Sample("small brain", Volume(phantom.images, phantom.affine), phantom.labels)]


VARIANTS = [
    *(
        NetworkConfig(3, 5, (4, 8), 8, attention, multi_scale)
        for attention, multi_scale in (("gap", True), ("se", True), ("cbam", True), ("none", False))
    ),
    NetworkConfig(3, 5, (4, 8), 8, "none", False, "unet3d"),
    NetworkConfig(3, 5, (2, 2, 4, 4, 4, 4, 6, 6), 8, "none", False, "deepmedic"),
]
RELATED = [
    NetworkConfig(3, 5, (4, 4, 8, 8), 8, "none", False, name)
    for name in ("residualunet", "deeplabv3", "unetplusplus")
]


def label(config: NetworkConfig) -> str:
    return f"{config.architecture} {config.attention} {config.multi_scale}"


@pytest.mark.parametrize("config", VARIANTS, ids=label)
def test_the_graph_gives_torchs_logits_for_any_batch_and_size(
    tmp_path: Path, config: NetworkConfig
) -> None:
    network = lively_network(config)
    file = tmp_path / "model.onnx"
    file.write_bytes(export_onnx(network).content)
    for shape in ((1, 3, 16, 16, 16), (3, 3, 8, 20, 12)):
        image = torch.randn(shape)
        with torch.inference_mode():
            expected = network(image).numpy()
        for name in CPU_ENGINES:
            result = open_engine(name, file, "fp32", 1).infer(image.numpy())
            np.testing.assert_allclose(result, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", VARIANTS + RELATED, ids=label)
def test_folding_batch_norms_changes_no_logit(config: NetworkConfig) -> None:
    network = lively_network(config)
    folded = fold_batch_norms(network)
    left = sum(isinstance(m, torch.nn.BatchNorm3d) for m in folded.modules())
    before_units = 8 if config.architecture == "residualunet" else 0  # all but the first of nine
    assert left == before_units
    assert any(isinstance(m, torch.nn.BatchNorm3d) for m in network.modules())
    image = torch.randn(1, 3, 32, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(folded(image), network(image), atol=1e-4, rtol=1e-4)


def test_the_graph_is_named_dynamic_and_silent_about_the_machine() -> None:
    model = export_onnx(lively_network(VARIANTS[0])).model
    onnx.checker.check_model(model, full_check=True)
    assert [o.version for o in model.opset_import if o.domain == ""] == [20]
    (image,), (logits,) = model.graph.input, model.graph.output
    assert (image.name, logits.name) == ("image", "logits")
    for value, channels in ((image, 3), (logits, 5)):
        dims = value.type.tensor_type.shape.dim
        assert [d.dim_param or d.dim_value for d in dims] == ["batch", channels, "x", "y", "z"]
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert b"/" + Path(__file__).parts[1].encode() + b"/" not in model.SerializeToString()


def test_the_same_weights_give_the_same_bytes() -> None:
    first, second = (export_onnx(lively_network(VARIANTS[0])).content for _ in range(2))
    assert first == second


@pytest.fixture(scope="module")
def export_result(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("export") / "model"
    return export_bundle(WEIGHTS, folder, ExportOptions(fp16=True, engines=(SM86,)), one_window)


@pytest.fixture(scope="module")
def exported(export_result: Exported) -> Bundle:
    return export_result.bundle


def test_the_shipped_weights_export_to_the_shipped_bundle(exported: Bundle) -> None:
    shipped = Bundle.default()
    stored, released = (load_file(b.file("weights").path) for b in (exported, shipped))
    assert {name: value.shape for name, value in stored.items()} == {
        name: value.shape for name, value in released.items()
    }
    for name, value in stored.items():
        assert torch.equal(value, released[name]), name
    # The shipped bundle may be of an older version with fewer files and fields.
    ours, theirs = (
        replace(bundle.manifest, files=GRAPH_ALONE, created_with="", network={}, budget=None)
        for bundle in (exported, shipped)
    )
    assert ours == theirs
    networks = [NetworkConfig.from_dict(b.manifest.network) for b in (exported, shipped)]
    assert networks[0] == networks[1]


def test_weights_that_are_read_and_written_again_are_the_same_bytes(exported: Bundle) -> None:
    file = exported.file("weights")
    assert encode_weights(load_trained(file)) == file.read_bytes()


@pytest.mark.parametrize(
    "grid", [Grid(shape=(32, 48, 32)), Grid(spacing_mm=(1.0, 1.0, 2.5))], ids=str
)
def test_weights_keep_the_task_and_the_grid(tmp_path: Path, grid: Grid) -> None:
    shipped = load_trained(WEIGHTS)
    task = replace(shipped.preparation.task, aliases={7: 4}, spacing_mm=(1.0, 1.0, 2.5))
    preprocessing = replace(shipped.preparation.preprocessing, grid=grid)
    model = replace(shipped, preparation=Preparation(task, preprocessing))
    file = tmp_path / "weights.safetensors"
    file.write_bytes(encode_weights(model))
    assert load_trained(file).preparation == model.preparation


def test_the_exported_bundle_segments_as_the_shipped_one(
    exported: Bundle, small_synthetic: SyntheticCase
) -> None:
    volume = Volume(small_synthetic.images, small_synthetic.affine)
    options = SegmentOptions(precision="fp32")
    ours, shipped = (Segmenter(b, options).segment(volume).labels for b in (exported, None))
    np.testing.assert_array_equal(ours, shipped)


def test_every_precision_is_measured_and_kept_within_the_budget(export_result: Exported) -> None:
    report = export_result.report
    found = {(m.precision, m.engine.split()[0]): m for m in report.measured}
    assert {("fp32", name) for name in CPU_ENGINES} | {("fp16", "simulated")} <= set(found)
    assert report.failures() == []
    for name in CPU_ENGINES:
        assert found["fp32", name].logits < 5e-4
    half = found["fp16", "simulated"]
    assert 1e-5 < half.logits < 1e-2  # really fp16, not fp32
    assert [d.region for d in half.drifts] == ["WT", "TC", "ET"]
    # GPU engines are measured if there is a GPU, and marked as not run otherwise.
    others = {(n.precision, n.engine.split()[0]): n for n in report.not_run}
    assert {("fp16", "onnxruntime-cuda"), ("fp16", "tensorrt-rtx")} <= {*found, *others}
    assert all(n.reason for n in others.values())
    assert export_result.in_fp32 == ()


def test_the_bundle_says_what_every_file_is(exported: Bundle) -> None:
    files = exported.manifest.files
    kinds = {(entry.role, entry.precision) for entry in files.values()}
    assert kinds == {
        ("onnx", "fp32"),
        ("onnx", "fp16"),
        ("engine", "fp16"),
        ("weights", None),
        ("golden", None),
        ("parity", None),
        ("card", None),
        ("sbom", None),
        ("log", None),
    }
    (engine,) = [entry.engine for entry in files.values() if entry.engine]
    assert (engine.builder, engine.target, engine.window) == ("tensorrt-rtx", "sm86", (64, 64, 64))
    assert json.loads(exported.file("parity").path.read_text())["budget"]["dice"] == 0.002
    card = exported.file("card").path.read_text()
    assert "| fp16 simulated by onnxruntime" in card
    assert "model-fp16-sm86.tensorrt-rtx" in card or "fp16 tensorrt-rtx" in card


def test_the_graphs_say_what_they_take_and_give(exported: Bundle) -> None:
    for precision in ("fp32", "fp16"):
        model = onnx.load(exported.file("onnx", precision).path)
        words = {entry.key: entry.value for entry in model.metadata_props}
        assert words["name"] == exported.manifest.name
        assert words["channels"] == "t1, t1ce, t2, flair"
        assert words["labels"].startswith("0 background, 1 necrotic core")
        assert (words["window"], words["spacing_mm"]) == ("64 x 64 x 64", "1 x 1 x 1")


def test_the_bill_of_materials_is_valid_and_names_files_and_packages(exported: Bundle) -> None:
    text = exported.file("sbom").path.read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    parts = {part["name"]: part for part in json.loads(text)["components"]}
    for name, entry in exported.manifest.files.items():
        if entry.role in ("onnx", "engine", "weights", "golden"):
            assert parts[name]["hashes"] == [{"alg": "SHA-256", "content": entry.sha256}]
    assert parts["torch"]["version"] == torch.__version__
    assert {"onnx", "onnxconverter-common", "tensorrt-rtx-cu13-libs"} <= set(parts)
    assert "timestamp" not in text


def test_graphs_and_engines_are_the_same_bytes_each_time(exported: Bundle, tmp_path: Path) -> None:
    options = ExportOptions(fp16=True, engines=(SM86,))
    again = export_bundle(WEIGHTS, tmp_path / "again", options, one_window).bundle
    for name, entry in exported.manifest.files.items():
        if entry.role in ("onnx", "engine", "weights", "golden", "sbom", "log"):
            assert again.manifest.files[name] == entry, name


def test_the_golden_window_holds_torchs_logits(exported: Bundle) -> None:
    golden = read_golden(exported)
    network = load_trained(exported.file("weights")).network
    with torch.inference_mode():
        expected = network(torch.from_numpy(golden.image)).numpy()
    np.testing.assert_array_equal(golden.logits, expected)
    assert len(np.unique(golden.logits.argmax(axis=1))) > 2  # not only background


def test_no_case_of_the_gate_travels_in_the_bundle(exported: Bundle) -> None:
    shown = read_golden(exported).image
    for sample in one_window(exported.manifest):
        windows = sample_windows(exported.manifest, sample)
        assert not any(np.allclose(shown[0], window, atol=1e-2) for window in windows)
    phantom = sample_windows(exported.manifest, synthetic_sample(exported.manifest))
    assert any(np.allclose(shown[0], window, atol=1e-2) for window in phantom)


def scaled_layer(graph: Graph, factor: float) -> Graph:
    """The graph with the weights of its tenth convolution scaled."""
    model = graph.copy()
    node = [n for n in model.graph.node if n.op_type == "Conv"][9]
    (weight,) = [i for i in model.graph.initializer if i.name == node.input[1]]
    values = numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array((values * factor).astype(values.dtype), weight.name))
    return Graph(model)


def test_an_fp16_graph_with_a_layer_that_is_wrong_is_left_out_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(graph: Graph, *rest: Any) -> Graph:
        return scaled_layer(convert_to_fp16(graph, *rest), 1e4)

    monkeypatch.setattr(export_module, "convert_to_fp16", wrong)
    options = ExportOptions(fp16=True, engines=(SM86,))
    exported = export_bundle(WEIGHTS, tmp_path / "model", options, one_window)
    (error,) = exported.left_out
    message = (
        r"model-fp16\.onnx is left out of the bundle: fp16 \(simulated .* is over the budget: .* "
        r"the first wrong layer is \S+ \(Conv\)"
    )
    assert re.search(message, error.cause)
    assert error.settings[-1] == Setting("fp16")
    files = exported.bundle.manifest.files
    assert {e.precision for e in files.values() if e.role in ("onnx", "engine")} == {"fp32"}
    assert exported.bundle.has("weights") and exported.in_fp32 == ()
    record = json.loads(exported.bundle.file("parity").path.read_text())
    assert record["left_out"] == [error.cause]
    assert {m["file"] for m in record["measured"] if not m["within_budget"]} == {"model-fp16.onnx"}


def test_a_convolution_left_in_fp32_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(graph: Graph, in_fp32: list[str], io: str) -> Graph:
        return convert_to_fp16(graph, ["node_conv3d_3"], io)

    monkeypatch.setattr(export_module, "convert_to_fp16", forgetful)
    with pytest.raises(ExportError, match=r"1 convolutions in fp32 \(node_conv3d_3\)"):
        export_bundle(WEIGHTS, tmp_path / "model", ExportOptions(fp16=True), one_window)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_differs_from_torch_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(network: Network) -> Graph:
        other = copy.deepcopy(network)
        other.head.weight.data *= 1.01
        return export_onnx(other)

    monkeypatch.setattr("attnseg.export.source.model.export_onnx", wrong)
    message = r"fp32 \(openvino .* logits differ by .* no bundle was written"
    with pytest.raises(ExportError, match=message):
        export_bundle(WEIGHTS, tmp_path / "model", samples=one_window)
    assert list(tmp_path.iterdir()) == []


def test_parity_needs_an_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        "attnseg.export.gate.measure.installed_engines", lambda: dict.fromkeys(CPU_ENGINES)
    )
    with pytest.raises(EngineError, match="no inference engine is installed; pip install"):
        export_bundle(WEIGHTS, tmp_path / "model", samples=one_window)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(BundleError, match="exists and is no bundle"):
        export_bundle(WEIGHTS, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["mine"]


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="does not exist"):
        load_trained(tmp_path / "gone.pt")
    with pytest.raises(
        TrainingError, match=r"is a folder; give the best\.pt or weights\.safetensors in it"
    ):
        load_trained(tmp_path)
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(b"junk")
        with pytest.raises(TrainingError, match=f"{name}: is damaged or not a"):
            load_trained(tmp_path / name)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(TrainingError, match=r"other\.safetensors: holds no weights of attnseg"):
        load_trained(tmp_path / "other.safetensors")


def test_a_truncated_weights_file_is_refused(tmp_path: Path) -> None:
    copy = Path(shutil.copy(WEIGHTS, tmp_path / "w.safetensors"))
    copy.write_bytes(copy.read_bytes()[:-100])
    with pytest.raises(TrainingError, match=r"w\.safetensors: is damaged"):
        load_trained(copy)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    with safe_open(WEIGHTS, "pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(WEIGHTS)
    tensors["head.weight"].view(-1)[3] = float("nan")
    save_file(tensors, tmp_path / "w.safetensors", metadata)
    message = (
        r"w\.safetensors: 1 of the 48 values of head\.weight are NaN or infinite; give an earl"
    )
    with pytest.raises(TrainingError, match=message):
        export_bundle(tmp_path / "w.safetensors", tmp_path / "model")


def test_an_fp16_graph_that_overflows_is_left_out_and_the_report_is_strict_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [node("Mul", "logits up", "a"), node("Mul", "a down", "out")]
    numbers = {"up": np.array(6e4, np.float32), "down": np.array(1e-4, np.float32)}
    model = save_model(tmp_path / "m.onnx", *nodes, **numbers)
    monkeypatch.setattr(export_module, "nodes_at_risk", lambda *_: [])
    options = ExportOptions(spec=spec_file(tmp_path), fp16=True)
    exported = export_bundle(model, tmp_path / "model", options)
    (error,) = exported.left_out
    assert (error.mend, error.settings) == ("leave {} out", (Setting("fp16"),))  # no budget helps

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = exported.bundle.file("parity").path.read_text()
    measured = json.loads(text, parse_constant=refuse)["measured"]
    assert [m["logits"] for m in measured if m["precision"] == "fp16"] == [None]
