from __future__ import annotations

import gc
import shutil
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnseg import Bundle, Segmenter, SegmentOptions
from attnseg.runtime.engines import cpu, select
from attnseg.runtime.engines.base import EngineInfo
from attnseg.runtime.engines.cpu import CPU_ENGINES
from attnseg.runtime.engines.select import EngineRequest, candidates, select_engine
from attnseg.runtime.errors import ConfigError, EngineError, MismatchError
from attnseg.runtime.model.bundle import file_entry
from attnseg.runtime.model.golden import read_golden
from attnseg.runtime.model.manifest import EngineBuild, FileEntry
from tests.bundles import write_bundle

WINDOW = (64, 64, 64)
RTX = EngineBuild(
    builder="tensorrt-rtx",
    version="1.7.1",
    target="sm86",
    compatibility="same",
    version_compatible=False,
    window=WINDOW,
    batch=1,
)
FILES = {
    "rtx.engine": file_entry("engine", b"rtx", "fp16", RTX),
    "native.engine": file_entry("engine", b"native", "fp16", replace(RTX, builder="tensorrt")),
}
REQUEST = EngineRequest(window=WINDOW)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shipped bundle with two engine files that nothing could run."""
    shipped = Bundle.default()
    contents = {n: (shipped.folder / n).read_bytes() for n in shipped.manifest.files}
    contents |= {"rtx.engine": b"rtx", "native.engine": b"native"}
    files = {**shipped.manifest.files, **FILES}
    manifest = replace(shipped.manifest, files=files)
    return write_bundle(tmp_path_factory.mktemp("choice") / "model", manifest, contents)


class Recorded:
    """Gives the golden window's logits, times a factor."""

    def __init__(self, bundle: Bundle, name: str, factor: float = 1.0) -> None:
        self.info = EngineInfo(name, "1", "fp16", "stand-in")
        self._logits = read_golden(bundle).logits * np.float32(factor)

    def infer(self, batch: np.ndarray) -> np.ndarray:
        return self._logits


def openers(monkeypatch: pytest.MonkeyPatch, bundle: Bundle, works: dict[str, float | str]) -> None:
    """Engines on a GPU that is not there: a factor for those that open, or a reason."""

    def result(name: str) -> Any:
        outcome = works.get(name, f"{name} does not work")
        if isinstance(outcome, str):
            raise EngineError(outcome)
        return Recorded(bundle, name, outcome)

    def tensorrt(file: Path, entry: FileEntry, *_: Any) -> Any:
        assert entry.engine is not None
        return result(entry.engine.builder)

    engines = "attnseg.runtime.engines"
    monkeypatch.setattr(f"{engines}.tensorrt.open_tensorrt", tensorrt)
    opened = f"{engines}.onnxruntime_cuda.open_onnxruntime_cuda"
    monkeypatch.setattr(opened, lambda *_: result("onnxruntime-cuda"))


def test_the_order_is_native_rtx_onnxruntime_and_the_processor(bundle: Bundle) -> None:
    names = [way.engine for way in candidates(bundle, REQUEST)]
    assert names == ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda", *CPU_ENGINES]
    assert [way.engine for way in candidates(Bundle.default(), REQUEST)] == names[2:]


