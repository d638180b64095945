from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from attnseg.export.source.foreign import read_foreign, read_spec
from attnseg.export.source.onnx_file import LARGEST_BYTES, load_onnx
from attnseg.runtime.errors import ExportError
from tests.export.conftest import spec_file
from tests.export.source.graphs import LOGIT_WEIGHTS, node, save_model


def stored_apart(folder: Path) -> Path:
    """A file `m.onnx` with its weights in `m.data`."""
    model = onnx.load(save_model(folder / "m.onnx"))
    onnx.save(
        model, folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0
    )
    return folder / "m.onnx"


def test_weights_in_another_file_are_read(tmp_path: Path) -> None:
    (weights,) = load_onnx(stored_apart(tmp_path)).graph.initializer
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(weights), LOGIT_WEIGHTS)


def test_a_file_of_weights_that_is_missing_is_named(tmp_path: Path) -> None:
    path = stored_apart(tmp_path)
    (tmp_path / "m.data").unlink()
    with pytest.raises(ExportError, match=r"m\.onnx: stores its weights in m\.data, which is not"):
        load_onnx(path)


def test_a_file_of_weights_whose_name_is_too_long_is_missing(tmp_path: Path) -> None:
    path = stored_apart(tmp_path)
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "m" * 300
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"m\.onnx: stores its weights in mmm"):
        load_onnx(path)


def test_a_file_of_weights_that_was_cut_is_named(tmp_path: Path) -> None:
    path = stored_apart(tmp_path)
    (tmp_path / "m.data").write_bytes(bytes(8))
    with pytest.raises(ExportError, match=r"m\.data: has 8 bytes, m\.onnx expects 12"):
        load_onnx(path)


def test_more_than_two_gigabytes_are_refused_as_such(tmp_path: Path) -> None:
    path = stored_apart(tmp_path)
    model = onnx.load(path, load_external_data=False)
    (weights,) = model.graph.initializer
    del weights.dims[:]
    weights.dims.extend([3, 1, 1, 1, 2**29])
    for entry in weights.external_data:
        if entry.key == "length":
            entry.value = str(3 * 2**31)
    path.write_bytes(model.SerializeToString())
    with (tmp_path / "m.data").open("wb") as stream:
        stream.truncate(3 * 2**31)  # sparse: takes no space
    with pytest.raises(ExportError, match=r"m\.onnx: holds 6\.4 GB with its weights, more than"):
        load_onnx(path)
    with path.open("wb") as stream:
        stream.truncate(LARGEST_BYTES + 1)
    with pytest.raises(ExportError, match=r"m\.onnx: holds 2\.1 GB with its weights"):
        load_onnx(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").touch()
    with pytest.raises(ExportError, match=r"m\.onnx: is empty; copy or export it again"):
        load_onnx(tmp_path / "m.onnx")


def test_a_file_of_a_later_version_is_no_damaged_one(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m.onnx")
    for field, message in (
        ("ir", "has ONNX IR version 99, the installed onnx .* knows"),
        ("opset", "has ONNX opset 99, .*; export it with opset"),
    ):
        model = onnx.load(save_model(path))
        if field == "ir":
            model.ir_version = 99
        else:
            model.opset_import[0].version = 99
        path.write_bytes(model.SerializeToString())
        with pytest.raises(ExportError, match=message):
            load_onnx(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    wrong = LOGIT_WEIGHTS.copy()
    wrong[1] = value
    message = r"m\.onnx: 1 of the 3 values of w are NaN or infinite; export an earlier state"
    with pytest.raises(ExportError, match=message):
        load_onnx(save_model(tmp_path / "m.onnx", w=wrong))


def test_an_infinite_bound_is_no_weight(tmp_path: Path) -> None:
    nodes = [node("Clip", "logits low high", "out")]
    bounds = {"low": np.array(-np.inf, np.float32), "high": np.array(np.inf, np.float32)}
    load_onnx(save_model(tmp_path / "m.onnx", *nodes, **bounds))


def test_an_output_without_a_shape_gets_the_inferred_one(tmp_path: Path) -> None:
    model = onnx.load(save_model(tmp_path / "m.onnx"))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    graph, _ = read_foreign(tmp_path / "m.onnx", read_spec(spec_file(tmp_path)))
    dims = graph.model.graph.output[0].type.tensor_type.shape.dim
    assert (len(dims), dims[1].dim_value) == (5, 3)
