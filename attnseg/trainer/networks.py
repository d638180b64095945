"""Networks from their configurations, and their cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from attnseg.runtime.errors import ConfigError, TrainingSetting
from attnseg.trainer.baselines import DeepMedic, UNet3d
from attnseg.trainer.model import AttentionResNetUNet, NetworkConfig, ResidualBlock
from attnseg.trainer.related import DeepLabV3, ResidualUNet, UNetPlusPlus
from attnseg.trainer.variants import Cost

Network = AttentionResNetUNet | UNet3d | DeepMedic | ResidualUNet | DeepLabV3 | UNetPlusPlus

_KINDS: dict[str, type[Network]] = {
    "attnresunet": AttentionResNetUNet,
    "unet3d": UNet3d,
    "deepmedic": DeepMedic,
    "residualunet": ResidualUNet,
    "deeplabv3": DeepLabV3,
    "unetplusplus": UNetPlusPlus,
}

LARGEST_NETWORK = 1 << 28
"""Largest number of parameters of a network, 1 GiB in fp32; the paper's has 3.6 million."""


def _new_network(config: NetworkConfig) -> Network:
    return _KINDS[config.architecture](config)


def empty_network(config: NetworkConfig) -> Network:
    """Build a network on PyTorch's `meta` device: its parameters have shapes and take no memory.

    Raises:
        ConfigError: It has more than `LARGEST_NETWORK` parameters.
    """
    with torch.device("meta"):
        network = _new_network(config)
    count = count_parameters(network)
    if count > LARGEST_NETWORK:
        raise ConfigError(
            f"the network has {count} parameters, more than {LARGEST_NETWORK}",
            "lower {} or {}",
            TrainingSetting("widths"),
            TrainingSetting("bottleneck"),
        )
    return network


@cache
def check_size(config: NetworkConfig) -> None:
    """Raise `ConfigError` for a network that `empty_network` refuses."""
    empty_network(config)


def build_network(config: NetworkConfig) -> Network:
    """Build a network with random weights; it has the attribute `config` and outputs logits.

    Raises:
        ConfigError: It has more than `LARGEST_NETWORK` parameters.
    """
    check_size(config)
    network = _new_network(config)
    _initialise(network)
    return network


def _initialise(network: Network) -> None:
    """Apply He initialisation (He 2015), which the paper does not state.

    PyTorch's default shrinks the output of each layer threefold, and with it the contribution of
    the deep stages.
    """
    for module in network.modules():
        if isinstance(module, nn.ConvTranspose3d):
            _fill(module, module.in_channels)  # kernel equals stride: a sum over channels only
        elif isinstance(module, nn.Conv3d) and module is not network.head:
            _fill(module, module.weight[0].numel() / 2)  # half of the inputs after a ReLU are 0
    for module in network.modules():
        if isinstance(module, ResidualBlock) and isinstance(module.project, nn.Conv3d):
            _fill(module.project, module.project.in_channels)  # no ReLU beside it


def _fill(layer: nn.Conv3d | nn.ConvTranspose3d, inputs: float) -> None:
    """Draw weights so that a sum over `inputs` values keeps their variance; zero the bias."""
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@contextmanager
def _count_macs_into(model: nn.Module, total: list[int]) -> Iterator[None]:
    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # A transposed convolution multiplies once per input voxel, a convolution per output voxel.
        voxels = inputs[0] if isinstance(layer, nn.ConvTranspose3d) else output
        total[0] += layer.weight.numel() * voxels[0, 0].numel()  # type: ignore[operator]

    layers = [m for m in model.modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def count_macs(model: Network, window: int = 64) -> int:
    """Count multiply-accumulates of all convolutions for one window of `window`**3 voxels."""
    total = [0]
    shape = (1, model.config.in_channels, window, window, window)
    with torch.no_grad(), _count_macs_into(model, total):
        model(torch.zeros(shape, device=next(model.parameters()).device))
    return total[0]


def cost_of(config: NetworkConfig) -> Cost:
    """Parameters in millions, and GMAC for one window of 64**3 voxels."""
    network = empty_network(config)  # which computes shapes alone
    return Cost(count_parameters(network) / 1e6, count_macs(network) / 1e9)
