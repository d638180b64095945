"""TorchScript files, and the real model of the wheel deepbet."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepbet.utils
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from attnseg import Segmenter, SegmentOptions, Volume
from attnseg.export.export import Exported
from attnseg.export.source.foreign import read_spec
from attnseg.imports.imported import import_torchscript
from attnseg.imports.torchscript import check_same_function, logits_network, read_torchscript
from attnseg.runtime.engines.cpu import open_engine
from attnseg.runtime.errors import ConfigError, ExportError, VolumeError
from attnseg.runtime.model.bundle import Bundle
from attnseg.runtime.steps.decide import softmax
from attnseg.runtime.strip import SkullStripper
from attnseg.synthetic import SyntheticCase
from attnseg.trainer.engine import TorchEngine

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
ROOT = Path(__file__).parents[2]
SPEC: dict[str, Any] = {
    "name": "bright",
    "channels": [{"name": "t1", "suffixes": ["_t1"]}],
    "labels": [{"name": "background", "value": 0}, {"name": "brain", "value": 1}],
    "orientation": None,
    "crop": "all",
    "normalisation": {"scheme": "none"},
    "inference": {"window": [32, 32, 32], "window_multiple": 8, "empty_windows": "run"},
}


class Bright(nn.Module):
    """Class 1 where the mean of the neighbours exceeds a threshold."""

    def __init__(self, threshold: float, end: str) -> None:
        super().__init__()
        self.threshold, self.end = threshold, end
        self.pool = nn.AvgPool3d(3, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        difference = self.pool(image) - self.threshold
        logits = torch.cat([torch.zeros_like(difference), difference], dim=1)
        if self.end == "softmax":
            return torch.softmax(logits, dim=1)
        if self.end == "softmax and a copy":
            return torch.softmax(logits, dim=1).contiguous()
        if self.end == "log-softmax":
            return torch.log_softmax(logits, dim=1)
        return torch.sigmoid(difference) if self.end == "sigmoid" else logits


def script(path: Path, threshold: float = 50.0, end: str = "logits") -> Path:
    torch.jit.save(torch.jit.script(Bright(threshold, end)), str(path))
    return path


def write_spec(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**SPEC, **changes}))
    return path


def imported(
    tmp_path: Path, threshold: float = 50.0, end: str = "logits", **changes: Any
) -> Exported:
    model = script(tmp_path / "model.pt", threshold, end)
    spec = write_spec(tmp_path / "spec.json", **changes)
    return import_torchscript(model, spec, tmp_path / "bundle")


SIGMOID: dict[str, Any] = {
    "activation": "sigmoid",
    "outputs": [{"region": "brain", "label": 1, "channels": [0]}],
    "regions": {"brain": [1]},
}


@pytest.mark.parametrize(
    ("end", "reference"),
    [
        ("logits", "torch"),
        ("softmax", "torch"),
        ("log-softmax", "torch"),
        ("sigmoid", "torch"),
        ("softmax and a copy", "onnxruntime"),
    ],
)
def test_a_scripted_network_runs_as_a_bundle(tmp_path: Path, end: str, reference: str) -> None:
    exported = imported(tmp_path, 0.1, end, **(SIGMOID if end == "sigmoid" else {}))
    assert exported.report.reference.split()[0] == reference
    bundle = exported.bundle
    image = np.random.default_rng(0).standard_normal((32, 32, 32)).astype(np.float32)
    segmenter = Segmenter(bundle, SegmentOptions(precision="fp32"))
    labels = segmenter.segment(Volume([image], np.eye(4))).labels
    mean = ndimage.uniform_filter(image.astype(np.float64), 3, mode="constant")
    clear = np.abs(mean - 0.1) > 1e-5
    np.testing.assert_array_equal(labels[clear], (mean > 0.1)[clear])


def test_logits_are_those_before_the_activation() -> None:
    image = torch.full((1, 1, 3, 3, 3), 40.0)
    network = torch.jit.script(Bright(10.0, "softmax")).eval()
    logits = logits_network(network)
    assert logits is not None
    assert logits(image)[0, :, 1, 1, 1].tolist() == [0, 30]  # their softmax is 0 and 1 in float32
    assert network(image)[0, :, 1, 1, 1].tolist() == [pytest.approx(9.4e-14, rel=0.01), 1]


def test_a_network_that_pytorch_cannot_freeze_gives_no_logits() -> None:
    assert logits_network(torch.jit.script(Bright(10.0, "softmax")).train()) is None


def test_logits_of_a_frozen_file(tmp_path: Path) -> None:
    frozen = torch.jit.freeze(torch.jit.script(Bright(10.0, "sigmoid")).eval())
    torch.jit.save(frozen, str(tmp_path / "model.pt"))
    logits = logits_network(read_torchscript(tmp_path / "model.pt"))
    assert logits is not None
    assert logits(torch.full((1, 1, 3, 3, 3), 40.0))[0, 0, 1, 1, 1] == 30


def test_probabilities_of_another_function_are_refused(tmp_path: Path) -> None:
    network, other = (torch.jit.script(Bright(t, "softmax")).eval() for t in (0.0, 1.0))
    logits = logits_network(other)
    assert logits is not None
    spec = read_spec(write_spec(tmp_path / "spec.json"))
    message = (
        r"model.pt: without its last activation, it gives probabilities that differ by 2.\de-01"
    )
    with pytest.raises(ExportError, match=message):
        check_same_function(Path("model.pt"), network, TorchEngine(logits), spec)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is not a file"), (b"nothing", "is not TorchScript, or is damaged")],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    model = tmp_path / "model.pt"
    if content is not None:
        model.write_bytes(content)
    with pytest.raises(ExportError, match=message):
        import_torchscript(model, write_spec(tmp_path / "spec.json"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_deepbet_gives_the_probabilities_of_its_own_torchscript(tmp_path: Path) -> None:
    file = Path(deepbet.utils.DATA_PATH) / "models" / "bbox_model.pt"
    bundle = import_torchscript(file, ROOT / "docs" / "deepbet.json", tmp_path / "deepbet").bundle
    head = _head((96, 112, 104))
    segmenter = Segmenter(bundle, SegmentOptions(precision="fp32"))
    result = segmenter.segment(Volume([head], np.diag([1.8, 1.8, 1.8, 1.0])))
    assert set(np.unique(result.labels)) == {0, 1}
    rng = np.random.default_rng(1)
    window = (0.449 + 0.226 * rng.standard_normal((1, 1, 64, 96, 64))).astype(np.float32)
    network = torch.jit.load(str(file), map_location="cpu").eval()
    with torch.inference_mode():
        expected = network(torch.from_numpy(window)).numpy()[0]
    for name in ("openvino", "onnxruntime"):
        engine = open_engine(name, bundle.file("onnx"), "fp32", 2)
        np.testing.assert_allclose(softmax(engine.infer(window)[0]), expected, atol=1e-3)


def _head(shape: tuple[int, int, int]) -> np.ndarray:
    """A bright ball in a darker shell: enough for a brain to be found in it."""
    index = np.indices(shape)
    centre = (np.array(shape) / 2)[:, None, None, None]
    radius = np.sqrt((((index - centre) / centre) ** 2).sum(0))
    head = np.zeros(shape, np.float32)
    head[radius < 0.95] = 60
    head[radius < 0.85] = 20
    head[radius < 0.75] = 100
    texture = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(shape), 2)
    return (head * (1 + texture)).astype(np.float32)


def with_skull(case: SyntheticCase) -> tuple[Volume, Volume]:
    """A phantom's scan, and the same scan with a bright rim and a spot outside the brain."""
    channels = [np.asarray(image).astype(np.int16) for image in case.images]
    brain = ndimage.binary_fill_holes(np.any([channel != 0 for channel in channels], axis=0))
    stripped = [np.where(brain, np.maximum(channel, 60), 0) for channel in channels]
    shell = ndimage.binary_dilation(brain, iterations=5) & ~ndimage.binary_dilation(
        brain, iterations=3
    )
    raw = [np.where(shell, 45, channel).astype(np.int16) for channel in stripped]
    raw[0][:3, :3, :3] = 900  # a second, smaller component
    affine = case.affine
    return Volume([c.astype(np.int16) for c in stripped], affine), Volume(raw, affine)


