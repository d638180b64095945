"""AttentionResNetUNet: residual encoder, attention on the skips, multi-scale decoder.

Source: the Attention-ResNetUNet paper, section 3.1. The paper states neither widths nor
strides in full; the widths here are reconstructed so that parameters (3.49 M) and cost
(12.75 GMAC for 4x64x64x64) come closest to its totals (3.6 M and 13.1 G). Say so wherever
one of these numbers is quoted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from attnseg.runtime.errors import ConfigError
from attnseg.trainer.decode import STORED, decode_config

Architecture = Literal[
    "attnresunet", "unet3d", "deepmedic", "residualunet", "deeplabv3", "unetplusplus"
]
Attention = Literal["none", "gap", "se", "cbam"]
_MOST_CHANNELS = 1 << 14  # of a layer
_MOST_STAGES = 8


@dataclass(frozen=True)
class NetworkConfig:
    """Architecture of a network.

    Attributes:
        in_channels: Number of modalities, the C of a `(B, C, X, Y, Z)` batch.
        classes: Number of output classes, including the background.
        widths: Channels of the encoder stages, first to last; for `deepmedic`, channels of the
            eight layers of each pathway.
        bottleneck: Channels below the last stage; for `deepmedic`, channels of its two 1x1x1
            layers, for `deeplabv3`, channels of each branch of its pyramid.
        attention: Attention on the skip connections: `gap` is the paper's formula, without
            parameters; `se` is squeeze-and-excitation (Hu 2018) and `cbam` the convolutional
            block attention module (Woo 2018), both with reduction 4; `none` is the identity.
        multi_scale: Whether the decoder has dilated convolutions instead of residual blocks.
        architecture: `attnresunet` for the network of this module; `unet3d` and `deepmedic` are
            the baselines of `attnseg.trainer.baselines`, the others those of
            `attnseg.trainer.related`.
    """

    __pydantic_config__ = STORED

    in_channels: int = 4
    classes: int = 4
    widths: tuple[int, ...] = (12, 24, 48, 96)
    bottleneck: int = 160
    attention: Attention = "gap"
    multi_scale: bool = True
    architecture: Architecture = "attnresunet"

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
        sizes = {n: getattr(self, n) for n in ("in_channels", "classes", "bottleneck")}
        for name, size in {**sizes, "widths": max(self.widths)}.items():
            if size > _MOST_CHANNELS:
                raise ConfigError(f"{name} must be at most {_MOST_CHANNELS}, got {size}")
        if len(self.widths) > _MOST_STAGES:
            raise ConfigError(
                f"widths must name at most {_MOST_STAGES} stages, got {len(self.widths)}"
            )
        for name, choices in (("architecture", Architecture), ("attention", Attention)):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(
                    f"{name} must be one of {', '.join(get_args(choices))}, "
                    f"got {getattr(self, name)!r}"
                )
        plain = self.attention == "none" and not self.multi_scale
        if self.architecture != "attnresunet" and not plain:
            raise ConfigError(
                f"{self.architecture} has no attention and no multi-scale module", "leave them out"
            )
        if self.architecture == "deepmedic" and len(self.widths) != 8:
            raise ConfigError(f"deepmedic needs 8 widths, got {self.widths}")
        if self.architecture == "unetplusplus" and len(self.widths) != 4:
            raise ConfigError(f"unetplusplus needs 4 widths, got {self.widths}")

    @property
    def stride(self) -> int:
        """Number of voxels that each spatial size must be a multiple of."""
        return 4 if self.architecture == "deepmedic" else 1 << len(self.widths)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as stored in checkpoints and manifests."""
        return {**asdict(self), "widths": list(self.widths)}

    @classmethod
    def from_dict(cls, values: object) -> NetworkConfig:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: A field does not exist, or its value is of another type or breaks a rule.
        """
        return decode_config(cls, values, "network")


PRESETS: dict[str, NetworkConfig] = {
    "paper": NetworkConfig(),
    # Tensor cores and AMX pad channels to multiples of 16, so this costs about 5 % more time.
    "wide16": NetworkConfig(widths=(16, 32, 64, 128), bottleneck=192),
}


def _other(architecture: Architecture, widths: tuple[int, ...], bottleneck: int) -> NetworkConfig:
    return NetworkConfig(
        widths=widths,
        bottleneck=bottleneck,
        attention="none",
        multi_scale=False,
        architecture=architecture,
    )


# Rows of the paper's table and systems of its related work. It states no sizes for others than its
# own: their widths are scaled so that a window costs about as much as in its network (12.6 GMAC).
MODELS: dict[str, NetworkConfig] = {
    "unet3d": _other("unet3d", (16, 32, 64), 128),
    "deepmedic": _other("deepmedic", (12, 12, 14, 14, 14, 14, 18, 18), 54),
    "residualunet": _other("residualunet", (14, 28, 56), 112),
    "deeplabv3": _other("deeplabv3", (16, 32, 64), 160),
    "unetplusplus": _other("unetplusplus", (8, 16, 32, 64), 96),
    "resunet": NetworkConfig(attention="none", multi_scale=False),
    "attnresunet": NetworkConfig(),
}

RELATED: dict[str, str] = {
    "residualunet": "Residual U-Net",
    "deeplabv3": "DeepLab-V3",
    "unetplusplus": "U-Net++",
}
"""Titles of the networks of the paper's related work, which its table of results does not have."""


