from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attnseg.data.task import BRATS
from attnseg.export.source.checkpoint import (
    Description,
    _describe,
    encode_weights,
    load_trained,
)
from attnseg.runtime.errors import TrainingError
from attnseg.runtime.model.bundle import default_folder
from attnseg.trainer.model import MODELS, NetworkConfig
from attnseg.trainer.networks import build_network

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


def test_no_changed_byte_of_a_weights_file_changes_its_weights(tmp_path: Path) -> None:
    shipped = load_trained(default_folder() / "weights.safetensors")
    small = build_network(NetworkConfig(widths=(2, 4), bottleneck=4)).eval()
    stored = encode_weights(replace(shipped, network=small))
    path = tmp_path / "weights.safetensors"
    path.write_bytes(stored)
    expected = load_trained(path).network.state_dict()
    start = 8 + int.from_bytes(stored[:8], "little")  # of the tensors
    for place in [*range(0, start, 97), *range(start, len(stored), 31)]:
        path.write_bytes(stored[:place] + bytes([stored[place] ^ 0x55]) + stored[place + 1 :])
        try:
            found = load_trained(path).network.state_dict()
        except TrainingError:
            continue
        assert place < start  # a word of the metadata
        assert all(torch.equal(found[name], expected[name]) for name in expected)
