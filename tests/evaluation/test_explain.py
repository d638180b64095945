from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from attnseg.evaluation.attention import AttentionGraph, find_sigmoids, with_outputs
from attnseg.evaluation.explain import (
    StageWeights,
    attention_weights,
    draw_weights,
    encode_weights_table,
    explain_cases,
)
from attnseg.export.source.onnx import export_onnx
from attnseg.runtime.case.scans import Case
from attnseg.runtime.case.volume import Volume
from attnseg.runtime.errors import BundleError, ConfigError, EngineError
from attnseg.runtime.model.bundle import Bundle, file_entry
from attnseg.runtime.model.manifest import Inference
from attnseg.trainer.model import AttentionResNetUNet, NetworkConfig
from attnseg.trainer.networks import build_network
from tests.bundles import small_model, write_bundle
from tests.conftest import PLAIN


@pytest.fixture
def volume() -> Volume:
    """A box of 16x8x8 voxels, so two windows of 8 voxels, of the four channels."""
    rng = np.random.default_rng(0)
    return Volume(rng.integers(1, 100, (4, 16, 8, 8)).astype(np.int16), np.diag([-1, -1, 1, 1]))


def constant_network(value: float) -> torch.nn.Module:
    """A network whose first stage gives `value` everywhere and whose second gives 0."""
    network = build_network(NetworkConfig(widths=(2, 4), bottleneck=4)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.encoder[0][0].project.bias.fill_(value)
    return network


def bundle_of(network: Any, folder: Path, graph: bytes | None = None) -> Bundle:
    """A bundle with the network's graph alone, and windows of 8 voxels."""
    content = export_onnx(network).content if graph is None else graph
    manifest = replace(
        Bundle.default().manifest,
        preprocessing=PLAIN,
        foreground_ml=None,
        inference=Inference((8, 8, 8), 0.0, network.config.stride, 0),
        network=network.config.to_dict(),
        files={"model.onnx": file_entry("onnx", content, "fp32")},
    )
    return write_bundle(folder / "bundle", manifest, {"model.onnx": content})


def weights_of(bundle: Bundle, volume: Volume) -> list[StageWeights]:
    return attention_weights(AttentionGraph(bundle), bundle.manifest, volume)


def hooked_weights(network: AttentionResNetUNet, window: NDArray[np.float32]) -> list[Any]:
    """Weights that PyTorch computes in each attention module, first stage first."""
    rows: list[Any] = []

    def record(module: Any, inputs: Any, _: Any) -> None:
        rows.append(module.weights(inputs[0])[0, :, 0, 0, 0].numpy())

    for stage in network.decoder:
        stage.attention.register_forward_hook(record)
    with torch.inference_mode():
        network(torch.from_numpy(window[None]))
    return rows[::-1]


def test_weights_are_the_sigmoid_of_the_mean_by_hand(volume: Volume, tmp_path: Path) -> None:
    stages = weights_of(bundle_of(constant_network(2.0), tmp_path), volume)
    assert [stage.stage for stage in stages] == [1, 2]
    assert [stage.weights.shape for stage in stages] == [(2, 2), (2, 4)]  # windows, channels
    np.testing.assert_allclose(stages[0].weights, 0.880797, atol=1e-6)  # sigmoid(2)
    np.testing.assert_allclose(stages[1].weights, 0.5)


@pytest.mark.parametrize("attention", ["gap", "se", "cbam"])
@pytest.mark.parametrize("widths", [(16, 16, 16), (12, 24)])
def test_the_graph_gives_the_weights_that_pytorch_computes(
    attention: Any, widths: tuple[int, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = NetworkConfig(widths=widths, bottleneck=4, attention=attention)
    network = build_network(config).eval()
    window = np.random.default_rng(1).standard_normal((4, 8, 16, 24)).astype(np.float32)
    found = AttentionGraph(bundle_of(network, tmp_path)).weights(window)
    expected = hooked_weights(network, window)
    assert [len(row) for row in found] == list(widths)
    assert np.ptp(np.concatenate(expected)) > 0.01  # channels differ
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_shipped_model_has_four_stages_in_order() -> None:
    sigmoids = find_sigmoids(Bundle.default().file("onnx").read_bytes())
    assert sorted(sigmoids.values()) == [1, 2, 3, 4]
    window = np.random.default_rng(0).standard_normal((4, 16, 16, 16)).astype(np.float32)
    widths = [len(row) for row in AttentionGraph(Bundle.default()).weights(window)]
    assert widths == [12, 24, 48, 96]


def test_outputs_are_declared_without_the_onnx_library_as_it_would() -> None:
    content = Bundle.default().file("onnx").read_bytes()
    names = ["relu", "x" * 200]  # the second needs a length of two bytes
    expected = onnx.load_from_string(content)
    for name in names:
        expected.graph.output.add().name = name
    assert onnx.load_from_string(with_outputs(content, names)) == expected


@pytest.mark.parametrize("widths", [None, 3, [2]])
def test_a_manifest_without_the_widths_of_its_network_is_refused(
    tmp_path: Path, widths: object
) -> None:
    network = constant_network(0)
    values = {**network.config.to_dict(), "widths": widths}
    bundle = bundle_of(network, tmp_path)
    changed = replace(bundle, manifest=replace(bundle.manifest, network=values))
    with pytest.raises(BundleError, match=r"model\.onnx: does not have one tensor of attention"):
        AttentionGraph(changed)


def test_a_node_without_operator_and_output_is_no_sigmoid() -> None:
    model = small_model()
    model.graph.node.add()
    model.graph.node.add(op_type="Sigmoid", input=["logits"])
    model.graph.node.add(op_type="Sigmoid", input=["logits"], output=["a"])
    assert find_sigmoids(model.SerializeToString()) == {"a": 1}


def test_a_graph_that_onnxruntime_cannot_run_is_one_error(tmp_path: Path) -> None:
    """The window has 3 channels, the weights are for 4."""
    network = constant_network(0)
    model = onnx.load_from_string(export_onnx(network).content)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "any"
    graph = AttentionGraph(bundle_of(network, tmp_path, model.SerializeToString()))
    with pytest.raises(EngineError, match=r"model\.onnx: ONNX Runtime failed \(") as caught:
        graph.weights(np.zeros((3, 8, 8, 8), np.float32))
    assert "\n" not in str(caught.value)


def test_a_graph_without_the_weights_of_its_manifest_is_refused(
    volume: Volume, tmp_path: Path
) -> None:
    plain = NetworkConfig(widths=(2, 4), bottleneck=4, attention="none")
    graph = export_onnx(build_network(plain).eval()).content
    with pytest.raises(BundleError, match=r"model.onnx: does not have one tensor of attention"):
        weights_of(bundle_of(constant_network(0), tmp_path, graph), volume)


def test_a_model_without_attention_is_refused(tmp_path: Path) -> None:
    network = build_network(NetworkConfig(widths=(2, 4), bottleneck=4, attention="none")).eval()
    with pytest.raises(ConfigError, match=r"the model has no attention \(attnresunet, none\)"):
        AttentionGraph(bundle_of(network, tmp_path))


def test_a_case_that_fails_does_not_stop_the_others(small_scan: Path, tmp_path: Path) -> None:
    names = ("t1", "t1ce", "t2", "flair")
    good = tuple(small_scan / "small" / f"small_{name}.nii.gz" for name in names)
    cases = [Case("bad", tmp_path, (tmp_path / "none.nii",) * 4), Case("good", tmp_path, good)]
    ended = []
    failed = explain_cases(
        cases, Bundle.default(), tmp_path, lambda name, error: ended.append((name, bool(error)))
    )
    assert list(failed) == ["bad"]
    assert ended == [("bad", True), ("good", False)]
    assert {f.name for f in tmp_path.glob("*_attention.*")} == {
        "good_attention.png",
        "good_attention.csv",
    }


def test_the_table_and_the_picture_hold_every_stage() -> None:
    stages = [
        StageWeights(1, np.full((2, 2), 0.8808, np.float32)),
        StageWeights(2, np.full((2, 4), 0.5, np.float32)),
    ]
    table = list(csv.DictReader(io.StringIO(encode_weights_table(stages).decode())))
    assert [(row["stage"], row["channel"]) for row in table] == [
        *(("1", str(c)) for c in range(2)),
        *(("2", str(c)) for c in range(4)),
    ]
    assert table[0]["mean"] == "0.88080"
    assert table[0]["windows"] == "2"
    assert Image.open(io.BytesIO(draw_weights(stages, "case"))).format == "PNG"