def test_a_scan_with_skull_is_stripped_before_it_is_segmented(
    tmp_path: Path, small_synthetic: SyntheticCase
) -> None:
    stripped, raw = with_skull(small_synthetic)
    folder = imported(tmp_path).bundle.folder
    options = SegmentOptions(precision="fp32", skull_strip=folder)
    segmenter = Segmenter(options=options)
    staged = segmenter.stage(raw)
    outside = np.asarray(stripped.channels[0]) == 0
    rim = ndimage.binary_dilation(~outside, iterations=1) & outside
    for channel in staged.volume.channels:  # a mean over 3 voxels blurs the surface by one
        assert not np.asarray(channel)[outside & ~rim].any()
    result = segmenter.segment(raw)
    assert next(iter(result.elapsed_ms)) == "skull-strip" and result.elapsed_ms["skull-strip"] > 0
    assert segmenter.plan.settings()["skull_strip"] == Bundle.load(folder).sha256
    assert "skull_strip" not in Segmenter(options=SegmentOptions()).plan.settings()


class Finds:
    """Segmenter that finds given labels."""

    def __init__(self, labels: np.ndarray) -> None:
        self.labels = labels

    def segment(self, volume: Volume) -> Any:
        return SimpleNamespace(labels=self.labels, warnings=("doubtful",))


