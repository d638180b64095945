"""Bundles that tests make of a manifest and the content of its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from attnseg import Bundle
from attnseg.runtime.model.bundle import draft_bundle
from attnseg.runtime.model.manifest import Manifest


def write_bundle(
    folder: Path,
    manifest: Manifest,
    files: Mapping[str, bytes],
    sign: Callable[[bytes], bytes] | None = None,
) -> Bundle:
    """Write a bundle atomically, and load it.

    Args:
        folder: Folder of the bundle; must be absent or empty.
        manifest: Manifest with exactly one entry for each of `files`.
        files: Content by file name.
        sign: Function that returns the signature of the manifest's bytes; None for no signature.

    Raises:
        BundleError: The folder is not empty, or cannot be written.
    """
    with draft_bundle(folder, manifest) as draft:
        for name, content in files.items():
            draft.add(name, content, manifest.files[name])
        draft.commit(sign)
    return Bundle.load(folder)


def small_model(channels: int = 4, classes: int = 4) -> onnx.ModelProto:
    """A graph that gives 3 times the sum of the channels as the logit of each class."""
    weights = numpy_helper.from_array(np.full((classes, channels, 1, 1, 1), 3, np.float32), "W")
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", count, "x", "y", "z"])
        for name, count in (("image", channels), ("logits", classes))
    ]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "W"], ["logits"])],
        "small",
        ends[:1],
        ends[1:],
        [weights],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def small_graph(channels: int = 4, classes: int = 4) -> bytes:
    """Content of the ONNX file of `small_model`."""
    return bytes(small_model(channels, classes).SerializeToString(deterministic=True))
