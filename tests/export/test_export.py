from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from attnseg import Bundle, Segmenter, SegmentOptions, Volume
from attnseg.export import verify
from attnseg.export.checkpoint import encode_weights, load_trained
from attnseg.export.export import export_bundle
from attnseg.export.onnx import export_onnx, fold_batch_norms
from attnseg.runtime.bundle import default_folder
from attnseg.runtime.engines.choice import ENGINES, open_engine
from attnseg.runtime.errors import BundleError, EngineError, TrainingError
from attnseg.runtime.grid import Grid
from attnseg.synthetic import SyntheticCase
from attnseg.trainer.model import NetworkConfig
from attnseg.trainer.networks import Network, build_network

WEIGHTS = default_folder() / "weights.safetensors"


def lively_network(config: NetworkConfig) -> Network:
    """A network whose batch norms are not at their initial values."""
    torch.manual_seed(0)
    network = build_network(config)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.data.uniform_(0.5, 1.5)
    return network.eval()


VARIANTS = [
    *(
        NetworkConfig(3, 5, (4, 8), 8, attention, multi_scale)
        for attention, multi_scale in (("gap", True), ("se", True), ("cbam", True), ("none", False))
    ),
    NetworkConfig(3, 5, (4, 8), 8, "none", False, "unet3d"),
    NetworkConfig(3, 5, (2, 2, 4, 4, 4, 4, 6, 6), 8, "none", False, "deepmedic"),
]


def label(config: NetworkConfig) -> str:
    return f"{config.architecture} {config.attention} {config.multi_scale}"


@pytest.mark.parametrize("config", VARIANTS, ids=label)
def test_the_graph_gives_torchs_logits_for_any_batch_and_size(
    tmp_path: Path, config: NetworkConfig
) -> None:
    network = lively_network(config)
    file = tmp_path / "model.onnx"
    file.write_bytes(export_onnx(network))
    for shape in ((1, 3, 16, 16, 16), (3, 3, 8, 20, 12)):
        image = torch.randn(shape)
        with torch.inference_mode():
            expected = network(image).numpy()
        for name in ENGINES:
            result = open_engine(name, file, "fp32", 1).infer(image.numpy())
            np.testing.assert_allclose(result, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", VARIANTS, ids=label)
def test_folding_batch_norms_changes_no_logit(config: NetworkConfig) -> None:
    network = lively_network(config)
    folded = fold_batch_norms(network)
    assert not any(isinstance(m, torch.nn.BatchNorm3d) for m in folded.modules())
    assert any(isinstance(m, torch.nn.BatchNorm3d) for m in network.modules())
    image = torch.randn(1, 3, 16, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(folded(image), network(image), atol=1e-4, rtol=1e-4)


def test_the_graph_is_named_dynamic_and_silent_about_the_machine() -> None:
    model = onnx.load_from_string(export_onnx(lively_network(VARIANTS[0])))
    onnx.checker.check_model(model, full_check=True)
    assert [o.version for o in model.opset_import if o.domain == ""] == [20]
    (image,), (logits,) = model.graph.input, model.graph.output
    assert (image.name, logits.name) == ("image", "logits")
    for value, channels in ((image, 3), (logits, 5)):
        dims = value.type.tensor_type.shape.dim
        assert [d.dim_param or d.dim_value for d in dims] == ["batch", channels, "x", "y", "z"]
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert b"/" + Path(__file__).parts[1].encode() + b"/" not in model.SerializeToString()


def test_the_same_weights_give_the_same_bytes() -> None:
    first, second = (export_onnx(lively_network(VARIANTS[0])) for _ in range(2))
    assert first == second


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    bundle, parity = export_bundle(WEIGHTS, tmp_path_factory.mktemp("export") / "model")
    assert {p.engine.split()[0] for p in parity} == set(ENGINES)
    assert max(p.largest_difference for p in parity) < 1e-4
    return bundle


def test_the_shipped_weights_export_to_the_shipped_bundle(exported: Bundle) -> None:
    shipped = Bundle.default()
    ours, theirs = (load_file(b.file("weights")) for b in (exported, shipped))
    assert {name: value.shape for name, value in ours.items()} == {
        name: value.shape for name, value in theirs.items()
    }
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    # Files and fields of older versions, which the shipped bundle may be from, say less.
    common = {"files": {}, "created_with": "", "network": {}}
    assert exported.manifest.model_copy(update=common) == (
        shipped.manifest.model_copy(update=common)
    )
    networks = [NetworkConfig.from_dict(b.manifest.network) for b in (exported, shipped)]
    assert networks[0] == networks[1]


def test_weights_that_are_read_and_written_again_are_the_same_bytes(exported: Bundle) -> None:
    file = exported.file("weights")
    assert encode_weights(load_trained(file)) == file.read_bytes()


@pytest.mark.parametrize(
    "grid", [Grid(shape=(32, 48, 32)), Grid(spacing_mm=(1.0, 1.0, 2.5))], ids=str
)
def test_weights_keep_the_task_and_the_grid(tmp_path: Path, grid: Grid) -> None:
    shipped = load_trained(WEIGHTS)
    task = replace(shipped.preparation.task, aliases={7: 4}, spacing_mm=(1.0, 1.0, 2.5))
    model = replace(shipped, preparation=replace(shipped.preparation, task=task, grid=grid))
    file = tmp_path / "weights.safetensors"
    file.write_bytes(encode_weights(model))
    assert load_trained(file).preparation == model.preparation


def test_the_exported_bundle_segments_as_the_shipped_one(
    exported: Bundle, small_synthetic: SyntheticCase
) -> None:
    volume = Volume(small_synthetic.images, small_synthetic.affine)
    options = SegmentOptions(precision="fp32")
    ours, shipped = (Segmenter(b, options).segment(volume).labels for b in (exported, None))
    np.testing.assert_array_equal(ours, shipped)


def test_a_graph_that_differs_from_torch_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(network: Network) -> bytes:
        other = copy.deepcopy(network)
        other.head.weight.data *= 1.01
        return export_onnx(other)

    monkeypatch.setattr("attnseg.export.export.export_onnx", wrong)
    with pytest.raises(EngineError, match=r"differs from torch by .* no bundle was written"):
        export_bundle(WEIGHTS, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_parity_needs_an_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verify, "installed_engines", lambda: dict.fromkeys(ENGINES))
    with pytest.raises(EngineError, match="parity needs an inference engine"):
        export_bundle(WEIGHTS, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_taken_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(BundleError, match="exists and is not empty"):
        export_bundle(WEIGHTS, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["mine"]


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="does not exist"):
        load_trained(tmp_path / "gone.pt")
    with pytest.raises(TrainingError, match=r"is a folder; give the weights\.safetensors in it"):
        load_trained(tmp_path)
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(b"junk")
        with pytest.raises(TrainingError, match=f"{name}: is damaged or not a"):
            load_trained(tmp_path / name)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(TrainingError, match=r"other\.safetensors: holds no weights of attnseg"):
        load_trained(tmp_path / "other.safetensors")


def test_a_truncated_weights_file_is_refused(tmp_path: Path) -> None:
    copy = Path(shutil.copy(WEIGHTS, tmp_path / "w.safetensors"))
    copy.write_bytes(copy.read_bytes()[:-100])
    with pytest.raises(TrainingError, match=r"w\.safetensors: is damaged"):
        load_trained(copy)