def test_the_largest_component_with_its_holes_filled_is_the_brain(
    caplog: pytest.LogCaptureFixture,
) -> None:
    labels = np.zeros((9, 9, 9), np.uint8)
    labels[1:6, 1:6, 1:6] = 1
    labels[3, 3, 3] = 0  # a hole
    labels[8, 8, 8] = 1  # apart
    volume = Volume([np.full((9, 9, 9), 7, np.int16)] * 2, np.diag([20.0, 20.0, 20.0, 1.0]))
    caplog.set_level("INFO")
    stripped = SkullStripper(Finds(labels), 0, "bright").strip(volume)
    expected = np.zeros((9, 9, 9), np.int16)
    expected[1:6, 1:6, 1:6] = 7
    for channel in stripped.channels:
        np.testing.assert_array_equal(channel, expected)
    said = "skull-stripped by bright: the brain has 1000 ml"  # 125 voxels of 8 ml
    assert stripped.warnings == ("doubtful",) and said in caplog.text
    small = SkullStripper(Finds(labels), 0, "bright").strip(Volume(volume.channels, np.eye(4)))
    assert "implausible for an adult" in small.warnings[-1]


def test_a_scan_without_brain_is_refused() -> None:
    volume = Volume([np.ones((8, 8, 8))], np.eye(4))
    with pytest.raises(VolumeError, match="bright finds no brain"):
        SkullStripper(Finds(np.zeros((8, 8, 8), np.uint8)), 0, "bright").strip(volume)


def test_a_mask_of_another_channel_is_refused(tmp_path: Path) -> None:
    model = script(tmp_path / "model.pt")
    channels = [{"name": "ct", "suffixes": ["_ct"]}]
    spec = write_spec(tmp_path / "spec.json", channels=channels)
    folder = import_torchscript(model, spec, tmp_path / "bundle").bundle.folder
    with pytest.raises(ConfigError, match="takes ct; the model has t1, t1ce, t2, flair"):
        Segmenter(options=SegmentOptions(skull_strip=folder))
