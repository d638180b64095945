from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnseg import Bundle, Segmenter, SegmentOptions
from attnseg.runtime.bundle import EngineBuild, file_entry, write_bundle
from attnseg.runtime.engines import choice, cpu
from attnseg.runtime.engines.base import EngineInfo
from attnseg.runtime.engines.choice import EngineRequest, choose_engine, ways
from attnseg.runtime.errors import EngineError
from attnseg.runtime.golden import read_golden

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
    "native.engine": file_entry(
        "engine", b"native", "fp16", RTX.model_copy(update={"builder": "tensorrt"})
    ),
}
REQUEST = EngineRequest(window=WINDOW, threads=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shipped bundle with two engine files that nothing could run."""
    shipped = Bundle.default()
    contents = {n: (shipped.folder / n).read_bytes() for n in shipped.manifest.files}
    contents |= {"rtx.engine": b"rtx", "native.engine": b"native"}
    files = {**shipped.manifest.files, **FILES}
    manifest = shipped.manifest.model_copy(update={"files": files})
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

    def tensorrt(file: Path, build: EngineBuild, *_: Any) -> Any:
        return result(build.builder)

    monkeypatch.setattr(choice, "open_tensorrt", tensorrt)
    monkeypatch.setattr(choice, "open_onnxruntime_cuda", lambda *_: result("onnxruntime-cuda"))


def test_the_order_is_native_rtx_onnxruntime_and_the_processor(bundle: Bundle) -> None:
    names = [way.name for way in ways(bundle, REQUEST)]
    assert names == ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda", *cpu.ENGINES]
    assert [way.name for way in ways(Bundle.default(), REQUEST)] == names[2:]


@pytest.mark.parametrize("first", ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda"])
def test_the_first_that_opens_is_taken_and_the_others_say_why_not(
    bundle: Bundle, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    openers(monkeypatch, bundle, {first: 1.0})
    chosen = choose_engine(bundle, REQUEST)
    assert chosen.engine.info.name == first
    before = ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda"]
    before = before[: before.index(first)]
    assert [r.reason for r in chosen.refusals] == [f"{name} does not work" for name in before]


def test_without_a_gpu_the_processor_runs_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    openers(monkeypatch, bundle, {})
    segmenter = Segmenter(bundle, SegmentOptions(precision="auto"))
    assert segmenter.engine_info.name == "openvino"
    assert segmenter.refusals == (
        "tensorrt (native.engine): tensorrt does not work",
        "tensorrt-rtx (rtx.engine): tensorrt-rtx does not work",
    )


def test_nothing_is_said_of_engines_for_other_gpus_where_one_runs(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    openers(monkeypatch, bundle, {"tensorrt-rtx": 1.0})
    segmenter = Segmenter(bundle, SegmentOptions())
    assert segmenter.engine_info.name == "tensorrt-rtx"
    assert segmenter.refusals == ()


def test_an_engine_that_gives_other_logits_is_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    openers(monkeypatch, bundle, {"tensorrt": 1.5, "tensorrt-rtx": 1.001})
    chosen = choose_engine(bundle, REQUEST)
    assert chosen.engine.info.name == "tensorrt-rtx"
    (refusal,) = chosen.refusals
    assert "on the golden window differ by 5.0e-01 of the largest" in refusal.reason
    with pytest.raises(EngineError, match="golden window"):
        choose_engine(bundle, EngineRequest("tensorrt", window=WINDOW))
    openers(monkeypatch, bundle, {"tensorrt": float("nan")})
    with pytest.raises(EngineError, match="differ by nan"):
        choose_engine(bundle, EngineRequest("tensorrt", window=WINDOW))


def test_a_bundle_without_golden_window_does_not_run_on_a_gpu(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bundle.folder, tmp_path / "copy")
    files = {n: e for n, e in bundle.manifest.files.items() if e.role != "golden"}
    contents = {n: (bundle.folder / n).read_bytes() for n in files}
    manifest = bundle.manifest.model_copy(update={"files": files})
    without = write_bundle(tmp_path / "without", manifest, contents)
    openers(monkeypatch, bundle, {"tensorrt": 1.0})
    with pytest.raises(EngineError, match="no golden window to check it with; export it again"):
        choose_engine(without, EngineRequest("tensorrt", window=WINDOW))
    assert choose_engine(without, REQUEST).engine.info.name == "openvino"


def test_a_named_engine_or_precision_is_the_only_one_tried(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    openers(monkeypatch, bundle, {"tensorrt": 1.0, "onnxruntime-cuda": 1.0})
    chosen = choose_engine(bundle, EngineRequest("onnxruntime-cuda", window=WINDOW))
    assert chosen.engine.info.name == "onnxruntime-cuda"
    exact = choose_engine(bundle, EngineRequest(precision="bf16", window=WINDOW))
    assert exact.engine.info.name == "openvino"
    with pytest.raises(EngineError, match="tensorrt-rtx does not work"):
        choose_engine(bundle, EngineRequest("tensorrt-rtx", window=WINDOW))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (EngineRequest("cudnn"), "engine cudnn does not exist; choose auto, tensorrt"),
        (EngineRequest(precision="int4"), "precision int4 does not exist; choose auto, fp16"),
        (EngineRequest("tensorrt"), "no file for engine tensorrt; attnseg export makes one"),
        (EngineRequest(precision="int8"), "no int8 graph; attnseg export --int8 makes one"),
        (EngineRequest(precision="fp16"), "processors run no fp16; use --precision bf16 or fp32"),
        (EngineRequest("onnxruntime-cuda", "int8"), "runs fp16, fp32, got precision int8"),
        (EngineRequest("tensorrt", "bf16"), "runs fp16, int8, fp32, got precision bf16"),
        (EngineRequest("tensorrt", "int8"), "no file for engine tensorrt in int8; attnseg export"),
    ],
)
def test_what_cannot_be_had_is_said_in_words(request_: EngineRequest, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        choose_engine(Bundle.default(), request_)


def test_without_any_engine_the_extra_is_named(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    openers(monkeypatch, bundle, {})
    monkeypatch.setattr(cpu, "installed_engines", lambda: dict.fromkeys(cpu.ENGINES))
    monkeypatch.setattr(cpu, "ENGINES", {})
    with pytest.raises(EngineError, match=r"pip install 'attnseg\[cpu\]'"):
        choose_engine(bundle, REQUEST)
