from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from attnseg import Bundle
from attnseg.export import options as options_module
from attnseg.export import tensorrt as tensorrt_builder
from attnseg.export.export import ExportOptions, export_bundle
from attnseg.export.options import make_budget, make_options
from attnseg.export.samples import read_samples, sample_windows, synthetic_sample
from attnseg.export.verify import verify_bundle
from attnseg.inspect import inspect_bundle
from attnseg.runtime.bundle import Budget, file_entry, write_bundle
from attnseg.runtime.errors import BundleError, ConfigError, EngineError, TrainingError
from attnseg.runtime.golden import Golden, encode_golden, read_golden
from attnseg.runtime.gpu import Gpu
from attnseg.synthetic import make_case, write_case
from tests.export.test_export import SM86, WEIGHTS, one_window


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
    manifest = bundle.manifest.model_copy(update={"files": entries})
    write_bundle(tmp_path / "changed", manifest, files)
    with pytest.raises(BundleError, match="do not belong together; export it again"):
        verify_bundle(tmp_path / "changed", samples=one_window)


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
    assert engine[2:4] == ("fp16", f"sm86, tensorrt-rtx {_version(bundle)}, 1x64x64x64")
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
    channels = bundle.manifest.channels[:2]
    update = {
        "channels": channels,
        "normalisation": bundle.manifest.normalisation.__class__(foreground="all", landmarks=None),
    }
    manifest = bundle.manifest.model_copy(update=update)
    sample = synthetic_sample(manifest)
    assert sample.truth is None
    assert (len(sample.volume.channels), sample.volume.shape) == (2, (64, 64, 64))
    assert sample_windows(manifest, sample).shape == (1, 2, 64, 64, 64)


def no_gpu() -> Gpu:
    raise EngineError("no NVIDIA driver on this machine")


SETTINGS = {
    "fp16": False,
    "io": "fp16",
    "builder": "tensorrt-rtx",
    "targets": (),
    "batch": 1,
    "workspace": None,
    "compatible": "same",
    "version_compatible": False,
    "timing_cache": None,
    "int8": False,
    "calibrate": None,
    "spec": None,
    "sign": None,
    "name": None,
    "description": "",
    "intended_use": "research",
}


def test_options_of_the_command_line() -> None:
    assert make_options(None, None, SETTINGS).engines == ()
    half = make_options(0.01, 2, {**SETTINGS, "fp16": True, "workspace": 5, "batch": 4})
    (engine,) = half.engines
    assert (engine.target, engine.batch, engine.workspace_bytes) == ("sm86", 4, 5_000_000)
    assert (half.budget.dice, half.budget.volume_percent) == (0.01, 2)
    assert half.words == {"intended_use": "research"}
    targets = ("rtx3090", "sm86", "sm89")
    two = make_options(None, None, {**SETTINGS, "targets": targets})
    assert [e.target for e in two.engines] == ["sm86", "sm89"]
    (portable,) = make_options(None, None, {**SETTINGS, "compatible": "ampere+"}).engines
    assert (portable.target, portable.compatibility) == ("sm80", "ampere+")
    none = {**SETTINGS, "fp16": True, "builder": "none"}
    assert make_options(None, None, none).engines == ()
    with pytest.raises(ConfigError, match="--builder none builds nothing"):
        make_options(None, None, {**none, "targets": ("sm86",)})
    with pytest.raises(ConfigError, match="--timing-cache is for engines, and none is built"):
        make_options(None, None, {**SETTINGS, "timing_cache": Path("t.cache")})
    for alone in ({"int8": True}, {"calibrate": Path("scans")}):
        with pytest.raises(ConfigError, match=r"--int8 and --calibrate FOLDER .* go together"):
            make_options(None, None, {**SETTINGS, **alone})


def test_tensorrt_builds_for_the_gpu_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**SETTINGS, "fp16": True, "builder": "tensorrt"}
    monkeypatch.setattr(tensorrt_builder, "load_builder", lambda _: None)
    for module in (options_module, tensorrt_builder):
        monkeypatch.setattr(module, "find_gpu", no_gpu)
    with pytest.raises(ConfigError, match="needs the GPU that it builds for: no NVIDIA driver"):
        make_options(None, None, settings)
    with pytest.raises(ConfigError, match=r"no NVIDIA driver.*with --builder tensorrt-rtx"):
        make_options(None, None, {**settings, "targets": ("sm86",)})
    for module in (options_module, tensorrt_builder):
        monkeypatch.setattr(module, "find_gpu", lambda: Gpu("H200", "sm90", 1, "13.0"))
    (engine,) = make_options(None, None, {**settings, "timing_cache": Path("t.cache")}).engines
    assert (engine.target, engine.timing_cache) == ("sm90", "t.cache")
    with pytest.raises(ConfigError, match=r"runs on, sm90 \(H200\), not for sm86"):
        make_options(None, None, {**settings, "targets": ("sm86",)})


def test_budgets_that_nothing_could_keep_are_refused() -> None:
    for values in ((0, None), (-1, None), (2, None), (None, 0), (None, 101)):
        with pytest.raises(ConfigError, match=r"budget of (dice|volume_percent): "):
            make_budget(*values)
