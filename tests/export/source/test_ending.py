from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import NodeProto, TensorProto

from attnseg import Segmenter, SegmentOptions, Volume
from attnseg.export.export import ExportOptions, ExportProgress, export_bundle
from attnseg.export.graphs.graph import Graph
from attnseg.export.source.foreign import read_foreign, read_spec
from attnseg.runtime.errors import ExportError
from tests.export.conftest import spec_file
from tests.export.source.graphs import LOGIT_WEIGHTS, node, save_model

TO_LAST, TO_FIRST = [0, 2, 3, 4, 1], [0, 4, 1, 2, 3]


def read(path: Path) -> tuple[Graph, tuple[str, ...]]:
    return read_foreign(path, read_spec(spec_file(path.parent)))


def outputs(graph: Graph) -> np.ndarray:
    session = ort.InferenceSession(graph.content, providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).standard_normal((1, 1, 4, 5, 6)).astype(np.float32)
    (found,) = session.run(None, {"image": image})
    return found / image


ENDS = {
    "softmax": ([node("Softmax", "logits", "out", axis=1)], 17),
    "log softmax": ([node("LogSoftmax", "logits", "out", axis=1)], 17),
    "negative axis": ([node("Softmax", "logits", "out", axis=-4)], 17),
    "casts after it": (
        [
            node("Softmax", "logits", "p", axis=1),
            node("Cast", "p", "d", to=TensorProto.DOUBLE),
            node("Cast", "d", "f", to=TensorProto.FLOAT),
            node("Identity", "f", "out"),
        ],
        17,
    ),
    "channels last, as old exporters of PyTorch write": (
        [
            node("Transpose", "logits", "t", perm=TO_LAST),
            node("Softmax", "t", "p", axis=4),
            node("Transpose", "p", "out", perm=TO_FIRST),
        ],
        11,
    ),
    "default axis of the last dimension": (
        [
            node("Transpose", "logits", "t", perm=TO_LAST),
            node("Softmax", "t", "p"),
            node("Transpose", "p", "out", perm=TO_FIRST),
        ],
        13,
    ),
    "default axis 1 before opset 13": ([node("Softmax", "logits", "out")], 11),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_softmax_over_the_classes_at_the_end_is_left_out(tmp_path: Path, end: str) -> None:
    nodes, opset = ENDS[end]
    graph, notes = read(save_model(tmp_path / "m.onnx", *nodes, opset=opset))
    expected = np.broadcast_to(LOGIT_WEIGHTS.ravel()[None, :, None, None, None], (1, 3, 4, 5, 6))
    np.testing.assert_allclose(outputs(graph), expected, rtol=1e-5)
    (note,) = notes
    assert "Softmax (my_" in note and "outputs the logits" in note


def test_logits_are_left_as_they_are(tmp_path: Path) -> None:
    assert read(save_model(tmp_path / "m.onnx"))[1] == ()


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Softmax", "logits", "out", axis=2)],
        [
            node("Transpose", "logits", "t", perm=TO_LAST),
            node("Softmax", "t", "p", axis=1),
            node("Transpose", "p", "out", perm=TO_FIRST),
        ],
    ],
    ids=["plain", "transposed"],
)
def test_a_softmax_over_another_axis_is_refused(tmp_path: Path, nodes: list[NodeProto]) -> None:
    path = save_model(tmp_path / "m.onnx", *nodes)
    with pytest.raises(ExportError, match=r"m\.onnx: ends in Softmax .* over axis \d, the classes"):
        read(path)


@pytest.mark.parametrize("kind", ["Sigmoid", "HardSigmoid"])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_sigmoid_is_refused_as_overlapping_whatever_its_channels(
    tmp_path: Path, kind: str, channels: int
) -> None:
    path = save_model(
        tmp_path / "m.onnx",
        node(kind, "logits", "out"),
        out=("n", channels, "x", "y", "z"),
        w=LOGIT_WEIGHTS[:channels],
    )
    message = rf"ends in {kind} .* regions that may overlap; set activation to sigmoid in the spec"
    with pytest.raises(ExportError, match=message):
        read(path)


def read_regions(path: Path) -> tuple[Graph, tuple[str, ...]]:
    """Read a graph whose spec has one output for each of three regions."""
    outputs = [
        {"region": name, "label": 1, "channels": [index]} for index, name in enumerate("abc")
    ]
    regions = {name: [1] for name in "abc"}
    spec = spec_file(path.parent, activation="sigmoid", outputs=outputs, regions=regions)
    return read_foreign(path, read_spec(spec))


def test_a_sigmoid_of_regions_is_left_out(tmp_path: Path) -> None:
    graph, (note,) = read_regions(save_model(tmp_path / "m.onnx", node("Sigmoid", "logits", "out")))
    expected = np.broadcast_to(LOGIT_WEIGHTS.ravel()[None, :, None, None, None], (1, 3, 4, 5, 6))
    np.testing.assert_allclose(outputs(graph), expected, rtol=1e-5)
    assert "ends in Sigmoid (my_" in note and "outputs the logits" in note


