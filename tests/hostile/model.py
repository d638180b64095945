"""A tiny model of the four BraTS channels, and a scan for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from attnseg import Bundle, Segmenter, SegmentOptions, Volume
from attnseg.runtime.model.bundle import file_entry
from attnseg.runtime.model.golden import Golden, encode_golden
from attnseg.runtime.model.manifest import Inference
from tests.bundles import write_bundle

SHAPE = (9, 10, 11)
OPTIONS = SegmentOptions(engine="onnxruntime", device="cpu", threads=1)


def graph() -> bytes:
    """ONNX file of one convolution of 1x1x1 from four channels to four classes."""
    weights = np.eye(4, dtype=np.float32).reshape(4, 4, 1, 1, 1)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 4, "x", "y", "z"])
        for name in ("image", "logits")
    ]
    node = helper.make_node("Conv", ["image", "weight"], ["logits"])
    constant = numpy_helper.from_array(weights, "weight")
    made = helper.make_graph([node], "tiny", ends[:1], ends[1:], [constant])
    opset = helper.make_opsetid("", 20)
    return helper.make_model(made, opset_imports=[opset], ir_version=9).SerializeToString()


def tiny_bundle(folder: Path) -> Bundle:
    """A bundle with a graph, a golden window and a parity report."""
    rng = np.random.default_rng(0)
    window = rng.standard_normal((1, 4, 8, 8, 8)).astype(np.float16).astype(np.float32)
    measured = {"engine": "onnxruntime 1.20", "precision": "fp32", "within_budget": True}
    drift = {"case": "a", "region": "WT", "dice": 0.0, "volume_percent": 0.0}
    parity = {
        "budget": {"dice": 0.002, "volume_percent": 0.5},
        "measured": [{**measured, "drifts": [drift]}],
    }
    files = {
        "model.onnx": graph(),
        "golden.npz": encode_golden(Golden(window, window)),
        "parity.json": json.dumps(parity).encode(),
        "README.md": b"# A tiny model\n",
    }
    roles = dict(zip(files, ("onnx", "golden", "parity", "card"), strict=True))
    entries = {
        name: file_entry(roles[name], content, "fp32" if name == "model.onnx" else None)  # type: ignore[arg-type]
        for name, content in files.items()
    }
    manifest = replace(
        Bundle.default().manifest,
        name="tiny",
        training=None,
        foreground_ml=None,
        inference=Inference((8, 8, 8), 0.25, 1, 2),
        files=entries,
    )
    return write_bundle(folder, manifest, files)


def scan() -> Volume:
    """A scan of `SHAPE` with a background of 0."""
    channels = np.random.default_rng(1).integers(1, 1000, (4, *SHAPE)).astype(np.int16)
    channels[:, 0], channels[:, :, 0] = 0, 0
    return Volume(channels, np.diag([-1.0, -1.0, 1.0, 1.0]))


def open_tiny(bundle: Bundle) -> Segmenter:
    """Segmenter of a bundle, on one thread of ONNX Runtime."""
    return Segmenter(bundle, OPTIONS)
