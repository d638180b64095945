"""Model folders as nnU-Net writes them, with small networks, and scans for them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import nn

for _name in ("raw", "preprocessed", "results"):
    os.environ.setdefault(f"nnUNet_{_name}", os.curdir)

CT = {"mean": 60.0, "std": 90.0, "percentile_00_5": -110.0, "percentile_99_5": 260.0}
LABELS = {"background": 0, "organ": 1, "lesion": 2}
REGIONS = {"background": 0, "whole": [1, 2], "lesion": 2}


@dataclass(frozen=True)
class NnUNetFolder:
    """What differs between model folders.

    Shapes, spacings and axes are in nnU-Net's order (z, y, x).
    """

    residual: bool = False
    labels: dict[str, Any] = field(default_factory=lambda: dict(LABELS))
    order: Sequence[int] | None = None
    folds: int = 1
    mirror_axes: tuple[int, ...] | None = None
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    patch: tuple[int, int, int] = (16, 16, 24)
    channels: tuple[str, ...] = ("T1",)
    schemes: tuple[str, ...] = ("ZScoreNormalization",)
    masks: tuple[bool, ...] = (True,)
    transpose: tuple[int, int, int] = (0, 1, 2)
    reader: str = "SimpleITKIO"
    resampling: dict[str, Any] = field(
        default_factory=lambda: {"order_z": 0, "force_separate_z": None}
    )

    def plans(self) -> dict[str, Any]:
        """Content of `plans.json`, as the planner of nnU-Net 2.8.1 writes it."""
        blocks = "n_blocks_per_stage" if self.residual else "n_conv_per_stage"
        kind = "ResidualEncoderUNet" if self.residual else "PlainConvUNet"
        kwargs = self.resampling
        backward = np.argsort(self.transpose).tolist()
        return {
            "dataset_name": "Dataset900_Small",
            "plans_name": "nnUNetPlans",
            "image_reader_writer": self.reader,
            "transpose_forward": list(self.transpose),
            "transpose_backward": backward,
            "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": {
                str(index): CT for index in range(len(self.channels))
            },
            "configurations": {
                "2d": {"patch_size": [64, 64]},
                "3d_fullres": {
                    "data_identifier": "nnUNetPlans_3d_fullres",
                    "preprocessor_name": "DefaultPreprocessor",
                    "batch_size": 2,
                    "patch_size": list(self.patch),
                    "spacing": list(self.spacing),
                    "normalization_schemes": list(self.schemes),
                    "use_mask_for_norm": list(self.masks),
                    "resampling_fn_data": "resample_data_or_seg_to_shape",
                    "resampling_fn_seg": "resample_data_or_seg_to_shape",
                    "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **kwargs},
                    "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **kwargs},
                    "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                    "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, **kwargs},
                    "architecture": {
                        "network_class_name": "dynamic_network_architectures.architectures.unet."
                        + kind,
                        "arch_kwargs": {
                            "n_stages": 3,
                            "features_per_stage": [6, 8, 10],
                            "conv_op": "torch.nn.modules.conv.Conv3d",
                            "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
                            "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
                            blocks: [1, 1, 1],
                            "n_conv_per_stage_decoder": [1, 1],
                            "conv_bias": True,
                            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                            "dropout_op": None,
                            "dropout_op_kwargs": None,
                            "nonlin": "torch.nn.LeakyReLU",
                            "nonlin_kwargs": {"inplace": True},
                        },
                        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
                    },
                    "batch_dice": False,
                },
            },
        }

    def dataset(self) -> dict[str, Any]:
        """Content of `dataset.json`."""
        order = {} if self.order is None else {"regions_class_order": list(self.order)}
        return {
            "channel_names": {str(i): name for i, name in enumerate(self.channels)},
            "labels": self.labels,
            "numTraining": 5,
            "file_ending": ".nii.gz",
            **order,
        }

    def write(self, folder: Path) -> Path:
        """Write the folder; the last layer of each fold is fitted, so that decisions are clear."""
        plans, dataset = self.plans(), self.dataset()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plans.json").write_text(json.dumps(plans))
        (folder / "dataset.json").write_text(json.dumps(dataset))
        for fold in range(self.folds):
            inner = folder / f"fold_{fold}"
            inner.mkdir()
            checkpoint = {
                "network_weights": self._network(plans, dataset, fold).state_dict(),
                "optimizer_state": None,
                "grad_scaler_state": None,
                "logging": {"mean_fg_dice": [np.float64(0.5), np.float32(0.75)]},
                "_best_ema": np.float64(0.5),
                "current_epoch": 1000,
                "init_args": {"plans": plans, "configuration": "3d_fullres", "fold": fold},
                "trainer_name": "nnUNetTrainer",
                "inference_allowed_mirroring_axes": self.mirror_axes,
            }
            torch.save(checkpoint, inner / "checkpoint_final.pth")
        return folder

    def _network(self, plans: dict[str, Any], dataset: dict[str, Any], seed: int) -> nn.Module:
        """Network as nnU-Net's trainer builds it, from nnU-Net's own functions."""
        from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        heads = PlansManager(plans).get_label_manager(dataset).num_segmentation_heads
        found = plans["configurations"]["3d_fullres"]["architecture"]
        torch.manual_seed(seed)
        network: nn.Module = get_network_from_plans(
            found["network_class_name"],
            found["arch_kwargs"],
            found["_kw_requires_import"],
            len(self.channels),
            heads,
            deep_supervision=True,
        )
        _fit(network, len(self.channels), heads, self.patch, self.order is not None)
        return network


def _fit(
    network: nn.Module, channels: int, heads: int, patch: Sequence[int], sigmoid: bool
) -> None:
    """Fit the last layer by ridge regression to classes of the smoothed first channel."""
    rng = np.random.default_rng(0)
    noise = ndimage.gaussian_filter(rng.standard_normal((channels, *patch)), (0, 2, 2, 2))
    image = noise / noise.std()
    classes = np.digitize(image[0], [0.4, 1.2][: heads - (not sigmoid)])
    seen: dict[str, torch.Tensor] = {}
    layer = network.decoder.seg_layers[-1]
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    network.eval()
    with torch.no_grad():
        network(torch.tensor(image[None], dtype=torch.float32))
        hook.remove()
        features = seen["x"][0].flatten(1).T.double().numpy()
        features = np.c_[features, np.ones(len(features))]
        target = (
            np.stack([classes.ravel() > index for index in range(heads)], 1) * 16.0 - 8.0
            if sigmoid
            else np.eye(heads)[classes.ravel()] * np.linspace(12.0, 16.0, heads)
        )
        fitted = np.linalg.lstsq(features, target, rcond=1e-6)[0]
        layer.weight.copy_(torch.tensor(fitted[:-1].T, dtype=torch.float32)[:, :, None, None, None])
        layer.bias.copy_(torch.tensor(fitted[-1], dtype=torch.float32))


def write_scan(
    folder: Path,
    name: str,
    channels: int = 1,
    shape: tuple[int, int, int] = (36, 30, 22),
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    orientation: str = "LPS",
    ct: bool = False,
    oblique: bool = False,
    seed: int = 0,
) -> None:
    """Write a scan with smooth structures, `NAME_0000.nii.gz` and so on; MRI has a background."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal((channels, *shape)), (0, 2, 2, 2))
    values = noise / noise.std()
    if ct:
        stored = np.round(60 + 90 * values).astype(np.int16)
    else:
        stored = np.round(300 + 80 * values).clip(1).astype(np.int16)
        index = np.indices(shape)
        centre = (np.array(shape) / 2)[:, None, None, None]
        inside = (((index - centre) / (centre - 2.5)) ** 2).sum(0) < 1
        inside &= ~((abs(index - centre) < 2).all(0))  # a hole, which the mask fills
        stored[:, ~inside] = 0
    affine = _affine(orientation, spacing_mm)
    if oblique:  # so that float32 rounds the norm of an axis of 3 mm to more than 3
        affine[:3, :3] = Rotation.from_euler("xyz", (0.05, -0.2, 0.1)).as_matrix() @ affine[:3, :3]
    for channel, array in enumerate(stored):
        image = nib.Nifti1Image(array, affine)
        nib.save(image, folder / f"{name}_{channel:04d}.nii.gz")


def _affine(orientation: str, spacing_mm: Sequence[float]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (code, size) in enumerate(zip(orientation, spacing_mm, strict=True)):
        world = {"L": 0, "R": 0, "P": 1, "A": 1, "I": 2, "S": 2}[code]
        affine[world, axis] = size if code in "RAS" else -size
    affine[:3, 3] = (5.0, -7.0, 11.0)
    return affine