@pytest.mark.parametrize("first", ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda"])
def test_the_first_that_opens_is_taken_and_the_others_say_why_not(
    bundle: Bundle, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    openers(monkeypatch, bundle, {first: 1.0})
    chosen = select_engine(bundle, REQUEST)
    assert chosen.engine.info.name == first
    before = ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda"]
    before = before[: before.index(first)]
    assert [r.error.cause for r in chosen.refusals] == [f"{name} does not work" for name in before]


def test_a_refused_engine_is_released_before_the_next_is_opened(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[weakref.ref[Recorded]] = []

    def tensorrt(file: Path, entry: FileEntry, *_: Any) -> Any:
        assert entry.engine is not None
        if entry.engine.builder == "tensorrt":
            engine = Recorded(bundle, "tensorrt", 1.5)
            refused.append(weakref.ref(engine))
            return engine
        (old,) = refused
        assert old() is None, "its memory is needed"
        return Recorded(bundle, "tensorrt-rtx", 1.0)

    monkeypatch.setattr("attnseg.runtime.engines.tensorrt.open_tensorrt", tensorrt)
    gc.disable()
    try:
        assert select_engine(bundle, REQUEST).engine.info.name == "tensorrt-rtx"
    finally:
        gc.enable()


def test_without_a_gpu_the_processor_runs_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    openers(monkeypatch, bundle, {})
    segmenter = Segmenter(bundle, SegmentOptions(precision="auto"))
    assert segmenter.engine.name == "openvino"
    assert tuple(map(str, segmenter.refusals)) == (
        "tensorrt (native.engine): tensorrt does not work",
        "tensorrt-rtx (rtx.engine): tensorrt-rtx does not work",
    )


def test_nothing_is_said_of_engines_for_other_gpus_where_one_runs(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    openers(monkeypatch, bundle, {"tensorrt-rtx": 1.0})
    segmenter = Segmenter(bundle, SegmentOptions())
    assert segmenter.engine.name == "tensorrt-rtx"
    assert segmenter.refusals == ()


def test_an_engine_that_gives_other_logits_is_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    openers(monkeypatch, bundle, {"tensorrt": 1.5, "tensorrt-rtx": 1.001})
    chosen = select_engine(bundle, REQUEST)
    assert chosen.engine.info.name == "tensorrt-rtx"
    (refusal,) = chosen.refusals
    assert "on the golden window differ by 5.0e-01 of the largest" in refusal.error.cause
    with pytest.raises(EngineError, match="golden window"):
        select_engine(bundle, EngineRequest("tensorrt", window=WINDOW))
    openers(monkeypatch, bundle, {"tensorrt": float("nan")})
    with pytest.raises(EngineError, match="differ by nan"):
        select_engine(bundle, EngineRequest("tensorrt", window=WINDOW))


class OfBatch(Recorded):
    """Gives the golden window's logits for each window but the last of a batch of four."""

    batches = (4, 1)

    def infer(self, batch: np.ndarray) -> np.ndarray:
        logits = np.repeat(self._logits, len(batch), axis=0)
        logits[3:] *= np.float32(1.5)
        return logits


def test_a_gpu_engine_is_checked_at_the_batch_size_of_volumes(bundle: Bundle) -> None:
    with pytest.raises(MismatchError, match=r"differ by 5.0e-01 of the largest"):
        select._check_golden(bundle, "fp16", OfBatch(bundle, "tensorrt"))


def test_a_bundle_without_golden_window_does_not_run_on_a_gpu(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bundle.folder, tmp_path / "copy")
    files = {n: e for n, e in bundle.manifest.files.items() if e.role != "golden"}
    contents = {n: (bundle.folder / n).read_bytes() for n in files}
    manifest = replace(bundle.manifest, files=files)
    without = write_bundle(tmp_path / "without", manifest, contents)
    openers(monkeypatch, bundle, {"tensorrt": 1.0})
    with pytest.raises(EngineError, match="no golden window to check it with; export the model"):
        select_engine(without, EngineRequest("tensorrt", window=WINDOW))
    assert select_engine(without, REQUEST).engine.info.name == "openvino"


def test_a_named_engine_or_precision_is_the_only_one_tried(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    openers(monkeypatch, bundle, {"tensorrt": 1.0, "onnxruntime-cuda": 1.0})
    chosen = select_engine(bundle, EngineRequest("onnxruntime-cuda", window=WINDOW))
    assert chosen.engine.info.name == "onnxruntime-cuda"
    exact = select_engine(bundle, EngineRequest(precision="bf16", window=WINDOW))
    assert exact.engine.info.name == "openvino"
    with pytest.raises(EngineError, match="tensorrt-rtx does not work"):
        select_engine(bundle, EngineRequest("tensorrt-rtx", window=WINDOW))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            EngineRequest("tensorrt"),
            "no file for engine tensorrt; "
            "export the model again with fp16=True and builder='tensorrt'",
        ),
        (EngineRequest(precision="int8"), "no int8 graph; export the model again with int8=True"),
        (
            EngineRequest(precision="fp16"),
            "CPU engines do not run fp16; use precision='bf16' or precision='fp32'",
        ),
        (EngineRequest("onnxruntime-cuda", "int8"), "runs fp16, fp32, got precision int8"),
        (EngineRequest("tensorrt", "bf16"), "runs fp16, int8, fp32, got precision bf16"),
        (
            EngineRequest("tensorrt-rtx", "int8"),
            "no file for engine tensorrt-rtx in int8; export the model again with int8=True",
        ),
    ],
)
def test_what_cannot_be_had_is_said_in_words(request_: EngineRequest, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        select_engine(Bundle.default(), request_)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"engine": "cudnn"}, "engine cudnn does not exist; choose auto, tensorrt"),
        ({"precision": "int4"}, "precision int4 does not exist; choose auto, fp16"),
        ({"device": "tpu"}, "device tpu does not exist; choose auto, cuda, cpu"),
        ({"engine": "openvino", "device": "cuda"}, "engine openvino runs on cpu, device cuda is"),
    ],
)
def test_a_name_that_does_not_exist_is_a_wrong_option(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineRequest(**fields)


def test_without_any_engine_the_extra_is_named(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    openers(monkeypatch, bundle, {})
    monkeypatch.setattr(cpu, "installed_engines", lambda: dict.fromkeys(CPU_ENGINES))
    for module in CPU_ENGINES:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EngineError, match=r"pip install '\.\[cpu\]'"):
        select_engine(bundle, REQUEST)


def test_an_engine_that_is_missing_leaves_the_next_one(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    openers(monkeypatch, bundle, {})
    assert select_engine(bundle, REQUEST).engine.info.name == "openvino"
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert select_engine(bundle, REQUEST).engine.info.name == "onnxruntime"


@pytest.mark.parametrize(
    "options", [{"engine": "opnvino"}, {"precision": "fp12"}, {"device": "cda"}], ids=str
)
def test_a_fallback_is_for_a_gpu_and_not_for_a_typing_error(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="does not exist; choose auto"):
        Segmenter(options=SegmentOptions(fallback="cpu", **options))


def test_a_fallback_does_not_replace_an_engine_of_the_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match="engine openvino is not installed"):
        Segmenter(options=SegmentOptions(engine="openvino", fallback="cpu"))