class DilatedConv(nn.Conv3d):
    """A dilated 3x3x3 convolution that trains at full speed on a CPU.

    oneDNN takes three times as long for the gradient of a dilated convolution. When training
    on a CPU, dilation d is therefore computed as d**3 plain convolutions on interleaved grids,
    which are the same sums (space-to-batch; Chen 2017, "Rethinking atrous convolution",
    section 3.1).
    """

    def forward(self, h: Tensor) -> Tensor:
        """`(B, in_channels, X, Y, Z)` to `(B, out_channels, X, Y, Z)`."""
        d = self.dilation[0]
        # On 2x2x2 grids, oneDNN's bfloat16 weight gradient is wrong (torch 2.13).
        fits = all(n % d == 0 and n // d >= 4 for n in h.shape[2:])
        if not (self.training and fits and h.device.type == "cpu"):
            return super().forward(h)
        b, x, y, z, c = h.movedim(1, -1).shape
        grids = (b, x // d, d, y // d, d, z // d, d, c)
        apart = h.movedim(1, -1).reshape(grids).permute((0, 2, 4, 6, 1, 3, 5, 7))
        apart = apart.reshape((b * d**3, x // d, y // d, z // d, c)).movedim(-1, 1)
        out = nn.functional.conv3d(apart, self.weight, self.bias, padding=1).movedim(1, -1)
        together = out.reshape((b, d, d, d, x // d, y // d, z // d, -1))
        together = together.permute((0, 4, 1, 5, 2, 6, 3, 7)).reshape((b, x, y, z, -1))
        return together.movedim(-1, 1)


def network_settings(model: str | None, preset: str | None) -> NetworkConfig:
    """Return the network of a row of the paper's table, or of a preset of its own model.

    Args:
        model: Key of `MODELS`; None for `attnresunet`.
        preset: Key of `PRESETS`; None for the default widths.

    Raises:
        ConfigError: A name does not exist, or model and preset contradict each other.
    """
    for what, name, choices in (("model", model, MODELS), ("preset", preset, PRESETS)):
        if name is not None and name not in choices:
            raise ConfigError(f"{what} {name} does not exist", f"choose {', '.join(choices)}")
    if preset is None:
        return MODELS[model or "attnresunet"]
    if model not in (None, "attnresunet"):
        raise ConfigError(f"preset {preset} is for attnresunet, not for {model}", "leave one out")
    return PRESETS[preset]


def _conv(channels_in: int, channels_out: int, kernel: int = 3, dilation: int = 1) -> nn.Conv3d:
    padding = dilation * (kernel // 2)
    kind = nn.Conv3d if dilation == 1 else DilatedConv
    return kind(channels_in, channels_out, kernel, padding=padding, dilation=dilation)


class ResidualBlock(nn.Module):
    """`h + ReLU(W2 * ReLU(BN(W1 * h + b1)) + b2)`; `h` is projected if the channels change."""

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

    def weights(self, features: Tensor) -> Tensor:
        """Weight of each channel, `(B, C, 1, 1, 1)`."""
        return torch.sigmoid(features.mean(dim=(2, 3, 4), keepdim=True))

    def forward(self, features: Tensor) -> Tensor:
        """`(B, C, X, Y, Z)` to the same shape, each channel weighted."""
        return features * self.weights(features)


class SqueezeExcitation(nn.Module):
    """Squeeze-and-excitation (Hu, Shen and Sun 2018) with reduction 4."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.squeeze = _conv(channels, hidden, 1)
        self.excite = _conv(hidden, channels, 1)

    def weights(self, features: Tensor) -> Tensor:
        """Weight of each channel, `(B, C, 1, 1, 1)`."""
        pooled = features.mean(dim=(2, 3, 4), keepdim=True)
        return torch.sigmoid(self.excite(torch.relu(self.squeeze(pooled))))

    def forward(self, features: Tensor) -> Tensor:
        """`(B, C, X, Y, Z)` to the same shape, each channel weighted."""
        return features * self.weights(features)


class Cbam(nn.Module):
    """Convolutional block attention module (Woo 2018): first channel, then spatial attention."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.squeeze = _conv(channels, hidden, 1)
        self.excite = _conv(hidden, channels, 1)
        self.spatial = _conv(2, 1, 7)

    def _channel_logits(self, pooled: Tensor) -> Tensor:
        logits: Tensor = self.excite(torch.relu(self.squeeze(pooled)))
        return logits

    def weights(self, features: Tensor) -> Tensor:
        """Weight of each channel, `(B, C, 1, 1, 1)`."""
        space = (2, 3, 4)
        mean, peak = features.mean(space, keepdim=True), features.amax(space, keepdim=True)
        return torch.sigmoid(self._channel_logits(mean) + self._channel_logits(peak))

    def forward(self, features: Tensor) -> Tensor:
        """`(B, C, X, Y, Z)` to the same shape, each channel and each voxel weighted."""
        features = features * self.weights(features)
        along = torch.cat([features.mean(1, keepdim=True), features.amax(1, keepdim=True)], dim=1)
        return features * torch.sigmoid(self.spatial(along))


def _attention(kind: Attention, channels: int) -> nn.Module:
    if kind == "gap":
        return GlobalAverageAttention()
    if kind == "se":
        return SqueezeExcitation(channels)
    return Cbam(channels) if kind == "cbam" else nn.Identity()


class MultiScale(nn.Module):
    """Parallel 3x3x3 convolutions with dilation 1, 2 and 4, fused by 1x1x1 and added to `h`.

    The paper does not mention the sum. Without it the network learns far more slowly
    (docs/results.md), and the residual block that the module replaces has one.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        half = channels_out // 2
        self.branches = nn.ModuleList(_conv(channels_in, half, dilation=d) for d in (1, 2, 4))
        self.norm = nn.BatchNorm3d(3 * half)
        self.fuse = _conv(3 * half, channels_out, 1)
        self.project = _conv(channels_in, channels_out, 1)

    def forward(self, h: Tensor) -> Tensor:
        """`(B, channels_in, X, Y, Z)` to `(B, channels_out, X, Y, Z)`."""
        scales = torch.cat([branch(h) for branch in self.branches], dim=1)
        projected: Tensor = self.project(h)
        return projected + torch.relu(self.fuse(torch.relu(self.norm(scales))))


class DecoderStage(nn.Module):
    """Upsample by a transposed convolution, concatenate the weighted skip, refine."""

    def __init__(self, channels_in: int, channels_out: int, config: NetworkConfig) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(channels_in, channels_out, 2, stride=2)
        self.attention = _attention(config.attention, channels_out)
        refine = MultiScale if config.multi_scale else ResidualBlock
        self.refine = refine(2 * channels_out, channels_out)

    def forward(self, h: Tensor, skip: Tensor) -> Tensor:
        """`h` at half the size of `skip` to a tensor of the shape of `skip`."""
        refined: Tensor = self.refine(torch.cat([self.up(h), self.attention(skip)], dim=1))
        return refined


def encode(
    image: Tensor, stages: Iterable[nn.Module], pool: nn.Module
) -> tuple[list[Tensor], Tensor]:
    """Return the output of each encoder stage, first to last, and the last one pooled."""
    skips = []
    h = image
    for stage in stages:
        h = stage(h)
        skips.append(h)
        h = pool(h)
    return skips, h


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
        skips, h = encode(image, self.encoder, self.pool)
        h = self.bottleneck(h)
        for stage, skip in zip(self.decoder, reversed(skips), strict=True):
            h = stage(h, skip)
        logits: Tensor = self.head(h)
        return logits
