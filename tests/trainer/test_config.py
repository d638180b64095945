from __future__ import annotations

import json

import pytest

from attnseg.runtime.errors import ConfigError
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.model import MODELS


def test_the_defaults_are_the_papers_protocol() -> None:
    config = TrainConfig()
    assert (config.learning_rate, config.weight_decay) == (3e-4, 5e-5)
    assert (config.schedule, config.patience, config.factor) == ("plateau", 4, 0.5)
    assert (config.batch_size, config.epochs, config.patch) == (2, 200, 64)
    assert (config.cross_entropy_weight, config.dice_epsilon) == (0.5, 1e-6)
    assert (config.rotation_degrees, config.elastic_spacing_voxels) == (10, 20)
    assert (config.intensity_scale, config.gamma) == (0.1, (0.8, 1.2))
    assert config.histogram_matching
    assert (config.resize, config.spacing_mm, config.folds, config.clip_norm) == ((), (), 0, 0)


def test_fields_are_set_from_text() -> None:
    text = {"learning_rate": "1e-3", "epochs": "7", "mirror": "true", "gamma": "0.7,1.5"}
    config = TrainConfig().with_settings({**text, "schedule": "cosine"})
    assert (config.learning_rate, config.epochs, config.mirror) == (1e-3, 7, True)
    assert (config.gamma, config.schedule) == ((0.7, 1.5), "cosine")
    assert TrainConfig().with_settings({"resize": "192,192,128"}).resize == (192, 192, 128)
    assert TrainConfig().with_settings({"spacing_mm": "1,1,2.5"}).spacing_mm == (1, 1, 2.5)
    assert config.with_settings({"gamma": "1,1"}).with_settings({"resize": ""}).resize == ()


def test_the_networks_own_fields_are_set_alike() -> None:
    text = {"widths": "4,8", "bottleneck": "8", "attention": "cbam", "multi_scale": "false"}
    network = TrainConfig().with_settings(text).network
    assert (network.widths, network.bottleneck) == ((4, 8), 8)
    assert (network.attention, network.multi_scale) == ("cbam", False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"zzz": "3"}, "unknown training field zzz; choose augmentation, .*widths"),
        ({"epoch": "3"}, "unknown training field epoch; choose epochs$"),
        ({"network": "x"}, "unknown training field network"),
        ({"epochs": "many"}, "epochs=many: expected a value such as 200"),
        ({"mirror": "yes"}, "mirror=yes: expected a value such as true or false"),
        ({"epochs": "0"}, "epochs must be at least 1, got 0"),
        ({"patch": "60"}, "patch must be a multiple of 16 from 32 to 256, got 60"),
        ({"patch": "16"}, "patch must be a multiple of 16 from 32 to 256, got 16"),
        ({"patch": "272"}, "patch must be a multiple of 16 from 32 to 256, got 272"),
        ({"batch_size": "1025"}, "batch_size must be .* at most 268435456 voxels, got 1025"),
        (
            {"seed": str(2**63)},
            r"seed must be at least 0 and below 2\*\*63, got 9223372036854775808",
        ),
        (
            {"bottleneck": "10000"},
            "the network has 2736857814 parameters, more than 268435456; lower widths or bott",
        ),
        ({"bottleneck": "20000"}, "bottleneck must be at most 16384, got 20000"),
        ({"widths": "4,20000"}, "widths must be at most 16384, got 20000"),
        ({"widths": "2,2,2,2,2,2,2,2,2"}, "widths must name at most 8 stages, got 9"),
        ({"tumour_share": "2"}, "tumour_share must be within 0 and 1"),
        ({"schedule": "step"}, "schedule must be plateau or cosine, got 'step'"),
        ({"gamma": "2,1"}, "gamma must be two ascending"),
        ({"gamma": "0.8"}, "gamma must be two ascending"),
        ({"precision": "fp8"}, "precision must be bf16 or fp16 or fp32, got 'fp8'"),
        ({"seed": "-1"}, "seed must be at least 0"),
        ({"factor": "2"}, "factor must be above 0 and below 1"),
        ({"weight_decay": "-1"}, "weight_decay must be at least 0"),
        ({"learning_rate": "inf"}, "learning_rate must be positive and finite"),
        ({"elastic_spacing_voxels": "0"}, "elastic_spacing_voxels must be at least 1"),
        (
            {"resize": "10,10"},
            r"resize must be three numbers of voxels, .*, or empty, got \(10, 10\)",
        ),
        ({"resize": "2000,2000,2000"}, "resize must be three numbers of voxels, at most 268435456"),
        ({"resize": "10,10,1"}, "resize must be three numbers of voxels"),
        ({"resize": "9.5,9,9"}, "resize=9.5,9,9: expected a value such as 192,192,128"),
        ({"spacing_mm": "1,1"}, "spacing_mm must be three positive numbers"),
        ({"spacing_mm": "1,1,0"}, "spacing_mm must be three positive numbers"),
        ({"spacing_mm": "1,1,nan"}, "spacing_mm must be three positive numbers"),
        ({"spacing_mm": "1,1,1", "resize": "9,9,9"}, "and not given with resize"),
        ({"foreground": "skin"}, "foreground must be task, nonzero or all, got 'skin'"),
        ({"clip_norm": "-1"}, "clip_norm must be at least 0 and finite, got -1"),
        ({"folds": "1"}, "folds must be 0, or at least 2, got 1"),
        ({"folds": "5", "fold": "5"}, "fold must be at least 0 and below folds, got 5"),
        ({"fold": "1"}, "fold must be at least 0 and below folds, got 1"),
        ({"widths": "3,6"}, "widths must be even"),
        ({"widths": "4,wide"}, "widths=4,wide: expected a value such as 12,24,48,96$"),
        ({"attention": "eca"}, "attention must be one of none, gap, se, cbam"),
        ({"in_channels": "3"}, "unknown training field in_channels"),
        ({"steps_per_epoch": "-5"}, "steps_per_epoch must be at least 0"),
    ],
    ids=str,
)
def test_values_that_are_not_allowed_are_refused(text: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig().with_settings(text)


def test_a_config_survives_its_dictionary() -> None:
    for config in (
        TrainConfig(gamma=(0.9, 1.1), mirror=True, folds=5, fold=4),
        TrainConfig(resize=(32, 48, 32), network=MODELS["unet3d"]),
        TrainConfig(spacing_mm=(1.0, 1.0, 2.5), precision="fp16", foreground="all"),
    ):
        stored = json.loads(json.dumps(config.to_dict()))
        assert TrainConfig.from_dict(stored) == config
    with pytest.raises(ConfigError, match="unknown training field colour"):
        TrainConfig.from_dict({"colour": "red"})


def test_an_empty_value_takes_a_list_back_to_none() -> None:
    config = TrainConfig().with_settings({"resize": "64,64,64"})
    assert config.with_settings({"resize": ""}).resize == ()
    with pytest.raises(ConfigError, match="epochs=: expected a value such as 200"):
        config.with_settings({"epochs": ""})
