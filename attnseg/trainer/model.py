"""AttentionResNetUNet: residual encoder, attention on the skips, multi-scale decoder.

Source: the Attention-ResNetUNet paper, section 3.1. The paper prints neither widths nor
strides in full; the widths here are reconstructed so that parameters (3.47 M) and work
(12.61 GMAC for 4x64x64x64) come nearest to its totals (3.6 M and 13.1 G). Say so wherever
one of these numbers is quoted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from attnseg.runtime.errors import ConfigError

Attention = Literal["gap", "se", "none"]


@dataclass(frozen=True)
class NetworkConfig:
    """Every choice that shapes the network.

    Attributes:
        in_channels: modalities, the C of a `(B, C, X, Y, Z)` batch.
        classes: output classes, background included.
        widths: channels of the encoder stages, first to last.
        bottleneck: channels of the residual block below the last stage.
        attention: weight of each skip: `gap` is the paper's formula, without parameters;
            `se` is squeeze-and-excitation (Hu 2018), reduction 4; `none` passes it on.
        multi_scale: dilated convolutions in the decoder, else a residual block.
    """

    in_channels: int = 4
    classes: int = 4
    widths: tuple[int, ...] = (12, 24, 48, 96)
    bottleneck: int = 160
    attention: Attention = "gap"
    multi_scale: bool = True

    def __post_init__(self) -> None:
        if self.in_channels < 1 or self.classes < 2:
            raise ConfigError(
                f"a network needs in_channels >= 1 and classes >= 2 (background included), "
                f"got {self.in_channels} and {self.classes}"
            )
        if not self.widths or any(w < 2 or w % 2 for w in self.widths) or self.bottleneck < 1:
            raise ConfigError(
                "widths must be even and at least 2 (each is halved in the decoder) and bottleneck "
                f"at least 1, got widths {self.widths}, bottleneck {self.bottleneck}"
            )
        if self.attention not in get_args(Attention):
            raise ConfigError(
                f"attention must be one of {', '.join(get_args(Attention))}, got {self.attention!r}"
            )

    @property
    def stride(self) -> int:
        """Factor that each spatial size must be a multiple of, in voxels."""
        return 1 << len(self.widths)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in checkpoints and manifests."""
        return {**asdict(self), "widths": list(self.widths)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> NetworkConfig:
        """Inverse of `to_dict`. Raises `ConfigError` for fields that do not exist."""
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise ConfigError(f"unknown network field {', '.join(unknown)}")
        return cls(**{**values, "widths": tuple(values.get("widths", cls.widths))})


PRESETS: dict[str, NetworkConfig] = {
    "paper": NetworkConfig(),
    # Tensor cores and AMX pad channels to multiples of 16, so this costs about 5 % more time.
    "wide16": NetworkConfig(widths=(16, 32, 64, 128), bottleneck=192),
}


def _conv(channels_in: int, channels_out: int, kernel: int = 3, dilation: int = 1) -> nn.Conv3d:
    padding = dilation * (kernel // 2)
    return nn.Conv3d(channels_in, channels_out, kernel, padding=padding, dilation=dilation)


class ResidualBlock(nn.Module):
    """`h + ReLU(W2 * ReLU(BN(W1 * h + b1)) + b2)`, `h` projected where channels change."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels_in, channels_out)
        self.norm = nn.BatchNorm3d(channels_out)
        self.conv2 = _conv(channels_out, channels_out)
        self.project = (
            nn.Identity() if channels_in == channels_out else _conv(channels_in, channels_out, 1)
        )

    def forward(self, h: Tensor) -> Tensor:
        """`(B, channels_in, X, Y, Z)` to `(B, channels_out, X, Y, Z)`."""
        residual = torch.relu(self.conv2(torch.relu(self.norm(self.conv1(h)))))
        projected: Tensor = self.project(h)
        return projected + residual


class GlobalAverageAttention(nn.Module):
    """`F_k * sigmoid(mean over space of F_k)`: the paper's formula, without parameters."""

    def forward(self, features: Tensor) -> Tensor:
        """`(B, C, X, Y, Z)` to the same shape, each channel weighted."""
        return features * torch.sigmoid(features.mean(dim=(2, 3, 4), keepdim=True))


class SqueezeExcitation(nn.Module):
    """Squeeze-and-excitation (Hu, Shen and Sun 2018) with reduction 4."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.squeeze = _conv(channels, hidden, 1)
        self.excite = _conv(hidden, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """`(B, C, X, Y, Z)` to the same shape, each channel weighted."""
        pooled = features.mean(dim=(2, 3, 4), keepdim=True)
        return features * torch.sigmoid(self.excite(torch.relu(self.squeeze(pooled))))


def _attention(kind: Attention, channels: int) -> nn.Module:
    if kind == "gap":
        return GlobalAverageAttention()
    return SqueezeExcitation(channels) if kind == "se" else nn.Identity()


class MultiScale(nn.Module):
    """Parallel 3x3x3 convolutions of dilation 1, 2 and 4, fused by 1x1x1."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        half = channels_out // 2
        self.branches = nn.ModuleList(_conv(channels_in, half, dilation=d) for d in (1, 2, 4))
        self.norm = nn.BatchNorm3d(3 * half)
        self.fuse = _conv(3 * half, channels_out, 1)

    def forward(self, h: Tensor) -> Tensor:
        """`(B, channels_in, X, Y, Z)` to `(B, channels_out, X, Y, Z)`."""
        scales = torch.cat([branch(h) for branch in self.branches], dim=1)
        return torch.relu(self.fuse(torch.relu(self.norm(scales))))


class DecoderStage(nn.Module):
    """Upsample by a transposed convolution, join the weighted skip, refine."""

    def __init__(self, channels_in: int, channels_out: int, config: NetworkConfig) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(channels_in, channels_out, 2, stride=2)
        self.attention = _attention(config.attention, channels_out)
        refine = MultiScale if config.multi_scale else ResidualBlock
        self.refine = refine(2 * channels_out, channels_out)

    def forward(self, h: Tensor, skip: Tensor) -> Tensor:
        """`h` at half the size of `skip`; returns the size and channels of `skip`."""
        refined: Tensor = self.refine(torch.cat([self.up(h), self.attention(skip)], dim=1))
        return refined


class AttentionResNetUNet(nn.Module):
    """The network of the paper's section 3.1. Outputs logits, not probabilities."""

    def __init__(self, config: NetworkConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or NetworkConfig()
        stages = zip((config.in_channels, *config.widths), config.widths, strict=False)
        self.encoder = nn.ModuleList(
            nn.Sequential(ResidualBlock(c_in, c_out), ResidualBlock(c_out, c_out))
            for c_in, c_out in stages
        )
        self.pool = nn.MaxPool3d(2)
        self.bottleneck = ResidualBlock(config.widths[-1], config.bottleneck)
        upward = tuple(reversed(config.widths))
        self.decoder = nn.ModuleList(
            DecoderStage(c_in, c_out, config)
            for c_in, c_out in zip((config.bottleneck, *upward), upward, strict=False)
        )
        self.head = _conv(config.widths[0], config.classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Image `(B, in_channels, X, Y, Z)` to logits `(B, classes, X, Y, Z)`.

        X, Y and Z must be multiples of `config.stride`.
        """
        skips = []
        h = image
        for stage in self.encoder:
            h = stage(h)
            skips.append(h)
            h = self.pool(h)
        h = self.bottleneck(h)
        for stage, skip in zip(self.decoder, reversed(skips), strict=True):
            h = stage(h, skip)
        logits: Tensor = self.head(h)
        return logits


def count_parameters(model: nn.Module) -> int:
    """Number of trainable values."""
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


def count_macs(model: AttentionResNetUNet, window: int = 64) -> int:
    """Multiply-accumulates of all convolutions for one cubic window of `window` voxels."""
    total = [0]
    with torch.no_grad(), _count_macs_into(model, total):
        model(torch.zeros(1, model.config.in_channels, window, window, window))
    return total[0]
