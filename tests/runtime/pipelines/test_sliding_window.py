from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference

from attnseg.runtime.errors import BundleError, EngineError
from attnseg.runtime.pipelines.sliding_window import sliding_window, sweep
from attnseg.runtime.steps.clock import StageClock
from attnseg.runtime.steps.windows import Blending, Placement, WindowOptions, plan_windows
from attnseg.trainer.engine import TorchEngine
from attnseg.trainer.model import AttentionResNetUNet, NetworkConfig
from tests.conftest import LinearEngine

IDENTITY = np.eye(2, dtype=np.float32)
BACKGROUND = np.array([16, 0, 0, 0], np.float32)
"""Logits of a voxel in none of the windows that are run."""


class Placed(LinearEngine):
    """Adds the place of a voxel in its window, x + 10 y + 100 z, to the image."""

    def __init__(self) -> None:
        super().__init__(IDENTITY)

    def infer(self, batch: np.ndarray) -> np.ndarray:
        """See `Engine.infer`."""
        x, y, z = np.indices(batch.shape[2:], np.float32)
        return super().infer(batch) + x + 10 * y + 100 * z


@pytest.mark.parametrize(
    "shape",
    [(32, 32, 32), (20, 32, 9), (33, 40, 47), (64, 48, 32), (31, 90, 10)],
    ids=["equal", "smaller", "not divisible", "divisible", "mixed"],
)
@pytest.mark.parametrize("overlap", [0.25, 0.5])
def test_blended_logits_are_those_of_monai(shape: tuple[int, ...], overlap: float) -> None:
    torch.manual_seed(0)
    network = AttentionResNetUNet(NetworkConfig(widths=(4, 8), bottleneck=8)).eval()
    image = torch.randn(1, 4, *shape)
    with torch.inference_mode():
        expected = sliding_window_inference(
            image, (32, 32, 32), 1, network, overlap=overlap, mode="gaussian"
        )
    engine = TorchEngine(network, torch.device("cpu"), "fp32")
    plan = WindowOptions((32, 32, 32), overlap, network.config.stride).plan(shape)
    result = sliding_window(image[0].numpy(), engine, plan, BACKGROUND[:4])
    assert isinstance(expected, torch.Tensor)
    np.testing.assert_allclose(result, expected[0].numpy(), atol=1e-4)


@pytest.mark.parametrize("shape", [(33, 40, 20), (16, 9, 50)])
def test_constant_weights_blend_as_monai_does(shape: tuple[int, int, int]) -> None:
    """The logits of a voxel depend on its place in the window, so that no weights are alike."""
    image = np.random.default_rng(1).standard_normal((2, *shape)).astype(np.float32)
    engine = Placed()

    def network(batch: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(engine.infer(batch.numpy()))

    expected = sliding_window_inference(
        torch.from_numpy(image)[None], (16, 16, 16), 1, network, overlap=0.25, mode="constant"
    )
    plan = plan_windows(shape, (16,) * 3, 0.25, blending=Blending("constant", empty_windows="run"))
    assert isinstance(expected, torch.Tensor)
    np.testing.assert_allclose(
        sliding_window(image, engine, plan, BACKGROUND[:2]), expected[0].numpy(), atol=1e-5
    )


@pytest.mark.parametrize("placement", ["stride", "even"])
@pytest.mark.parametrize("shape", [(40, 16, 9), (7, 20, 16), (16, 16, 16)])
def test_planes_come_as_soon_as_no_window_reaches_them(
    shape: tuple[int, int, int], placement: Placement
) -> None:
    image = np.random.default_rng(2).standard_normal((2, *shape)).astype(np.float32)
    plan = plan_windows(shape, (16,) * 3, 0.5, placement)
    engine, calls, parts = Placed(), [], []
    for part in sweep(image, engine, plan, BACKGROUND[:2]):
        parts.append(part)
        calls.append(engine.calls)
    starts = sorted({box.start[0] for box in plan.windows})
    per_start = len(plan.windows) // len(starts)
    assert calls == [per_start * count for count in range(1, len(starts) + 1)]
    ends = [*starts[1:], plan.padded_shape[0]]
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    assert [part.shape[1] for part in parts] == (sizes if shape[0] >= 16 else [shape[0]])
    np.testing.assert_array_equal(
        np.concatenate(parts, axis=1), sliding_window(image, engine, plan, BACKGROUND[:2])
    )


@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 1, 2)])
def test_mirrored_windows_are_averaged(axes: tuple[int, ...]) -> None:
    """A network that gives each voxel its place returns the centre of the mirrored axes."""
    image = np.ones((2, 8, 8, 8), np.float32)
    engine = Placed()
    plan = plan_windows((8, 8, 8), (8, 8, 8), blending=Blending(mirror_axes=axes))
    logits = sliding_window(image, engine, plan, BACKGROUND[:2])
    assert engine.calls == 2 ** len(axes)
    weights = (1, 10, 100)
    place = np.indices((8, 8, 8), np.float32)
    expected = sum(3.5 * w if a in axes else w * place[a] for a, w in enumerate(weights))
    np.testing.assert_allclose(logits[0], np.broadcast_to(expected, (8, 8, 8)) + 1, rtol=1e-6)


