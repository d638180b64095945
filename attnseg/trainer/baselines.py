"""The networks that the paper compares with, built from the same configuration.

- `UNet3d`: Cicek et al., "3D U-Net: learning dense volumetric segmentation from sparse
  annotation" (MICCAI 2016), with padded convolutions. At their widths (64, 128, 256 and 512)
  it has the 19 069 955 parameters that they state, a count that excludes the batch norms
  and the biases of the transposed convolutions.
- `DeepMedic`: Kamnitsas et al., "Efficient multi-scale 3D CNN with fully connected CRF"
  (Medical Image Analysis 2017): two pathways of eight 3x3x3 layers, one of them on a coarser
  image, two 1x1x1 layers and the classifier: eleven layers. The original shrinks its patch and
  subsamples by 3; this one pads and averages by 4, so it accepts the same windows as the others.

The third network, ResNet-UNet, is `AttentionResNetUNet` without attention and multi-scale module.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnseg.trainer.model import NetworkConfig, encode

_COARSE = 4  # voxels averaged along each axis for DeepMedic's second pathway


class ConvBlock(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels_in, channels_out, kernel, padding=kernel // 2)
        self.norm = nn.BatchNorm3d(channels_out)

    def forward(self, h: Tensor) -> Tensor:
        """`(B, channels_in, X, Y, Z)` to `(B, channels_out, X, Y, Z)`."""
        return torch.relu(self.norm(self.conv(h)))


def _chain(*channels: int, kernel: int = 3) -> nn.Sequential:
    pairs = pairwise(channels)
    return nn.Sequential(*(ConvBlock(c_in, c_out, kernel) for c_in, c_out in pairs))


class UNet3d(nn.Module):
    """3-D U-Net (Cicek 2016). Channels double before each pooling, to avoid bottlenecks."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        inputs = (config.in_channels, *widths)
        self.encoder = nn.ModuleList(
            _chain(c_in, c_out // 2, c_out) for c_in, c_out in zip(inputs, widths, strict=False)
        )
        self.pool = nn.MaxPool3d(2)
        self.bottleneck = _chain(widths[-1], config.bottleneck // 2, config.bottleneck)
        upward = tuple(reversed(widths))
        below = (config.bottleneck, *upward)
        self.up = nn.ModuleList(nn.ConvTranspose3d(c, c, 2, stride=2) for c in below[:-1])
        self.decoder = nn.ModuleList(
            _chain(c_in + c_out, c_out, c_out) for c_in, c_out in zip(below, upward, strict=False)
        )
        self.head = nn.Conv3d(widths[0], config.classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Image `(B, in_channels, X, Y, Z)` to logits `(B, classes, X, Y, Z)`."""
        skips, h = encode(image, self.encoder, self.pool)
        h = self.bottleneck(h)
        for up, stage, skip in zip(self.up, self.decoder, reversed(skips), strict=True):
            h = stage(torch.cat([skip, up(h)], dim=1))
        logits: Tensor = self.head(h)
        return logits


class DeepMedic(nn.Module):
    """DeepMedic (Kamnitsas 2017): a fine and a coarse pathway, eleven layers deep."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.fine = _chain(config.in_channels, *config.widths)
        self.coarse = _chain(config.in_channels, *config.widths)
        hidden = config.bottleneck
        self.joint = _chain(2 * config.widths[-1], hidden, hidden, kernel=1)
        self.head = nn.Conv3d(hidden, config.classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Image `(B, in_channels, X, Y, Z)` to logits `(B, classes, X, Y, Z)`."""
        coarse = self.coarse(F.avg_pool3d(image, _COARSE))
        coarse = F.interpolate(coarse, scale_factor=_COARSE, mode="nearest")
        logits: Tensor = self.head(self.joint(torch.cat([self.fine(image), coarse], dim=1)))
        return logits
