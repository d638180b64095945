"""MONAI bundles in the style of the model zoo, with small networks of random weights."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import monai.networks.nets
import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from scipy import ndimage

Json = dict[str, Any]

LABELS = (
    "$lambda x: torch.where(x[[2]] > 0, 4, torch.where(x[[0]] > 0, 1, "
    "torch.where(x[[1]] > 0, 2, 0)))"
)

BRATS: Json = {
    "imports": ["$import os"],
    "bundle_root": ".",
    "image_key": "image",
    "output_dir": "$@bundle_root + '/eval'",
    "device": "$torch.device('cpu')",
    "network_def": {
        "_target_": "SegResNet",
        "blocks_down": [1, 1, 1],
        "blocks_up": [1, 1],
        "init_filters": 8,
        "in_channels": 4,
        "out_channels": 3,
        "dropout_prob": 0.2,
    },
    "network": "$@network_def.to(@device)",
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "LoadImaged", "keys": "@image_key", "image_only": False},
            {
                "_target_": "NormalizeIntensityd",
                "keys": "@image_key",
                "nonzero": True,
                "channel_wise": True,
            },
        ],
    },
    "inferer": {
        "_target_": "SlidingWindowInferer",
        "roi_size": [24, 24, 16],
        "sw_batch_size": 1,
        "overlap": 0.5,
    },
    "postprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "Activationsd", "keys": "pred", "sigmoid": True},
            {
                "_target_": "Invertd",
                "keys": "pred",
                "transform": "@preprocessing",
                "orig_keys": "@image_key",
                "meta_keys": "pred_meta_dict",
                "nearest_interp": False,
                "to_tensor": True,
            },
            {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5},
            {"_target_": "Lambdad", "keys": "pred", "func": LABELS},
            {
                "_target_": "SaveImaged",
                "keys": "pred",
                "output_dir": "@output_dir",
                "resample": False,
                "squeeze_end_dims": True,
            },
        ],
    },
    "evaluator": {"_target_": "SupervisedEvaluator", "device": "@device"},
    "run": ["$@evaluator.run()"],
}
"""The zoo's brats_mri_segmentation, with a smaller network and window."""

SPLEEN: Json = {
    "image_key": "image",
    "patch": [32, 32, 16],
    "output_dtype": "$numpy.float32",
    "device": "$torch.device('cpu')",
    "classes": 3,
    "network_def": {
        "_target_": "UNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": "@classes",
        "channels": [8, 16, 32],
        "strides": [2, 2],
        "num_res_units": 1,
        "norm": "batch",
    },
    "network": "$@network_def.to(@device)",
    "loading": [
        {"_target_": "LoadImaged", "keys": "@image_key"},
        {"_target_": "EnsureChannelFirstd", "keys": "@image_key"},
        {"_target_": "Orientationd", "keys": "@image_key", "axcodes": "RAS"},
    ],
    "scaling": [
        {
            "_target_": "Spacingd",
            "keys": "@image_key",
            "pixdim": [1.5, 1.5, 2.0],
            "mode": "bilinear",
        },
        {
            "_target_": "ScaleIntensityRanged",
            "keys": "@image_key",
            "a_min": -57,
            "a_max": 164,
            "b_min": 0,
            "b_max": 1,
            "clip": True,
        },
        {"_target_": "EnsureTyped", "keys": "@image_key"},
    ],
    "preprocessing": {"_target_": "Compose", "transforms": "$@loading + @scaling"},
    "inferer": {
        "_target_": "SlidingWindowInferer",
        "roi_size": "@patch",
        "sw_batch_size": 4,
        "overlap": 0.5,
        "mode": "gaussian",
    },
    "postprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "Activationsd", "keys": "pred", "softmax": True},
            {
                "_target_": "Invertd",
                "keys": "pred",
                "transform": "@preprocessing",
                "orig_keys": "@image_key",
                "nearest_interp": False,
                "to_tensor": True,
            },
            {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
            {"_target_": "SaveImaged", "keys": "pred", "output_dtype": "@output_dtype"},
        ],
    },
}
"""The zoo's spleen_ct_segmentation, with a third class, a smaller network and window."""


def metadata(inputs: list[str], outputs: list[str]) -> Json:
    """Metadata of a bundle with these channels."""

    def described(names: list[str]) -> Json:
        return {"num_channels": len(names), "channel_def": dict(enumerate(names))}

    return {
        "name": "Small model",
        "version": "0.1.0",
        "description": "A small model",
        "network_data_format": {
            "inputs": {"image": described(inputs)},
            "outputs": {"pred": described(outputs)},
        },
    }