def test_a_mirrored_window_is_given_the_mirrored_image() -> None:
    """The network copies the image, so that its logits are turned back to the image itself."""
    image = np.random.default_rng(3).standard_normal((2, 9, 8, 8)).astype(np.float32)
    plan = plan_windows((9, 8, 8), (8, 8, 8), blending=Blending(mirror_axes=(0, 2)))
    result = sliding_window(image, LinearEngine(IDENTITY), plan, BACKGROUND[:2])
    np.testing.assert_allclose(result, image, atol=1e-6)


def test_sums_in_half_are_rounded_to_float16() -> None:
    """One window: logit * 1 is 2049 in float32, and 2048 in float16, which has 11 bits."""
    image = np.full((2, 8, 8, 8), 2049, np.float32)
    found = {}
    for accumulate in ("single", "half"):
        blending = Blending("constant", accumulate=accumulate)  # type: ignore[arg-type]
        plan = plan_windows((8, 8, 8), (8, 8, 8), blending=blending)
        found[accumulate] = sliding_window(image, LinearEngine(IDENTITY), plan, BACKGROUND[:2])
    assert (found["single"] == 2049).all() and (found["half"] == 2048).all()
    assert found["half"].dtype == np.float32


def test_windows_without_brain_are_run_where_the_model_says_so() -> None:
    image = np.zeros((2, 64, 16, 16), np.float32)
    image[1, :4] = 1
    engine = Placed()
    plan = plan_windows((64, 16, 16), (16,) * 3, 0, blending=Blending(empty_windows="run"))
    result = sliding_window(image, engine, plan, BACKGROUND[:2])
    assert engine.calls == 4
    np.testing.assert_allclose(result[0, 16:32], result[0, 48:], rtol=1e-6)
    assert result[:, 16:].any()


def test_a_network_of_other_channels_is_refused() -> None:
    image = np.ones((2, 16, 16, 16), np.float32)
    with pytest.raises(BundleError, match="returns 2 channels, its manifest names 3 outputs"):
        sliding_window(
            image, LinearEngine(IDENTITY), plan_windows((16,) * 3, (16,) * 3), BACKGROUND[:3]
        )


def test_a_linear_network_is_not_changed_by_windows() -> None:
    image = np.random.default_rng(0).standard_normal((2, 50, 41, 23)).astype(np.float32)
    plan = plan_windows((50, 41, 23), (16,) * 3)
    result = sliding_window(image, LinearEngine(IDENTITY), plan, BACKGROUND[:2])
    np.testing.assert_allclose(result, image, atol=1e-5)


def test_windows_without_brain_are_skipped_and_give_background() -> None:
    image = np.zeros((2, 64, 16, 16), np.float32)
    image[1, :4] = 1
    engine = LinearEngine(IDENTITY)
    result = sliding_window(image, engine, plan_windows((64, 16, 16), (16,) * 3, 0), BACKGROUND[:2])
    assert engine.calls == 1
    assert np.all(result[0, 16:] == 16) and np.all(result[1, 16:] == 0)
    assert np.all(result[:, 4:16] == 0)
    assert np.all(result.argmax(axis=0)[:4] == 1)


def test_an_image_of_zeros_runs_no_window() -> None:
    engine = LinearEngine(IDENTITY)
    result = sliding_window(
        np.zeros((2, 9, 9, 9), np.float32),
        engine,
        WindowOptions(None).plan((9, 9, 9)),
        BACKGROUND[:2],
    )
    assert engine.calls == 0
    assert result.shape == (2, 9, 9, 9)
    assert np.all(result[0] == 16) and not result[1].any()


def test_the_full_window_is_one_pass_over_the_padded_image() -> None:
    image = np.random.default_rng(0).standard_normal((2, 33, 16, 7)).astype(np.float32)
    engine = LinearEngine(IDENTITY)
    plan = WindowOptions(None, window_multiple=16).plan(image.shape[1:])
    assert plan.padded_shape == (48, 16, 16)
    np.testing.assert_allclose(
        sliding_window(image, engine, plan, BACKGROUND[:2]), image, atol=1e-6
    )
    assert engine.calls == 1


def test_progress_and_clock_are_told() -> None:
    shares: list[float] = []
    clock = StageClock()
    image = np.ones((2, 32, 16, 16), np.float32)
    plan = plan_windows((32, 16, 16), (16,) * 3, 0)
    sliding_window(image, LinearEngine(IDENTITY), plan, BACKGROUND[:2], shares.append, clock)
    assert shares == [0.5, 1]
    assert set(clock.elapsed_ms) == {"network", "blend"}


def test_logits_that_are_not_finite_are_an_error() -> None:
    engine = LinearEngine(np.array([[np.inf, 0], [0, 1]], np.float32))
    image = np.ones((2, 16, 16, 16), np.float32)
    with pytest.raises(EngineError, match="returned logits that are not finite in fp32"):
        sliding_window(image, engine, plan_windows((16,) * 3, (16,) * 3), BACKGROUND[:2])
