from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attnseg import Bundle
from attnseg.export import verify
from attnseg.export.export import ExportOptions, export_bundle
from attnseg.export.gate.samples import read_samples, sample_windows, synthetic_sample
from attnseg.export.verify import verify_bundle
from attnseg.inspect import inspect_bundle
from attnseg.runtime.errors import BundleError, TrainingError
from attnseg.runtime.model.bundle import file_entry
from attnseg.runtime.model.golden import Golden, encode_golden, read_golden
from attnseg.runtime.model.manifest import Budget
from attnseg.runtime.steps.preprocess import Preprocessing
from attnseg.runtime.steps.schemes import ZScore
from attnseg.synthetic import make_case, write_case
from tests.bundles import write_bundle
from tests.conftest import WEIGHTS
from tests.export.test_export import SM86, one_window


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("verify") / "model"
    options = ExportOptions(fp16=True, engines=(SM86,), budget=Budget(dice=0.01))
    return export_bundle(WEIGHTS, folder, options, one_window).bundle


def test_a_bundle_is_measured_again_with_its_own_budget(bundle: Bundle) -> None:
    report = verify_bundle(bundle.folder, samples=one_window)
    assert report.failures() == []
    assert report.budget.dice == 0.01
    assert {m.precision for m in report.measured} >= {"fp32", "fp16"}
    engines = {x.engine.split()[0] for x in (*report.measured, *report.not_run)}
    assert {"onnxruntime-cuda", "tensorrt-rtx"} <= engines


def test_a_golden_window_of_other_weights_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    golden = read_golden(bundle)
    wrong = encode_golden(Golden(golden.image, golden.logits * 1.01))
    files = {n: (bundle.folder / n).read_bytes() for n in bundle.manifest.files}
    files["golden.npz"] = wrong
    entries = {**bundle.manifest.files, "golden.npz": file_entry("golden", wrong)}
    manifest = replace(bundle.manifest, files=entries)
    write_bundle(tmp_path / "changed", manifest, files)
    with pytest.raises(BundleError, match="do not belong together; export it again"):
        verify_bundle(tmp_path / "changed", samples=one_window)


def test_without_torch_the_reference_is_the_fp32_graph_checked_on_the_golden_window(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "torch" in verify_bundle(bundle.folder, samples=lambda _: ()).reference
    monkeypatch.setattr(verify, "missing", list)  # of the modules that are asked for
    report = verify_bundle(bundle.folder, samples=lambda _: ())
    found = r"onnxruntime \S+ fp32 \(the fp32 graph, as PyTorch is not installed, within (\S+) of"
    match = re.match(found, report.reference)
    assert match and 0 < float(match[1]) < 1e-4, report.reference
    golden = read_golden(bundle)
    files = {n: (bundle.folder / n).read_bytes() for n in bundle.manifest.files}
    files["golden.npz"] = encode_golden(Golden(golden.image, golden.logits * 1.01))
    entries = {**bundle.manifest.files, "golden.npz": file_entry("golden", files["golden.npz"])}
    write_bundle(tmp_path / "changed", replace(bundle.manifest, files=entries), files)
    with pytest.raises(BundleError, match="do not belong together"):
        verify_bundle(tmp_path / "changed", samples=lambda _: ())


def test_every_step_is_named_before_it_starts(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    opened: list[str] = []

    def load(folder: Path) -> Bundle:
        opened.append(steps[-1])
        return bundle

    def reference(_: Bundle) -> Any:
        opened.append(steps[-1])
        return real(bundle)

    real = verify._reference
    monkeypatch.setattr(verify.Bundle, "load", load)
    monkeypatch.setattr(verify, "_reference", reference)
    verify_bundle(bundle.folder, samples=one_window, progress=steps.append)
    assert opened == ["bundle", "reference"]
    assert steps[:4] == ["bundle", "reference", "cases", "golden window"]
    assert steps.index("openvino fp32: golden window") < steps.index("openvino fp32: small brain")
    assert "simulated fp16: golden window" in steps


def test_a_damaged_engine_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle.folder, tmp_path / "copy"))
    engine = copy / "model-fp16-sm86.tensorrt-rtx"
    engine.write_bytes(engine.read_bytes()[:-100])
    with pytest.raises(BundleError, match=r"tensorrt-rtx: does not match its checksum"):
        verify_bundle(copy, samples=one_window)


def test_the_contents_name_every_file_and_count_the_layers(bundle: Bundle) -> None:
    found = inspect_bundle(bundle)
    assert [row[0] for row in found.files] == list(bundle.manifest.files)
    (engine,) = [row for row in found.files if row[1] == "engine"]
    assert engine[2:4] == ("fp16", f"sm86, tensorrt-rtx {_version(bundle)}, 12x64x64x64")
    full, half = found.layers
    assert full.startswith("model.onnx: ") and "4 ConvTranspose float," in full
    assert half.startswith("model-fp16.onnx: ") and "4 ConvTranspose float16" in half
    assert "float," not in half


def _version(bundle: Bundle) -> str:
    (build,) = [e.engine for e in bundle.manifest.files.values() if e.engine]
    return build.version


def test_cases_that_the_model_was_trained_on_are_left_out(bundle: Bundle, tmp_path: Path) -> None:
    training = bundle.manifest.training
    assert training is not None
    small = make_case(1, (48, 48, 48))
    for name in (training.train_cases[0], "another"):
        write_case(small, tmp_path, name)
    assert [s.name for s in read_samples(tmp_path, bundle.manifest)] == ["another"]
    (sample,) = read_samples(tmp_path, bundle.manifest)
    assert sample.truth is not None and set(sample.truth.ravel()) == {0, 1, 2, 4}
    shutil.rmtree(tmp_path / "another")
    with pytest.raises(TrainingError, match="no case is left"):
        read_samples(tmp_path, bundle.manifest)


def test_other_tasks_are_measured_on_noise_with_every_voxel_in_it(bundle: Bundle) -> None:
    task = bundle.manifest.task
    manifest = replace(
        bundle.manifest,
        task=replace(task, channels=task.channels[:2], display=("t1",)),
        preprocessing=Preprocessing("LPS", None, "all", (ZScore("all"),) * 2),
    )
    sample = synthetic_sample(manifest)
    assert sample.truth is None
    assert (len(sample.volume.channels), sample.volume.shape) == (2, (64, 64, 64))
    assert sample_windows(manifest, sample).shape == (1, 2, 64, 64, 64)