BRATS_METADATA = metadata(
    ["T1c", "T1", "T2", "FLAIR"], ["Tumor core", "Whole tumor", "Enhancing tumor"]
)
SPLEEN_METADATA = metadata(["image"], ["background", "spleen", "liver"])


def changed(config: Json, **values: Any) -> Json:
    """A copy of a config with other values, by name with `__` between the levels."""
    result = copy.deepcopy(config)
    for name, value in values.items():
        *path, last = name.split("__")
        section = result
        for key in path:
            section = section[int(key) if isinstance(section, list) else key]  # type: ignore
        section[int(last) if isinstance(section, list) else last] = value  # type: ignore
    return result


def write_bundle(folder: Path, config: Json, described: Json, seed: int = 0) -> Path:
    """Write a bundle with random weights, under which every class is decided somewhere."""
    for name in ("configs", "models"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    (folder / "configs" / "metadata.json").write_text(json.dumps(described))
    torch.save(build(config, seed).state_dict(), folder / "models" / "model.pt")
    return folder


def build(config: Json, seed: int) -> torch.nn.Module:
    """Network of a config with random weights and statistics of norms, and balanced outputs."""
    torch.manual_seed(seed)
    parser = ConfigParser(config)
    given = dict(parser.get_parsed_content("network_def", instantiate=False).config)
    window = parser.get_parsed_content("inferer").roi_size
    network = getattr(monai.networks.nets, given.pop("_target_"))(**given).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_(0, 0.1)
    *_, last = (m for m in network.modules() if isinstance(m, torch.nn.Conv3d))
    with torch.no_grad():
        last.bias.zero_()
        image = torch.randn(1, given["in_channels"], *window)
        logits = network(image)
        last.weight /= logits.std()
        network_mean = network(image).mean((0, 2, 3, 4))
        last.bias -= network_mean
    return network


def run_with_monai(folder: Path, files: list[Path]) -> np.ndarray:
    """Labels `(X, Y, Z)` of MONAI's own classes, for the files of one scan."""
    parser = ConfigParser()
    parser.read_config(folder / "configs" / "inference.json")
    saving = parser["postprocessing"]["transforms"].pop()
    assert saving["_target_"] == "SaveImaged"
    names = [str(file) for file in files]
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations, and of Invertd without anything to do
        network = parser.get_parsed_content("network_def")
        network.load_state_dict(torch.load(folder / "models" / "model.pt", weights_only=True))
        before, inferer, after = (
            parser.get_parsed_content(name)
            for name in ("preprocessing", "inferer", "postprocessing")
        )
        data = before({"image": names if names[1:] else names[0]})
        data["pred"] = inferer(data["image"][None], network.eval())[0]
        labels = after(data)["pred"]
    return np.asarray(labels[0]).astype(np.uint8)


def write_scan(
    folder: Path,
    channels: int,
    shape: tuple[int, int, int],
    affine: np.ndarray,
    ct: bool = False,
    seed: int = 0,
) -> list[Path]:
    """Write smooth random channels; those of MRI have a background of 0."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal((channels, *shape)), (0, 2, 2, 2))
    values = noise / noise.std()
    stored = np.round(50 + 80 * values if ct else (300 + 80 * values).clip(1)).astype(np.int16)
    if not ct:
        index = (np.indices(shape).T / np.array(shape) * 2 - 1).T
        stored[:, (index**2).sum(0) > 0.9] = 0
    suffixes = ("_t1ce", "_t1", "_t2", "_flair") if channels == 4 else ("",)
    files = [folder / f"case{suffix}.nii.gz" for suffix in suffixes]
    for file, array in zip(files, stored, strict=True):
        image = nib.Nifti1Image(array, affine)
        image.set_sform(affine, code=1)
        nib.save(image, file)
    return files


def affine_of(orientation: str, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Affine of axes in an orientation."""
    affine = np.zeros((4, 4))
    for axis, (code, size) in enumerate(zip(orientation, spacing_mm, strict=True)):
        world = {"L": 0, "R": 0, "P": 1, "A": 1, "I": 2, "S": 2}[code]
        affine[world, axis] = size if code in "RAS" else -size
    affine[:3, 3] = (5.3, -7.1, 11.0)
    affine[3, 3] = 1
    return affine


def tilted(affine: np.ndarray, degrees: float) -> np.ndarray:
    """Affine rotated about the first world axis, in single precision as NIfTI stores it."""
    angle = np.deg2rad(degrees)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return (turn @ affine).astype(np.float32).astype(np.float64)
