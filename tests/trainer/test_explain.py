from __future__ import annotations

import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image

from attnseg.data.task import BRATS
from attnseg.runtime.case.volume import Volume
from attnseg.runtime.errors import ConfigError
from attnseg.runtime.steps.windows import WindowOptions
from attnseg.trainer.explain import attention_weights, draw_weights, encode_weights_table
from attnseg.trainer.model import NetworkConfig
from attnseg.trainer.networks import build_network
from attnseg.trainer.preparation import Preparation
from tests.conftest import PLAIN

PREPARATION = Preparation(BRATS, PLAIN)
WINDOWS = WindowOptions((8, 8, 8), 0.0, 4)


@pytest.fixture
def volume() -> Volume:
    """A box of 16x8x8 voxels, so two windows of 8 voxels, of the four channels."""
    rng = np.random.default_rng(0)
    return Volume(rng.integers(1, 100, (4, 16, 8, 8)).astype(np.int16), np.diag([-1, -1, 1, 1]))


def constant_network(value: float) -> torch.nn.Module:
    """A network whose first stage gives `value` everywhere and whose second gives 0."""
    network = build_network(NetworkConfig(widths=(2, 4), bottleneck=4)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.encoder[0][0].project.bias.fill_(value)
    return network


def test_weights_are_the_sigmoid_of_the_mean_by_hand(volume: Volume) -> None:
    stages = attention_weights(constant_network(2.0), PREPARATION, WINDOWS, volume)
    assert [stage.stage for stage in stages] == [1, 2]
    assert [stage.weights.shape for stage in stages] == [(2, 2), (2, 4)]  # windows, channels
    np.testing.assert_allclose(stages[0].weights, 0.880797, atol=1e-6)  # sigmoid(2)
    np.testing.assert_allclose(stages[1].weights, 0.5)


@pytest.mark.parametrize("attention", ["se", "cbam"])
def test_learned_attention_has_weights_too(volume: Volume, attention: str) -> None:
    torch.manual_seed(0)
    config = NetworkConfig(widths=(16, 32), bottleneck=4, attention=attention)
    stages = attention_weights(build_network(config).eval(), PREPARATION, WINDOWS, volume)
    for stage in stages:
        assert ((stage.weights >= 0) & (stage.weights <= 1)).all()
        assert np.ptp(stage.weights, axis=1).min() > 0  # channels differ


def test_a_model_without_attention_is_refused(volume: Volume) -> None:
    network = build_network(NetworkConfig(widths=(2, 4), bottleneck=4, attention="none"))
    with pytest.raises(ConfigError, match="the model has no attention"):
        attention_weights(network, PREPARATION, WINDOWS, volume)


def test_the_table_and_the_picture_hold_every_stage(volume: Volume) -> None:
    stages = attention_weights(constant_network(2.0), PREPARATION, WINDOWS, volume)
    table = list(csv.DictReader(io.StringIO(encode_weights_table(stages).decode())))
    assert [(row["stage"], row["channel"]) for row in table] == [
        *(("1", str(c)) for c in range(2)),
        *(("2", str(c)) for c in range(4)),
    ]
    assert table[0]["mean"] == "0.88080"
    assert table[0]["windows"] == "2"
    assert Image.open(io.BytesIO(draw_weights(stages, "case"))).format == "PNG"
