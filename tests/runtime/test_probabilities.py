"""Probabilities of regions, and decisions by threshold, on values computed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

from attnseg import Bundle, Segmenter, SegmentOptions, Volume
from attnseg.cli.app import main
from attnseg.runtime.errors import ConfigError
from attnseg.runtime.steps import decide
from attnseg.runtime.steps.preprocess import preprocess
from attnseg.runtime.task import Activation, Output, Task
from attnseg.synthetic import SyntheticCase
from tests.conftest import LinearEngine

MATRIX = np.random.default_rng(0).normal(0, 0.8, (4, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def volume(small_synthetic: SyntheticCase) -> Volume:
    return Volume(small_synthetic.images, small_synthetic.affine)


class Constant(LinearEngine):
    """A network that returns the same logits for each voxel."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__(MATRIX[: len(logits)])
        self._logits = np.array(logits, np.float32)[None, :, None, None, None]

    def infer(self, batch: np.ndarray) -> np.ndarray:
        """See `Engine.infer`."""
        shape = (len(batch), self._logits.shape[1], *batch.shape[2:])
        return np.broadcast_to(self._logits, shape).copy()


def segmenter(
    options: SegmentOptions, task: Task | None = None, engine: LinearEngine | None = None
) -> Segmenter:
    """The shipped model with a linear network, unless another is given, and without clean-up."""
    bundle = Bundle.default()
    manifest = replace(bundle.manifest, task=task or bundle.manifest.task)
    options = replace(options, min_voxels=0)
    return Segmenter(replace(bundle, manifest=manifest), options, engine or LinearEngine(MATRIX))


def expected_probabilities(volume: Volume) -> np.ndarray:
    """Softmax of a linear map of each normalised voxel: WT, TC and ET, in the model's axes."""
    scan = preprocess(volume, Bundle.default().manifest.preprocessing)
    logits = np.einsum("kc,cxyz->kxyz", MATRIX.astype(np.float64), scan.image)
    softmax = np.exp(logits) / np.exp(logits).sum(0)
    regions = np.stack([softmax[1:].sum(0), softmax[1] + softmax[3], softmax[3]])
    whole = np.zeros((3, *scan.shape))
    whole[(slice(None), *scan.box.slices())] = regions
    return whole


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("spacing_mm", [1.0, 2.0])
@pytest.mark.parametrize("tta", ["none", "mirror8"])
def test_what_no_window_covers_is_background(
    tta: str, spacing_mm: float, activation: Activation
) -> None:
    """A network that is sure of background everywhere finds no region, and its probability is 0.

    The image has two small bodies at its ends, so that windows between them are skipped; at 2 mm
    it is resampled, so that a grid surrounds its box.
    """
    image = np.zeros((160, 40, 40), np.float32)
    for start in (4, 140):
        body = np.random.default_rng(start).uniform(50, 100, (12, 12, 12))
        image[start : start + 12, 10:22, 10:22] = body
    channels = [
        image + c * np.random.default_rng(c).random(image.shape) * (image > 0) for c in range(4)
    ]
    volume = Volume(channels, np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0]))
    if activation == "softmax":
        engine, task, decide = Constant([20, 0, 0, 0]), None, "threshold"
    else:
        engine, task, decide = Constant([-20, -20, -20]), sigmoid_task(), None
    options = SegmentOptions(probabilities=True, tta=tta, decide=decide)
    result = segmenter(options, task, engine).segment(volume)
    assert result.probabilities is not None
    assert result.probabilities.max() < 1e-6 and not result.labels.any()


def inside(volume: Volume) -> np.ndarray:
    return np.all([np.asarray(channel) != 0 for channel in volume.channels], axis=0)


@pytest.mark.parametrize("orientation", ["LPS", "RAI", "SAL"])
@pytest.mark.parametrize("tta", ["none", "mirror8"])
def test_probabilities_are_sums_of_the_softmax_on_the_scans_grid(
    volume: Volume, orientation: str, tta: str
) -> None:
    turned = volume.oriented(orientation)
    options = SegmentOptions(probabilities=True, tta=tta)
    result = segmenter(options).segment(turned)
    found = result.probabilities
    assert found is not None
    assert (found.shape, found.dtype) == ((3, *turned.shape), np.float32)
    back = np.stack([Volume([own], turned.affine).oriented("LPS").channels[0] for own in found])
    brain = inside(volume.oriented("LPS"))
    expected = expected_probabilities(volume)
    np.testing.assert_allclose(back[:, brain], expected[:, brain], atol=2e-6)


