from __future__ import annotations

import io
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnseg import Bundle
from attnseg.runtime.errors import BundleError
from attnseg.runtime.model.bundle import file_entry
from attnseg.runtime.model.golden import Golden, encode_golden, read_golden
from attnseg.runtime.steps.decide import Decision
from attnseg.runtime.task import Output
from tests.bundles import small_graph, write_bundle


def golden() -> Golden:
    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, 4, 16, 16, 16)).astype(np.float16).astype(np.float32)
    return Golden(image, rng.standard_normal((1, 4, 16, 16, 16)).astype(np.float32))


def bundle_with(folder: Path, content: bytes | None) -> Bundle:
    files = {"model.onnx": small_graph()}
    entries = {"model.onnx": file_entry("onnx", small_graph(), "fp32")}
    if content is not None:
        files["golden.npz"] = content
        entries["golden.npz"] = file_entry("golden", content)
    manifest = replace(Bundle.default().manifest, files=entries)
    return write_bundle(folder / "bundle", manifest, files)


def test_a_golden_window_is_read_back_as_it_was(tmp_path: Path) -> None:
    stored = read_golden(bundle_with(tmp_path, encode_golden(golden())))
    np.testing.assert_array_equal(stored.image, golden().image)
    np.testing.assert_array_equal(stored.logits, golden().logits)
    assert encode_golden(golden()) == encode_golden(golden())


def test_differences_by_hand() -> None:
    logits = np.zeros((1, 2, 2, 2, 2), np.float32)
    logits[0, 0] = 4
    window = Golden(np.zeros((1, 1, 2, 2, 2), np.float32), logits)
    other = logits.copy()
    other[0, :, 0, 0, 0] = (1, 2)  # off by 3 of 4, and another class in 1 voxel of 8
    assert window.difference(other) == 0.75
    labels = Decision("softmax", (), (0, 1), 2)
    assert window.disagreement(other, labels) == 1 / 8
    assert (window.difference(logits), window.disagreement(logits, labels)) == (0, 0)
    # As regions, the first is above 0.5 in both, and the second in the one voxel alone.
    first, second = Output("first", 1, (0,)), Output("second", 2, (1,))
    regions = Decision("sigmoid", (first, second), (0, 1, 2), 2)
    assert window.disagreement(other, regions) == 1 / 8
    one = Decision("sigmoid", (first,), (0, 1), 2)
    assert window.disagreement(other, one) == 0


def test_a_bundle_without_golden_window_says_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no file of role golden; export the model"):
        read_golden(bundle_with(tmp_path, None))


def _npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"junk",
        encode_golden(golden())[:500],
        _npz(image=np.zeros(3)),
        _npz(image=np.array([{}], object), logits=np.zeros(3)),
    ],
    ids=["junk", "truncated", "half", "pickle"],
)
def test_a_file_that_is_no_golden_window_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(BundleError, match=r"golden\.npz: holds no golden window"):
        read_golden(bundle_with(tmp_path, content))


def test_a_window_of_another_model_is_refused(tmp_path: Path) -> None:
    small = np.ones((1, 2, 16, 16, 16), np.float32)
    with pytest.raises(BundleError, match="not those of a window of 4 channels and 4 classes"):
        read_golden(bundle_with(tmp_path, encode_golden(Golden(small, small))))


def _npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _with_damaged_deflate() -> bytes:
    stored = bytearray(encode_golden(golden()))
    stored[200:220] = bytes(20)
    return bytes(stored)


@pytest.mark.parametrize(
    "content",
    [
        _npy(np.zeros(3)),
        _npz(image=np.array(["a"]), logits=np.array(["b"])),
        _npz(image=np.zeros(3, int), logits=np.zeros(3, int)),
        _with_damaged_deflate(),
    ],
    ids=["one array", "strings", "integers", "damaged stream"],
)
def test_arrays_that_are_no_window_are_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(BundleError, match="holds no golden window"):
        read_golden(bundle_with(tmp_path, content))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300, 0.0])
def test_logits_that_no_engine_can_be_compared_with_are_refused(
    tmp_path: Path, value: float
) -> None:
    window = np.ones((1, 4, 2, 2, 2), np.float16)
    content = _npz(image=window, logits=np.full((1, 4, 2, 2, 2), value))
    with pytest.raises(BundleError, match=r"holds no golden window \(values that are not finite"):
        read_golden(bundle_with(tmp_path, content))


def test_a_small_file_of_large_arrays_is_refused_before_it_is_inflated(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.savez_compressed(stream, image=np.zeros(30 << 20, np.float32), logits=np.zeros(1))
    bundle = bundle_with(tmp_path, stream.getvalue())
    tracemalloc.start()
    with pytest.raises(BundleError, match=r"holds no golden window \(1258\d+ bytes in a file of"):
        read_golden(bundle)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
