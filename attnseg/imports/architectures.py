"""Networks that the plans of nnU-Net name, built from `dynamic-network-architectures`.

Plans name classes; only those listed here are looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from attnseg.runtime.errors import ConfigError

_MODULES = "dynamic_network_architectures.architectures"
_NETWORKS = {
    "PlainConvUNet": (f"{_MODULES}.unet.PlainConvUNet", "PlainConvUNet"),
    "ResidualEncoderUNet": (
        f"{_MODULES}.unet.ResidualEncoderUNet",
        f"{_MODULES}.residual_unet.ResidualEncoderUNet",  # where nnU-Net 2.8.1 looks for it
        "ResidualEncoderUNet",
    ),
}
"""Classes of `unet`, and the names that plans give them; those until 2.4 have no path."""
_LAYERS: dict[str, type[nn.Module]] = {
    name: kind
    for kind in (
        nn.Conv3d,
        nn.InstanceNorm3d,
        nn.BatchNorm3d,
        nn.Dropout3d,
        nn.LeakyReLU,
        nn.ReLU,
        nn.GELU,
        nn.SiLU,
    )
    for name in (f"torch.nn.{kind.__name__}", f"{kind.__module__}.{kind.__name__}")
}
"""Layers by the paths that plans name them by."""
_COUNTS = ("n_conv_per_stage", "n_blocks_per_stage", "n_conv_per_stage_decoder")
_MOST_STAGES, _MOST_CHANNELS = 64, 1 << 14
_PLANS_UNTIL_2_4 = {
    "PlainConvUNet": "n_conv_per_stage",
    "ResidualEncoderUNet": "n_blocks_per_stage",
}


def strides_of(settings: dict[str, Any]) -> Sequence[Sequence[int]]:
    """Strides of each stage along the axes of an image."""
    strides: Sequence[Sequence[int]] = _architecture(settings)[1]["strides"]
    return strides


def _architecture(settings: dict[str, Any]) -> tuple[str, dict[str, Any], Sequence[str]]:
    """Class, arguments, and the names of the arguments that are classes."""
    if "architecture" in settings:
        found = settings["architecture"]
        return (
            str(found["network_class_name"]),
            dict(found["arch_kwargs"]),
            list(found["_kw_requires_import"]),
        )
    name = str(settings["UNet_class_name"])  # plans of nnU-Net before 2.5
    stages = len(settings["n_conv_per_stage_encoder"])
    first, most = settings["UNet_base_num_features"], settings["unet_max_num_features"]
    arguments = {
        "n_stages": stages,
        "features_per_stage": [min(first * 2**stage, most) for stage in range(stages)],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": settings["conv_kernel_sizes"],
        "strides": settings["pool_op_kernel_sizes"],
        _PLANS_UNTIL_2_4.get(name, "n_conv_per_stage"): settings["n_conv_per_stage_encoder"],
        "n_conv_per_stage_decoder": settings["n_conv_per_stage_decoder"],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return name, arguments, ["conv_op", "norm_op", "nonlin"]


def build_nnunet(settings: dict[str, Any], trainer: str, channels: int, outputs: int) -> nn.Module:
    """Build the network of a configuration, without deep supervision, and without weights.

    Its parameters are on PyTorch's `meta` device until weights are assigned.

    Args:
        settings: Configuration of the plans.
        trainer: Name of the trainer; `nnUNetTrainerBN` replaces the norms.
        channels: Number of input channels.
        outputs: Number of output channels.

    Raises:
        ConfigError: The plans name a network or a layer that is not listed here, or arguments that
            the network does not take; the message does not name the file.
    """
    from dynamic_network_architectures.architectures import unet

    name, arguments, layers = _architecture(settings)
    kind = next((kind for kind, names in _NETWORKS.items() if name in names), None)
    if kind is None:
        raise ConfigError(
            f"the plans' network is {name}, a custom network",
            f"import models with {' or '.join(_NETWORKS)}",
        )
    for argument in layers:
        given = arguments.get(argument)
        if given is not None:
            arguments[argument] = _layer(str(given))
    if trainer == "nnUNetTrainerBN":
        arguments |= {"norm_op": nn.BatchNorm3d, "norm_op_kwargs": {"eps": 1e-05, "affine": True}}
    _check_size(arguments)
    try:
        with torch.device("meta"):
            network: nn.Module = getattr(unet, kind)(
                input_channels=channels, num_classes=outputs, **arguments, deep_supervision=False
            )
    except Exception as error:  # whatever the arguments lead to
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(
            f"the plans' network cannot be built ({reason})", "give the plans of its training"
        ) from error
    return network


def _check_size(arguments: dict[str, Any]) -> None:
    """Refuse arguments that make a network of more layers or channels than any has."""
    left: list[Any] = list(arguments.values())
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple):
            if len(value) > _MOST_STAGES:
                raise _too_large(f"{len(value)} stages", _MOST_STAGES)
            left += value
        elif isinstance(value, int) and abs(value) > _MOST_CHANNELS:
            raise _too_large(f"a layer of {value} channels", _MOST_CHANNELS)
    for name in ("n_stages", *_COUNTS):
        counts = arguments.get(name, 0)
        for count in counts if isinstance(counts, list | tuple) else [counts]:
            if isinstance(count, int) and count > _MOST_STAGES:
                raise _too_large(f"{name} {count}", _MOST_STAGES)


def _too_large(what: str, most: int) -> ConfigError:
    return ConfigError(
        f"the plans' network has {what}, more than {most}", "give the plans of its training"
    )


def _layer(name: str) -> type[nn.Module]:
    if name not in _LAYERS:
        raise ConfigError(
            f"the plans name the layer {name}, which is unknown",
            f"import models with {', '.join(own for own in _LAYERS if own.count('.') == 2)}",
        )
    return _LAYERS[name]
