"""Networks of the paper's related work (section 2), for 3-D volumes, from the same configuration.

- `ResidualUNet`: Zhang, Liu and Wang, "Road extraction by deep residual U-Net" (IEEE GRSL 2018):
  units with batch norm and ReLU before each convolution, strided convolutions instead of pooling,
  and upsampling without weights.
- `DeepLabV3`: Chen et al., "Rethinking atrous convolution for semantic image segmentation" (2017):
  atrous spatial pyramid pooling at an output stride of 8, and no decoder. The encoder here has
  residual blocks. The rates are 2, 4 and 6 instead of 6, 12 and 18, because the features of a
  window of 64 voxels have 8 voxels along each axis.
- `UNetPlusPlus`: Zhou et al., "UNet++: a nested U-Net architecture" (2018), by MONAI's
  `BasicUNetPlusPlus` with batch norm and ReLU, without deep supervision.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnseg.runtime.errors import DependencyError
from attnseg.runtime.extras import install
from attnseg.trainer.baselines import ConvBlock
from attnseg.trainer.model import DilatedConv, NetworkConfig, ResidualBlock

_RATES = (2, 4, 6)


class PreActivationUnit(nn.Module):
    """Twice batch norm, ReLU and convolution, added to a 1x1x1 convolution of the input.

    The first unit of a network takes the image, which has no activation to normalise.
    """

    def __init__(
        self, channels_in: int, channels_out: int, stride: int = 1, first: bool = False
    ) -> None:
        super().__init__()
        norm = nn.Identity() if first else nn.Sequential(nn.BatchNorm3d(channels_in), nn.ReLU())
        self.residual = nn.Sequential(
            norm,
            nn.Conv3d(channels_in, channels_out, 3, stride, padding=1),
            nn.BatchNorm3d(channels_out),
            nn.ReLU(),
            nn.Conv3d(channels_out, channels_out, 3, padding=1),
        )
        self.project = nn.Conv3d(channels_in, channels_out, 1, stride)

    def forward(self, h: Tensor) -> Tensor:
        """`(B, channels_in, X, Y, Z)` to `(B, channels_out, X / stride, ...)`."""
        projected: Tensor = self.project(h)
        residual: Tensor = self.residual(h)
        return projected + residual


class ResidualUNet(nn.Module):
    """Residual U-Net (Zhang 2018)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        down = (*config.widths, config.bottleneck)
        up = tuple(reversed(config.widths))
        self.encoder = nn.ModuleList([PreActivationUnit(config.in_channels, down[0], first=True)])
        self.encoder.extend(
            PreActivationUnit(c_in, c_out, stride=2) for c_in, c_out in pairwise(down)
        )
        self.decoder = nn.ModuleList(
            PreActivationUnit(c_in + c_out, c_out)
            for c_in, c_out in zip((config.bottleneck, *up), up, strict=False)
        )
        self.head = nn.Conv3d(down[0], config.classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Image `(B, in_channels, X, Y, Z)` to logits `(B, classes, X, Y, Z)`."""
        skips, h = [], image
        for unit in self.encoder:
            h = unit(h)
            skips.append(h)
        skips.pop()
        for unit, skip in zip(self.decoder, reversed(skips), strict=True):
            h = unit(torch.cat([skip, F.interpolate(h, scale_factor=2, mode="nearest")], dim=1))
        logits: Tensor = self.head(h)
        return logits


class AtrousPyramid(nn.Module):
    """Atrous spatial pyramid pooling: 1x1x1, three dilated 3x3x3, and the mean of the image."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.point = ConvBlock(channels_in, channels_out, 1)
        self.atrous = nn.ModuleList(
            nn.Sequential(
                DilatedConv(channels_in, channels_out, 3, padding=rate, dilation=rate),
                nn.BatchNorm3d(channels_out),
                nn.ReLU(),
            )
            for rate in _RATES
        )
        # Without a batch norm, which cannot be trained on one value per channel and patch.
        self.pooled = nn.Conv3d(channels_in, channels_out, 1)
        self.fuse = ConvBlock((2 + len(_RATES)) * channels_out, channels_out, 1)

    def forward(self, h: Tensor) -> Tensor:
        """`(B, channels_in, X, Y, Z)` to `(B, channels_out, X, Y, Z)`."""
        point = self.point(h)
        mean = torch.relu(self.pooled(h.mean(dim=(2, 3, 4), keepdim=True))).expand_as(point)
        fused: Tensor = self.fuse(
            torch.cat([point, *(branch(h) for branch in self.atrous), mean], dim=1)
        )
        return fused


class DeepLabV3(nn.Module):
    """DeepLab-V3 (Chen 2017) in 3-D. The last width is that of the pyramid's input."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        stages = zip((config.in_channels, *config.widths), config.widths, strict=False)
        self.encoder = nn.Sequential(
            *(
                nn.Sequential(
                    ResidualBlock(c_in, c_out), ResidualBlock(c_out, c_out), nn.MaxPool3d(2)
                )
                for c_in, c_out in stages
            )
        )
        self.pyramid = AtrousPyramid(config.widths[-1], config.bottleneck)
        self.head = nn.Conv3d(config.bottleneck, config.classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Image `(B, in_channels, X, Y, Z)` to logits `(B, classes, X, Y, Z)`."""
        coarse = self.head(self.pyramid(self.encoder(image)))
        return F.interpolate(
            coarse, scale_factor=self.config.stride, mode="trilinear", align_corners=False
        )


class UNetPlusPlus(nn.Module):
    """UNet++ (Zhou 2018). Needs MONAI.

    Raises:
        DependencyError: MONAI is not installed.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        try:
            from monai.networks.nets.basic_unetplusplus import BasicUNetPlusPlus
        except ImportError as error:
            raise DependencyError("network unetplusplus needs MONAI", install("import")) from error
        self.config = config
        self.network = BasicUNetPlusPlus(
            spatial_dims=3,
            in_channels=config.in_channels,
            out_channels=config.classes,
            features=(*config.widths, config.bottleneck, config.widths[0]),
            act="relu",
            norm="batch",
        )
        for unused in ("final_conv_0_1", "final_conv_0_2", "final_conv_0_3"):
            setattr(self.network, unused, nn.Identity())  # outputs of deep supervision

    @property
    def head(self) -> nn.Module:
        """Convolution that computes the logits."""
        head: nn.Module = self.network.final_conv_0_4
        return head

    def forward(self, image: Tensor) -> Tensor:
        """Image `(B, in_channels, X, Y, Z)` to logits `(B, classes, X, Y, Z)`."""
        logits: Tensor = self.network(image)[0]
        return logits
