from __future__ import annotations

import math

import pytest
import torch

from attnseg.runtime.errors import ConfigError
from attnseg.trainer.model import (
    MODELS,
    PRESETS,
    AttentionResNetUNet,
    GlobalAverageAttention,
    MultiScale,
    NetworkConfig,
    ResidualBlock,
    SqueezeExcitation,
)
from attnseg.trainer.networks import build_network, count_macs, count_parameters, empty_network


def test_the_paper_preset_has_the_designs_parameters_and_work() -> None:
    network = AttentionResNetUNet(PRESETS["paper"])
    assert round(count_parameters(network) / 1e6, 2) == 3.49
    assert round(count_macs(network, 64) / 1e9, 2) == 12.75


def test_wide16_has_widths_that_are_multiples_of_16() -> None:
    config = PRESETS["wide16"]
    assert all(width % 16 == 0 for width in (*config.widths, config.bottleneck))


def test_parameters_of_a_residual_block_by_hand() -> None:
    # Two 3x3x3 convolutions with bias, a batch norm, and a 1x1x1 projection.
    expected = (2 * 27 * 3 + 3) + 2 * 3 + (3 * 27 * 3 + 3) + (2 * 3 + 3)
    assert count_parameters(ResidualBlock(2, 3)) == expected


def test_macs_of_one_level_by_hand() -> None:
    config = NetworkConfig(1, 2, widths=(2,), bottleneck=2, attention="none", multi_scale=False)
    full, half = 8**3, 4**3
    encoder = full * (27 * 1 * 2 + 27 * 2 * 2 + 1 * 2) + full * 2 * (27 * 2 * 2)
    bottleneck = half * 2 * (27 * 2 * 2)
    decoder = half * (8 * 2 * 2) + full * (27 * 4 * 2 + 27 * 2 * 2 + 4 * 2)
    head = full * 2 * 2
    assert count_macs(AttentionResNetUNet(config), 8) == encoder + bottleneck + decoder + head


def test_a_residual_block_is_the_papers_formula() -> None:
    torch.manual_seed(0)
    block = ResidualBlock(3, 3).eval()
    h = torch.randn(1, 3, 5, 6, 7)
    inner = torch.relu(block.norm(block.conv1(h)))
    torch.testing.assert_close(block(h), h + torch.relu(block.conv2(inner)))


def test_gap_attention_is_the_papers_formula_by_hand() -> None:
    # Means 0 and 2: weights sigmoid(0) = 0.5 and sigmoid(2) = 0.8808.
    features = torch.stack([torch.tensor([-1.0, 1.0]), torch.tensor([1.0, 3.0])])
    result = GlobalAverageAttention()(features.view(1, 2, 2, 1, 1)).view(2, 2)
    expected = torch.tensor([[-0.5, 0.5], [0.880797, 2.642391]])
    torch.testing.assert_close(result, expected)
    assert count_parameters(GlobalAverageAttention()) == 0


def test_squeeze_excitation_weighs_each_channel_within_0_and_1() -> None:
    features = torch.ones(2, 8, 3, 3, 3)
    result = SqueezeExcitation(8)(features)
    assert result.shape == features.shape
    assert ((result > 0) & (result < 1)).all()
    assert (result.flatten(2).std(dim=2) < 1e-6).all()


def test_multi_scale_sees_four_voxels_far() -> None:
    module = MultiScale(1, 2).eval()
    for parameter in module.parameters():
        parameter.data.fill_(0.1)
    image = torch.zeros(1, 1, 11, 11, 11)
    touched = image.clone()
    touched[0, 0, 5, 5, 9] = 1
    changed = (module(touched) - module(image)).abs().sum(dim=1)[0] > 0
    assert changed[5, 5, 5]
    assert not changed[5, 5, 4]


@pytest.mark.parametrize("attention", ["gap", "se", "cbam", "none"])
@pytest.mark.parametrize("multi_scale", [True, False])
def test_each_variant_gives_logits_of_the_inputs_size(attention: str, multi_scale: bool) -> None:
    config = NetworkConfig(3, 5, (4, 8), 8, attention, multi_scale)
    result = AttentionResNetUNet(config)(torch.zeros(2, 3, 8, 12, 16))
    assert result.shape == (2, 5, 8, 12, 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widths": (3, 6)}, "widths must be even"),
        ({"widths": ()}, "widths must be even"),
        ({"classes": 1}, "classes >= 2"),
        (
            {"attention": "eca"},
            "attention: Input should be 'none', 'gap', 'se' or 'cbam', got 'eca'",
        ),
        ({"depth": 3}, "unknown network field depth"),
        ({"in_channels": 1.5}, "field in_channels: Input should be a valid integer, got 1.5"),
        ({"in_channels": 4.0}, "field in_channels: Input should be a valid integer, got 4.0"),
        ({"in_channels": True}, "field in_channels: Input should be a valid integer, got True"),
        ({"classes": "4"}, "field classes: Input should be a valid integer, got '4'"),
        ({"bottleneck": math.nan}, "field bottleneck: Input should be a valid integer, got nan"),
        ({"widths": [4, 8.0]}, r"field widths\.1: Input should be a valid integer, got 8.0"),
        ({"widths": 4}, "field widths: Input should be a valid array, got 4"),
        ({"multi_scale": 1}, "field multi_scale: Input should be a valid boolean, got 1"),
        ([], r"network configuration: Input should be an object, got \[\]"),
        ({"widths": b"ab"}, "network configuration is no plain data"),
        ({"in_channels": 20000}, "in_channels must be at most 16384, got 20000"),
    ],
)
def test_configurations_that_make_no_network_are_refused(fields: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NetworkConfig.from_dict(fields)


@pytest.mark.parametrize("config", [*MODELS.values(), *PRESETS.values()], ids=str)
def test_an_empty_network_has_the_layout_of_a_real_one_and_no_memory(config: NetworkConfig) -> None:
    empty = empty_network(config)
    stored, real = empty.state_dict(), build_network(config).state_dict()
    assert all(value.is_meta for value in stored.values())
    assert {n: v.shape for n, v in stored.items()} == {n: v.shape for n, v in real.items()}


def test_a_network_has_a_largest_number_of_parameters() -> None:
    """Two 3x3x3 convolutions of 10000 channels in the bottleneck alone have 2.7e9 weights."""
    huge = NetworkConfig(bottleneck=10000)
    for build in (build_network, empty_network):
        with pytest.raises(ConfigError, match="has 2736857814 parameters, more than 268435456"):
            build(huge)


def test_a_config_survives_its_dictionary() -> None:
    config = NetworkConfig(attention="se", widths=(4, 8))
    assert NetworkConfig.from_dict(config.to_dict()) == config
