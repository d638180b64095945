from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference

from attnseg.runtime.errors import EngineError
from attnseg.runtime.pipelines.sliding_window import sliding_window
from attnseg.runtime.steps.clock import StageClock
from attnseg.runtime.steps.windows import WindowOptions, plan_windows
from attnseg.trainer.engine import TorchEngine
from attnseg.trainer.model import AttentionResNetUNet, NetworkConfig
from tests.conftest import LinearEngine

IDENTITY = np.eye(2, dtype=np.float32)


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
    result = sliding_window(image[0].numpy(), engine, plan, 4)
    assert isinstance(expected, torch.Tensor)
    np.testing.assert_allclose(result, expected[0].numpy(), atol=1e-4)


def test_a_linear_network_is_not_changed_by_windows() -> None:
    image = np.random.default_rng(0).standard_normal((2, 50, 41, 23)).astype(np.float32)
    plan = plan_windows((50, 41, 23), (16,) * 3)
    result = sliding_window(image, LinearEngine(IDENTITY), plan, 2)
    np.testing.assert_allclose(result, image, atol=1e-5)


def test_windows_without_brain_are_skipped_and_give_background() -> None:
    image = np.zeros((2, 64, 16, 16), np.float32)
    image[1, :4] = 1
    engine = LinearEngine(IDENTITY)
    result = sliding_window(image, engine, plan_windows((64, 16, 16), (16,) * 3, 0), 2)
    assert engine.calls == 1
    assert np.all(result[:, 16:] == 0)
    assert np.all(result.argmax(axis=0)[4:] == 0)
    assert np.all(result.argmax(axis=0)[:4] == 1)


def test_an_image_of_zeros_runs_no_window() -> None:
    engine = LinearEngine(IDENTITY)
    result = sliding_window(
        np.zeros((2, 9, 9, 9), np.float32), engine, WindowOptions(None).plan((9, 9, 9)), 2
    )
    assert engine.calls == 0
    assert result.shape == (2, 9, 9, 9)
    assert not result.any()


def test_the_full_window_is_one_pass_over_the_padded_image() -> None:
    image = np.random.default_rng(0).standard_normal((2, 33, 16, 7)).astype(np.float32)
    engine = LinearEngine(IDENTITY)
    plan = WindowOptions(None, window_multiple=16).plan(image.shape[1:])
    assert plan.padded_shape == (48, 16, 16)
    np.testing.assert_allclose(sliding_window(image, engine, plan, 2), image, atol=1e-6)
    assert engine.calls == 1


def test_progress_and_clock_are_told() -> None:
    shares: list[float] = []
    clock = StageClock()
    image = np.ones((2, 32, 16, 16), np.float32)
    plan = plan_windows((32, 16, 16), (16,) * 3, 0)
    sliding_window(image, LinearEngine(IDENTITY), plan, 2, shares.append, clock)
    assert shares == [0.5, 1]
    assert set(clock.elapsed_ms) == {"network", "blend"}


def test_logits_that_are_not_finite_are_an_error() -> None:
    engine = LinearEngine(np.array([[np.inf, 0], [0, 1]], np.float32))
    image = np.ones((2, 16, 16, 16), np.float32)
    with pytest.raises(EngineError, match="returned logits that are not finite in fp32"):
        sliding_window(image, engine, plan_windows((16,) * 3, (16,) * 3), 2)