def test_no_probabilities_are_kept_unless_asked_for(volume: Volume) -> None:
    assert segmenter(SegmentOptions()).segment(volume).probabilities is None


def test_thresholds_write_the_largest_region_first(volume: Volume) -> None:
    result = segmenter(SegmentOptions(decide="threshold", probabilities=True)).segment(volume)
    assert result.probabilities is not None
    whole, core, enhancing = result.probabilities
    expected = np.zeros(volume.shape, np.uint8)
    expected[whole > 0.5] = 2
    expected[core > 0.5] = 1
    expected[enhancing > 0.5] = 4
    np.testing.assert_array_equal(result.labels, expected)
    assert set(np.unique(expected)) == {0, 1, 2, 4}
    assert result.volumes_ml["ET"] == round(int((expected == 4).sum()) / 1000, 3)


def sigmoid_task() -> Task:
    """The shipped task with three overlapping outputs, as MONAI's BraTS bundle: TC, WT, ET."""
    task = Bundle.default().manifest.task
    outputs = (Output("WT", 2, (1,)), Output("TC", 1, (0,), 0.3), Output("ET", 4, (2,)))
    return replace(task, activation="sigmoid", outputs=outputs)


def test_sigmoid_outputs_are_written_in_order(volume: Volume) -> None:
    bundle = Bundle.default()
    manifest = replace(bundle.manifest, task=sigmoid_task())
    engine = LinearEngine(MATRIX[:3])
    options = SegmentOptions(min_voxels=0, probabilities=True)
    result = Segmenter(replace(bundle, manifest=manifest), options, engine).segment(volume)
    scan = preprocess(volume, manifest.preprocessing)
    logits = np.einsum("kc,cxyz->kxyz", MATRIX[:3].astype(np.float64), scan.image)
    core, whole, enhancing = 1 / (1 + np.exp(-logits))
    expected = np.zeros(scan.shape, np.uint8)
    box = expected[scan.box.slices()]
    box[whole > 0.5] = 2
    box[core > 0.3] = 1
    box[enhancing > 0.5] = 4
    turned = Volume([result.labels], volume.affine).oriented("LPS").channels[0]
    brain = inside(volume.oriented("LPS"))
    np.testing.assert_array_equal(turned[brain], expected[brain])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SegmentOptions(tta="paper", fuse="vote", probabilities=True), "has probabilities; leave"),
        (SegmentOptions(tta="mirror8", fuse="vote", decide="threshold"), "have thresholds"),
        (SegmentOptions(decide="median"), "decide median does not exist"),  # type: ignore[arg-type]
        (SegmentOptions(probabilities=1), "probabilities must be true or false"),  # type: ignore[arg-type]
    ],
)
def test_contradicting_options_are_refused(options: SegmentOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        segmenter(options)


def test_regions_that_do_not_nest_have_no_thresholds(volume: Volume) -> None:
    task = replace(Bundle.default().manifest.task, regions={"WT": (1, 2, 4), "ET": (4,)})
    with pytest.raises(ConfigError, match="WT adds 2; decide by argmax"):
        segmenter(SegmentOptions(decide="threshold"), task)
    with pytest.raises(ConfigError, match="argmax is for networks with one output per label"):
        segmenter(SegmentOptions(decide="argmax"), sigmoid_task())


def test_probabilities_have_a_bound(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decide, "LARGEST_PROBABILITIES", 1 << 20)
    with pytest.raises(ConfigError, match="the probabilities of 3 regions have 0"):
        segmenter(SegmentOptions(probabilities=True)).segment(volume)


def test_run_writes_probabilities_as_a_4d_file(small_scan: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    call = ["run", str(small_scan), "-o", str(output), "--precision", "fp32", "--probabilities"]
    result = CliRunner().invoke(main, call)
    assert result.exit_code == 0, result.output
    file = nib.load(output / "small_prob.nii.gz")
    labels = nib.load(output / "small_seg.nii.gz")
    assert file.shape == (*labels.shape, 3)
    np.testing.assert_array_equal(file.affine, labels.affine)
    found = np.asarray(file.dataobj)
    assert 0 <= found.min() <= found.max() <= 1
    assert "skipped" in CliRunner().invoke(main, call).stdout
    other = CliRunner().invoke(main, call[:-1])
    assert other.exit_code == 1
    assert "other options" in other.stderr
