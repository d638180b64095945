from __future__ import annotations

from dataclasses import replace

import pytest

from attnseg.data.task import BRATS
from attnseg.export.source.checkpoint import Description, _describe
from attnseg.trainer.model import MODELS, NetworkConfig

SPLEEN = replace(BRATS, description="Spleen (CT)")


@pytest.mark.parametrize(
    ("config", "name", "title"),
    [
        (NetworkConfig(), "attention-resnet-unet", "Attention-ResNetUNet"),
        (MODELS["resunet"], "resnet-unet", "ResNet-UNet"),
        (MODELS["unet3d"], "unet3d", "3-D U-Net"),
        (
            NetworkConfig(attention="se"),
            "attention-resnet-unet-se",
            "Attention-ResNetUNet with attention se and with the multi-scale module",
        ),
    ],
)
def test_a_model_is_named_by_its_data_set_and_its_architecture(
    config: NetworkConfig, name: str, title: str
) -> None:
    found = _describe(config, SPLEEN)
    assert found == Description(f"spleen-ct-{name}", f"{title} for Spleen (CT)")
    assert _describe(config, BRATS).name == f"brats-brain-tumours-{name}"
    assert _describe(config, replace(BRATS, description="")) == Description(name, title)