@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax", "HardSigmoid"])
def test_regions_after_another_activation_are_refused(tmp_path: Path, kind: str) -> None:
    path = save_model(tmp_path / "m.onnx", node(kind, "logits", "out"))
    with pytest.raises(ExportError, match=rf"ends in {kind} .*, its spec names a sigmoid"):
        read_regions(path)


DECISIONS = {
    "with its axis": (
        [node("ArgMax", "logits", "out", axis=1, keepdims=1)],
        TensorProto.INT64,
        ("n", 1, "x", "y", "z"),
    ),
    "without its axis": (
        [node("ArgMax", "logits", "out", axis=1, keepdims=0)],
        TensorProto.INT64,
        ("n", "x", "y", "z"),
    ),
    "as fp32": (
        [
            node("ArgMax", "logits", "a", axis=1, keepdims=0),
            node("Cast", "a", "b", to=TensorProto.FLOAT),
            node("Unsqueeze", "b axes", "out"),
        ],
        TensorProto.FLOAT,
        ("n", 1, "x", "y", "z"),
    ),
    "of probabilities": (
        [
            node("Softmax", "logits", "p", axis=1),
            node("ArgMax", "p", "out", axis=1, keepdims=1),
        ],
        TensorProto.INT64,
        ("n", 1, "x", "y", "z"),
    ),
    "as a threshold": (
        [node("Greater", "logits half", "out")],
        TensorProto.BOOL,
        ("n", 3, "x", "y", "z"),
    ),
}


@pytest.mark.parametrize("end", DECISIONS)
def test_decisions_are_refused_and_the_logits_asked_for(tmp_path: Path, end: str) -> None:
    nodes, kind, out = DECISIONS[end]
    constants = {"axes": np.array([1]), "half": np.array(0.5, np.float32)}
    path = save_model(tmp_path / "m.onnx", *nodes, kind=kind, out=out, **constants)
    message = (
        r"m\.onnx: ends in (ArgMax|Greater) .*, so it outputs decisions; the output must be the "
        r"logits, \(batch, classes, x, y, z\), before softmax or argmax"
    )
    with pytest.raises(ExportError, match=message):
        read(path)


def test_whole_numbers_are_refused_however_they_are_made(tmp_path: Path) -> None:
    path = save_model(
        tmp_path / "m.onnx",
        node("Cast", "logits", "out", to=TensorProto.INT32),
        kind=TensorProto.INT32,
    )
    with pytest.raises(ExportError, match="out is int32; the output must be the logits"):
        read(path)


TRAINING = {
    "dropout": ([node("Dropout", "logits ratio training", "out")], 17),
    "old dropout": ([node("Dropout", "logits", "out", ratio=0.5)], 6),
    "batch norm": (
        [node("BatchNormalization", "logits one zero zero one", "out m v", training_mode=1)],
        17,
    ),
    "noise": ([node("RandomNormalLike", "logits", "r"), node("Add", "logits r", "out")], 17),
}


@pytest.mark.parametrize("case", TRAINING)
def test_a_network_in_training_mode_is_refused_by_its_node(tmp_path: Path, case: str) -> None:
    nodes, opset = TRAINING[case]
    constants = {
        "ratio": np.array(0.5, np.float32),
        "training": np.array(True),
        "one": np.ones(3, np.float32),
        "zero": np.zeros(3, np.float32),
    }
    path = save_model(tmp_path / "m.onnx", *nodes, opset=opset, **constants)
    message = r"m\.onnx: \w+ \(my_\w+\) is active, as in training; .* model\.eval\(\)"
    with pytest.raises(ExportError, match=message):
        read(path)


def test_dropout_in_evaluation_mode_is_no_obstacle(tmp_path: Path) -> None:
    constants = {"ratio": np.array(0.5, np.float32), "training": np.array(False)}
    nodes = [
        node("Softmax", "logits", "p", axis=1),
        node("Dropout", "p ratio training", "out"),
    ]
    graph, notes = read(save_model(tmp_path / "m.onnx", *nodes, **constants))
    assert len(notes) == 1 and outputs(graph).min() == -2


def test_a_bundle_of_probabilities_segments_and_says_what_was_left_out(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m.onnx", node("Softmax", "logits", "out", axis=1))
    steps: list[str] = []
    options = ExportOptions(spec=spec_file(tmp_path))
    exported = export_bundle(
        path, tmp_path / "model", options, progress=ExportProgress(steps.append)
    )
    (note,) = exported.report.notes
    assert note in steps
    assert note in exported.bundle.file("card").path.read_text()
    assert json.loads(exported.bundle.file("parity").path.read_text())["notes"] == [note]
    # The mean of probabilities is computed from logits, not from a softmax of a softmax.
    image = np.random.default_rng(0).normal(40, 20, (32, 32, 32)).astype(np.float32)
    z_scores = (image - image.mean()) / image.std()
    plan = SegmentOptions(precision="fp32", tta="paper", fuse="mean", min_voxels=0)
    labels = Segmenter(exported.bundle, plan).segment(Volume([image], np.eye(4))).labels
    np.testing.assert_array_equal(labels, np.where(z_scores > 0, 0, 1))
    onnx.checker.check_model(onnx.load(exported.bundle.file("onnx").path), full_check=True)
