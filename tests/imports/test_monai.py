"""What is read of a MONAI bundle, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attnseg.imports.imported import import_monai
from attnseg.imports.monai.bundle import read_monai
from attnseg.imports.monai.config import Config
from attnseg.imports.monai.networks import build_monai
from attnseg.runtime.errors import ExportError
from attnseg.runtime.steps.schemes import Range, Unchanged, ZScore
from tests.imports.monai_bundles import (
    BRATS,
    BRATS_METADATA,
    LABELS,
    SPLEEN,
    SPLEEN_METADATA,
    changed,
    metadata,
    write_bundle,
)

Json = dict[str, Any]
BEFORE = "preprocessing__transforms"
AFTER = "postprocessing__transforms"
KEYS = {"keys": "image"}
PRED = {"keys": "pred"}


def spleen(name: str, step: Json, index: int | None = None) -> Json:
    """The spleen's config with a transform replaced, or added at the end."""
    base = changed(SPLEEN, **{BEFORE: [*SPLEEN["loading"], *SPLEEN["scaling"]]})
    *path, last = name.split("__")
    steps = list(base[path[0]][last])
    if index is None:
        steps.append(step)
    else:
        steps[index] = step
    return changed(base, **{name: steps})


def test_the_brats_bundle(tmp_path: Path) -> None:
    model = read_monai(write_bundle(tmp_path, BRATS, BRATS_METADATA))
    task, record = model.record.task, model.record
    assert [channel.name for channel in task.channels] == ["T1c", "T1", "T2", "FLAIR"]
    assert "_t1ce" in task.channels[0].suffixes
    assert "-t2f" in task.channels[3].suffixes
    assert [(o.region, o.label, o.channels, o.threshold) for o in task.outputs] == [
        ("Whole tumor", 2, (1,), 0.5),
        ("Tumor core", 1, (0,), 0.5),
        ("Enhancing tumor", 4, (2,), 0.5),
    ]
    assert task.regions == {
        "Whole tumor": (2, 1, 4),
        "Tumor core": (1, 4),
        "Enhancing tumor": (4,),
    }
    assert task.label_values == (0, 1, 2, 4)
    assert record.preprocessing.orientation is None
    assert record.preprocessing.grid is None
    assert record.preprocessing.normalisation == (ZScore("nonzero"),) * 4
    inference = record.inference
    assert (inference.window, inference.overlap) == ((24, 24, 16), 0.5)
    assert (inference.window_multiple, inference.weights) == ((4, 4, 4), "constant")
    assert (inference.placement, inference.empty_windows) == ("stride", "run")
    assert record.name == "small-model"
    assert model.origin == {
        "framework": "MONAI",
        "bundle": "Small model",
        "version": "0.1.0",
        "network": "SegResNet",
    }


def test_the_spleen_bundle(tmp_path: Path) -> None:
    record = read_monai(write_bundle(tmp_path, SPLEEN, SPLEEN_METADATA)).record
    steps = record.preprocessing
    assert steps.orientation == "RAS"
    assert steps.grid is not None
    assert (steps.grid.spacing_mm, steps.grid.alignment) == ((1.5, 1.5, 2.0), "centres")
    assert steps.grid.back == "probabilities"
    assert steps.order == ("resample", "crop", "normalise")
    assert steps.normalisation == (Range(source=(-57.0, 164.0), clip=True),)
    assert record.task.regions == {"spleen": (1,), "liver": (2,)}
    assert record.task.channels[0].suffixes == ("",)
    assert record.inference.weights == "gaussian"


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_weights_may_be_an_entry_of_the_checkpoint(tmp_path: Path, key: str) -> None:
    write_bundle(tmp_path, SPLEEN, SPLEEN_METADATA)
    file = tmp_path / "models" / "model.pt"
    weights = torch.load(file, weights_only=True)
    torch.save({key: weights, "epoch": 3}, file)
    network = read_monai(tmp_path).network
    assert all(torch.equal(network.state_dict()[name], own) for name, own in weights.items())


ZOO: Json = {
    "bundle_root": "$os.getcwd()",
    "ckpt_dir": "$@bundle_root + '/models'",
    "checkpoint": "$@ckpt_dir + '/model.pt'",
    "checkpointloader": {
        "_target_": "CheckpointLoader",
        "load_path": "$@checkpoint",
        "load_dict": {"model": "@network"},
        "map_location": "@device",
        "strict": "True",
    },
    "handlers": [{"_target_": "StatsHandler", "iteration_log": False}],
    "dataset": {
        "_target_": "Dataset",
        "data": "$[{'image': i} for i in @datalist]",
        "transform": "@preprocessing",
    },
    "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
    "evaluator": {
        "_target_": "SupervisedEvaluator",
        "device": "@device",
        "val_data_loader": "@dataloader",
        "network": "@network",
        "inferer": "@inferer",
        "postprocessing": "$@postprocessing",
        "val_handlers": "@handlers",
        "amp": True,
    },
    "run": ["$@evaluator.run()"],
}
"""The sections of the zoo's bundles that say what is run; some load the weights elsewhere."""
FULL = {**SPLEEN, **ZOO}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"checkpointloader__load_path": "models/model.pt"},
        {"checkpointloader__load_path": "models/model.pt", "checkpointloader__load_dict": None},
        {"checkpointloader__load_path": "$os.path.join(@bundle_root, 'models', 'model.pt')"},
        {"checkpointloader__load_path": "$@bundle_root + '/models/' + @name", "name": "model.pt"},
        {"checkpointloader": None, "evaluator__val_handlers": [ZOO["checkpointloader"]]},
        {"checkpointloader__load_path": "x.pt", "checkpointloader___disabled_": "$not False"},
        {"evaluator__network": "$@network_def.eval()", "network": "$@network_def.to('cpu').eval()"},
        {"sliding": SPLEEN["inferer"], "inferer": "@sliding", "evaluator__inferer": "@sliding"},
    ],
)
def test_what_the_zoos_evaluators_run_is_read(tmp_path: Path, values: Json) -> None:
    write_bundle(tmp_path, SPLEEN, SPLEEN_METADATA)
    (tmp_path / "configs" / "inference.json").write_text(json.dumps(changed(FULL, **values)))
    assert read_monai(tmp_path).record.inference.window == (32, 32, 16)


def test_the_entry_of_the_checkpoint_is_that_of_the_config(tmp_path: Path) -> None:
    write_bundle(tmp_path, SPLEEN, SPLEEN_METADATA)
    file = tmp_path / "models" / "model.pt"
    weights = torch.load(file, weights_only=True)
    torch.save({"model": {name: w * 0 for name, w in weights.items()}, "ema": weights}, file)
    config = changed(FULL, checkpointloader__load_dict={"ema": "@network"})
    (tmp_path / "configs" / "inference.json").write_text(json.dumps(config))
    network = read_monai(tmp_path).network
    assert all(torch.equal(network.state_dict()[name], own) for name, own in weights.items())


@pytest.mark.parametrize(
    ("step", "scheme"),
    [
        (
            {"_target_": "NormalizeIntensityD", "subtrahend": 3, "divisor": [2.5]},
            Range(source=(3.0, 5.5)),
        ),
        ({"_target_": "monai.transforms.NormalizeIntensityDict"}, ZScore("all")),
        ({"_target_": "ScaleIntensityd", "minv": -1}, Range(percentiles=(0, 100), target=(-1, 1))),
        ({"_target_": "ScaleIntensityRanged", "a_min": 2, "a_max": 4}, Range(source=(2, 4))),
        (
            {
                "_target_": "ScaleIntensityRangePercentilesd",
                "lower": 1,
                "upper": "$100 - 2 * 0.5",
                "b_min": 0,
                "b_max": 2,
            },
            Range(percentiles=(1, 99), target=(0, 2)),
        ),
        ({"_target_": "CastToTyped", "dtype": "$torch.float32"}, Unchanged()),
        ({"_target_": "ScaleIntensityd", "_disabled_": "$not False"}, Unchanged()),
    ],
)
def test_normalisation(tmp_path: Path, step: Json, scheme: object) -> None:
    config = spleen(BEFORE, {"keys": "image", **step}, 4)
    record = read_monai(write_bundle(tmp_path, config, SPLEEN_METADATA)).record
    assert record.preprocessing.normalisation == (scheme,)


def test_expressions(tmp_path: Path) -> None:
    config = changed(
        SPLEEN,
        highres=True,
        sizes={"low": [3.0] * 3, "high": [[1.0, 1.5], 2.0]},
        scaling__0__pixdim="$[@sizes::high#0#1, -(-3 // 2) / 1, @sizes#high::1] if @highres "
        "else @sizes::low",
        classes="$len(@patch)",
        inferer__overlap="$(+1) * 0.5",
    )
    record = read_monai(write_bundle(tmp_path, config, SPLEEN_METADATA)).record
    assert record.preprocessing.grid is not None
    assert record.preprocessing.grid.spacing_mm == (1.5, 2.0, 2.0)
    assert record.task.output_channels == 3


def test_sections_may_be_references_and_outputs_may_be_converted(tmp_path: Path) -> None:
    built = SPLEEN["network_def"]
    steps = [{"_target_": "EnsureTyped", **PRED}, *SPLEEN["postprocessing"]["transforms"]]
    config = changed(SPLEEN, unet=built, network_def="@unet", **{AFTER: steps})
    write_bundle(tmp_path, changed(config, network_def=built), SPLEEN_METADATA)
    (tmp_path / "configs" / "inference.json").write_text(json.dumps(config))
    assert read_monai(tmp_path).origin["network"] == "UNet"


def test_one_region_is_label_1(tmp_path: Path) -> None:
    config = changed(
        BRATS, network_def__out_channels=1, **{AFTER: BRATS["postprocessing"]["transforms"][:3]}
    )
    described = metadata(["T1c", "T1", "T2", "FLAIR"], ["Lesion"])
    task = read_monai(write_bundle(tmp_path, config, described)).record.task
    assert task.regions == {"Lesion": (1,)}
    assert [label.name for label in task.labels] == ["background", "Lesion"]


def test_regions_other_than_those_of_brats_do_not_contain_others(tmp_path: Path) -> None:
    described = metadata(["one file"] * 1, ["liver", "spleen", "kidney"])
    task = read_monai(write_bundle(tmp_path, BRATS, described)).record.task
    assert task.regions == {"liver": (1,), "spleen": (2,), "kidney": (4,)}
    assert [channel.name for channel in task.channels] == [f"one file {i}" for i in range(4)]
    assert {channel.suffixes for channel in task.channels} == {("",)}


NETWORKS: dict[str, tuple[Json, tuple[int, int, int]]] = {
    "DynUNet": (
        {
            "kernel_size": [3, 3, 3],
            "strides": [1, 2, [2, 2, 1]],
            "upsample_kernel_size": [2, [2, 2, 1]],
            "filters": [4, 8, 8],
            "norm_name": "instance",
            "res_block": True,
        },
        (4, 4, 2),
    ),
    "BasicUNet": ({"features": [4, 4, 4, 4, 4, 4]}, (16, 16, 16)),
    "VNet": ({}, (16, 16, 16)),
    "SegResNetDS": ({"init_filters": 4, "blocks_down": [1, 1, 1]}, (4, 4, 4)),
    "SwinUNETR": ({"img_size": 32, "feature_size": 12, "depths": [1, 1, 1, 1]}, (32, 32, 32)),
    "UNETR": (
        {
            "img_size": [32, 32, 16],
            "feature_size": 4,
            "hidden_size": 12,
            "mlp_dim": 8,
            "num_heads": 2,
        },
        (32, 32, 16),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(tmp_path: Path, name: str) -> None:
    arguments, multiple = NETWORKS[name]
    network = {"_target_": f"monai.networks.nets.{name}", "spatial_dims": 3, "in_channels": 1}
    network |= {"out_channels": 3, **arguments}
    config = changed(SPLEEN, network_def=network)
    path = tmp_path / "inference.json"
    path.write_text(json.dumps(config))
    built = build_monai(Config(path).component("network_def"))
    assert built.window_multiple == multiple
    assert (built.channels, built.outputs) == (1, 3)
    assert {t.device.type for t in built.network.state_dict().values()} == {"meta"}
    weights = built.make().state_dict()
    torch.save(weights, tmp_path / "model.pt")
    network = built.with_weights(tmp_path / "model.pt", weights)
    assert not network.training
    tensors = (*network.parameters(), *network.buffers())
    assert {t.device.type for t in tensors} == {"cpu"}
    assert all(torch.equal(network.state_dict()[key], own) for key, own in weights.items())


def test_networks_larger_than_the_file_of_weights_are_not_built(tmp_path: Path) -> None:
    write_bundle(tmp_path, SPLEEN, SPLEEN_METADATA)
    large = changed(
        SPLEEN,
        network_def__channels=[4096] * 4,
        network_def__strides=[1, 1, 1],
        network_def__kernel_size=7,
    )
    (tmp_path / "configs" / "inference.json").write_text(json.dumps(large))
    with pytest.raises(ExportError, match=r"not those of .* \(\d{11} weights, and the file"):
        read_monai(tmp_path)


def test_references_are_resolved_once(tmp_path: Path) -> None:
    chain = {f"a{i}": f"$@a{i - 1} + @a{i - 1}" for i in range(1, 20)}  # 2^19 values otherwise
    config = changed(SPLEEN, a0=0, **chain, classes="$@a19 + 3")
    path = tmp_path / "inference.json"
    path.write_text(json.dumps(config))
    read, resolved = Config(path), list[str]()
    resolve = read._resolved

    def counted(reference: str, field: str, depth: int) -> Any:
        resolved.append(reference)
        return resolve(reference, field, depth)

    read._resolved = counted  # type: ignore[method-assign]
    assert read.value("@classes", "classes") == 3
    assert sorted(resolved) == sorted(["@classes", *(f"@a{i}" for i in range(20))])


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    write_bundle(tmp_path, SPLEEN, SPLEEN_METADATA)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "models" / "model.pt")
    with pytest.raises(ExportError, match=r"model.pt: its weights are not those of the network"):
        read_monai(tmp_path)


def doubled(sign: str) -> Json:
    """Sections of which each combines the one before with itself."""
    return {f"a{i}": f"$@a{i - 1} {sign} @a{i - 1}" for i in range(1, 21)}


INVERT = SPLEEN["postprocessing"]["transforms"][1]
SOFTMAX, _, ARGMAX, SAVE = SPLEEN["postprocessing"]["transforms"]
REFUSED: dict[str, tuple[Json, str]] = {
    "unknown transform": (
        spleen(BEFORE, {"_target_": "CropForegroundd", **KEYS, "source_key": "image"}, 5),
        r"preprocessing.transforms\[5\] \(CropForegroundd\) is a transform that is not supported",
    ),
    "unknown argument": (
        spleen(BEFORE, {"_target_": "EnsureTyped", **KEYS, "speed": 3}, 5),
        r"\[5\] \(EnsureTyped\) has speed, which is not supported",
    ),
    "not loaded": (
        changed(SPLEEN, loading=SPLEEN["loading"][1:]),
        "preprocessing does not start with LoadImaged",
    ),
    "several keys": (
        changed(SPLEEN, loading__0__keys=["image", "label"]),
        r"\(LoadImaged\) has the keys \['image', 'label'\]; one key is supported",
    ),
    "another key": (
        changed(SPLEEN, loading__1__keys="label"),
        r"\(EnsureChannelFirstd\) changes label, the image is image",
    ),
    "type": (
        changed(SPLEEN, loading__0__dtype="$np.uint8"),
        r"\(LoadImaged\) has dtype '\$np.uint8', not float32",
    ),
    "turned after resampling": (
        spleen(BEFORE, {"_target_": "Orientationd", **KEYS, "axcodes": "LPS"}, 5),
        r"\(Orientationd\) comes after Orientationd or Spacingd",
    ),
    "axes": (
        changed(SPLEEN, loading__2__axcodes="RAX"),
        "orientation RAX does not name each axis once",
    ),
    "names of axes": (
        changed(SPLEEN, loading__2__labels=[["R", "L"], ["A", "P"], ["I", "S"]]),
        r"\(Orientationd\) has labels of axes; those of NIfTI are supported",
    ),
    "nearest": (
        changed(SPLEEN, scaling__0__mode="nearest"),
        r"\(Spacingd\) has mode 'nearest', which is not supported",
    ),
    "resampled twice": (
        spleen(BEFORE, SPLEEN["scaling"][0], 5),
        r"\[5\] \(Spacingd\) is the second resampling; one is supported",
    ),
    "own spacing": (
        changed(SPLEEN, scaling__0__pixdim=[1.0, 1.0, -1.0]),
        r"has pixdim \[1.0, 1.0, -1.0\]; positive voxel sizes are supported",
    ),
    "no numbers": (
        changed(SPLEEN, scaling__0__pixdim="isotropic"),
        r"\(Spacingd\) has pixdim 'isotropic', not numbers",
    ),
    "normalised twice": (
        spleen(BEFORE, {"_target_": "NormalizeIntensityd", **KEYS}, 5),
        r"\(NormalizeIntensityd\) is the second normalisation; one is supported",
    ),
    "descending": (
        changed(SPLEEN, scaling__1__a_min=200),
        r"\(ScaleIntensityRanged\) range.source must be two ascending numbers",
    ),
    "no target": (
        changed(SPLEEN, scaling__1__b_max=None),
        "has b_min 0 and b_max None; two numbers are supported",
    ),
    "no number": (
        changed(SPLEEN, scaling__1__a_min=True),
        "has a_min True, not a number",
    ),
    "no flag": (
        changed(SPLEEN, scaling__1__clip="True"),
        "has clip 'True', not true or false",
    ),
    "over all channels": (
        changed(BRATS, preprocessing__transforms__1__channel_wise=False),
        "is computed over all 4 channels; channel_wise is supported",
    ),
    "one of mean and deviation": (
        changed(BRATS, preprocessing__transforms__1__subtrahend=3),
        "has subtrahend or divisor; both are supported, without nonzero",
    ),
    "means of other channels": (
        changed(
            BRATS,
            preprocessing__transforms__1={
                "_target_": "NormalizeIntensityd",
                **KEYS,
                "subtrahend": [1, 2],
                "divisor": 1,
            },
        ),
        r"has \[1, 2\], not a number for each of 4 channels",
    ),
    "simple inferer": (
        changed(SPLEEN, inferer={"_target_": "SimpleInferer"}),
        r"inferer \(SimpleInferer\) is not supported; import bundles with SlidingWindowInferer",
    ),
    "window": (
        changed(SPLEEN, patch=[32, 32, 18]),
        r"has roi_size \[32, 32, 18\]; the network takes three multiples of \[4, 4, 4\]",
    ),
    "whole image": (changed(SPLEEN, patch=[32, 32, -1]), r"has roi_size \[32, 32, -1\]"),
    "overlaps": (
        changed(SPLEEN, inferer__overlap=[0.5, 0.5, 0.25]),
        "has different overlaps along the axes",
    ),
    "blending": (changed(SPLEEN, inferer__mode="linear"), "has mode 'linear', which is not"),
    "padding": (
        changed(SPLEEN, inferer__padding_mode="replicate"),
        r"inferer \(SlidingWindowInferer\) has padding_mode 'replicate', which is not supported",
    ),
    "not inverted": (
        changed(SPLEEN, **{AFTER: [SOFTMAX, ARGMAX]}),
        "postprocessing has no Invertd, so labels stay on the grid of Spacingd; add Invertd",
    ),
    "labels inverted": (
        changed(SPLEEN, **{AFTER: [SOFTMAX, ARGMAX, INVERT]}),
        r"\[2\] \(Invertd\) resamples labels; set nearest_interp to false, before AsDiscreted",
    ),
    "nearest inverted": (
        changed(SPLEEN, **{f"{AFTER}__1__nearest_interp": True}),
        r"\(Invertd\) resamples labels",
    ),
    "other inverted": (
        changed(SPLEEN, **{f"{AFTER}__1__transform": "@loading"}),
        "has transform @loading, not @preprocessing",
    ),
    "not decided": (
        changed(SPLEEN, **{AFTER: [SOFTMAX, INVERT]}),
        "postprocessing has no AsDiscreted",
    ),
    "activated twice": (
        changed(SPLEEN, **{AFTER: [SOFTMAX, SOFTMAX]}),
        "comes after an activation or AsDiscreted",
    ),
    "not activated": (
        changed(SPLEEN, **{AFTER: [{"_target_": "Activationsd", **PRED}]}),
        "needs either softmax or sigmoid",
    ),
    "decided twice": (
        changed(SPLEEN, **{AFTER: [SOFTMAX, INVERT, ARGMAX, ARGMAX]}),
        "is the second AsDiscreted",
    ),
    "nothing decided": (
        changed(SPLEEN, **{AFTER: [SOFTMAX, INVERT, {"_target_": "AsDiscreted", **PRED}]}),
        "needs either argmax or threshold",
    ),
    "argmax of a sigmoid": (
        changed(BRATS, **{f"{AFTER}__2": ARGMAX}),
        "needs argmax after softmax or no activation, or threshold after sigmoid",
    ),
    "threshold": (
        changed(BRATS, **{f"{AFTER}__2__threshold": 1.5}),
        "has threshold 1.5, not a number within 0 and 1",
    ),
    "lambda of labels": (
        spleen(AFTER, {"_target_": "Lambdad", **PRED, "func": LABELS}, 3),
        "is supported once, after AsDiscreted with a threshold",
    ),
    "one-hot": (
        changed(SPLEEN, **{f"{AFTER}__2__to_onehot": 3}),
        r"\(AsDiscreted\) has to_onehot 3, which is not supported",
    ),
    "largest component": (
        spleen(AFTER, {"_target_": "KeepLargestConnectedComponentd", **PRED}),
        r"\(KeepLargestConnectedComponentd\) is a transform that is not supported",
    ),
    "another output": (
        spleen(AFTER, {"_target_": "SaveImaged", "keys": "label"}),
        "changes another key than label",
    ),
    "network": (
        changed(SPLEEN, network_def={"_target_": "scripts.unest.UNesT"}),
        "network_def names scripts.unest.UNesT, which is no class of MONAI; import bundles that "
        "use MONAI's own classes",
    ),
    "network of the same name": (
        changed(SPLEEN, network_def___target_="os.UNet"),
        "network_def names os.UNet, which is no class of MONAI",
    ),
    "network of a module that begins alike": (
        changed(SPLEEN, network_def___target_="monai_own.UNet"),
        "network_def names monai_own.UNet, which is no class of MONAI",
    ),
    "network that is not listed": (
        changed(SPLEEN, network_def___target_="monai.networks.nets.AHNet"),
        r"network_def \(AHNet\) is the network monai.networks.nets.AHNet; import bundles with Bas",
    ),
    "transform of the same name": (
        changed(SPLEEN, scaling__1___target_="scripts.my_transforms.ScaleIntensityRanged"),
        r"preprocessing.transforms\[4\] names scripts.my_transforms.ScaleIntensityRanged, which",
    ),
    "compose of the same name": (
        changed(SPLEEN, preprocessing___target_="scripts.Compose"),
        "preprocessing names scripts.Compose, which is no class of MONAI",
    ),
    "decision of the same name": (
        changed(SPLEEN, **{f"{AFTER}__2___target_": "scripts.AsDiscreted"}),
        r"postprocessing.transforms\[2\] names scripts.AsDiscreted, which is no class of MONAI",
    ),
    "inferer of the same name": (
        changed(SPLEEN, inferer___target_="scripts.my.SlidingWindowInferer"),
        "inferer names scripts.my.SlidingWindowInferer, which is no class of MONAI",
    ),
    "argument that is a class": (
        changed(SPLEEN, network_def__act={"_target_": "os.system"}),
        "has act .*, which is not a plain value",
    ),
    "network that cannot be built": (
        changed(SPLEEN, network_def__depth=3),
        r"cannot be built \(TypeError: got an unexpected keyword argument 'depth'\)",
    ),
    "large network": (
        changed(SPLEEN, network_def__channels=[8, 16, 5000]),
        "has channels 5000, more than 4096",
    ),
    "deep network": (
        changed(BRATS, network_def__blocks_down=[1, 65, 1]),
        "has blocks_down 65, more than 64",
    ),
    "long list": (
        changed(SPLEEN, network_def__act=["relu", {"inplace": [True] * 65}]),
        "has act of more than 64 items",
    ),
    "plane": (
        changed(SPLEEN, network_def__spatial_dims=2),
        "has spatial_dims 2, not 3",
    ),
    "no network": (changed(SPLEEN, network_def=3), "has no section network_def"),
    "no class": (changed(SPLEEN, inferer={}), "inferer names no class"),
    "no Compose": (
        changed(SPLEEN, preprocessing___target_="OneOf"),
        r"preprocessing \(OneOf\) is no Compose",
    ),
    "no transforms": (
        changed(SPLEEN, preprocessing__transforms=3),
        "has no list of transforms",
    ),
    "python": (
        changed(SPLEEN, patch="$__import__('os').getcwd()"),
        r"inferer.roi_size is Python that is not recognised: \$__import__\('os'\).getcwd\(\); "
        "write the value itself",
    ),
    "division by zero": (changed(SPLEEN, patch="$1 / 0"), "is Python that is not recognised"),
    "product of lists": (changed(SPLEEN, patch="$[16] * 3"), "is Python that is not recognised"),
    "long python": (
        changed(SPLEEN, patch="$" + "+" * 2000 + "1"),
        r"is Python that is not recognised: \$\++\.\.\.",
    ),
    "missing reference": (
        changed(SPLEEN, inferer__roi_size="@sizes::0"),
        "inferer.roi_size refers to @sizes::0, which does not exist",
    ),
    "circle": (changed(SPLEEN, patch="@patch"), "inferer.roi_size refers to itself"),
    "list without end": (
        changed(SPLEEN, a0=[1], **doubled("+"), patch="@a20"),
        r"inferer.roi_size is Python that is not recognised: \$@a13 \+ @a13",  # 16384 items
    ),
    "number without end": (
        changed(SPLEEN, a0=2, **doubled("*"), patch="@a20"),
        r"inferer.roi_size is Python that is not recognised: \$@a5 \* @a5",  # 2^64
    ),
    "number beyond floats": (
        changed(SPLEEN, scaling__1__a_max=10**400),
        r"\(ScaleIntensityRanged\) has a_max 1000*, not a number",
    ),
    "endless": (
        changed(
            SPLEEN,
            patch=["@a0"] * 10,
            **{f"a{i}": [f"@a{i + 1}"] * 10 for i in range(9)},
            a9=1,
        ),
        "inferer.roi_size has more than 10000 items",
    ),
    "other weights": (
        changed(FULL, checkpoint="$@ckpt_dir + '/model_best.pt'"),
        r"checkpointloader \(CheckpointLoader\) has load_path \$@checkpoint, not models/model.pt; "
        "name the weights models/model.pt",
    ),
    "other weights of a handler": (
        changed(FULL, handlers=[{**ZOO["checkpointloader"], "load_path": "models/best/model.pt"}]),
        r"handlers\[0\] \(CheckpointLoader\) has load_path models/best/model.pt",
    ),
    "unknown weights": (
        changed(FULL, checkpoint="$sorted(os.listdir('models'))[0]"),
        r"checkpointloader \(CheckpointLoader\) has load_path \$@checkpoint, not models/model.pt",
    ),
    "own loader": (
        changed(FULL, checkpointloader___target_="scripts.CheckpointLoader"),
        "checkpointloader names scripts.CheckpointLoader, which is no class of MONAI",
    ),
    "two entries": (
        changed(FULL, handlers=[{**ZOO["checkpointloader"], "load_dict": {"ema": "@network"}}]),
        "CheckpointLoader loads the entries ema, model; one is supported",
    ),
    "inferer of the evaluator": (
        changed(FULL, evaluator__inferer={"_target_": "SimpleInferer"}),
        r"evaluator \(SupervisedEvaluator\) has inferer {'_target_': 'SimpleInf.*, not @inferer",
    ),
    "other inferer": (
        changed(FULL, simple={"_target_": "SimpleInferer"}, evaluator__inferer="@simple"),
        "has inferer @simple, not @inferer",
    ),
    "other postprocessing": (
        changed(FULL, evaluator__postprocessing="$scripts.more(@postprocessing)"),
        r"has postprocessing \$scripts.more\(@postprocessing\), not @postprocessing",
    ),
    "no postprocessing": (
        changed(FULL, evaluator__postprocessing=None),
        "has postprocessing None, not @postprocessing",
    ),
    "other preprocessing": (
        changed(FULL, dataset__transform={"_target_": "Compose", "transforms": []}),
        r"dataset of the evaluator \(Dataset\) has transform .*, not @preprocessing",
    ),
    "other network": (
        changed(FULL, evaluator__network="$scripts.wrap(@network)"),
        r"has network \$scripts.wrap\(@network\), not @network",
    ),
    "wrapped network": (
        changed(FULL, network="$scripts.wrap(@network_def)"),
        r"network is \$scripts.wrap\(@network_def\), not @network_def",
    ),
    "other evaluator": (
        changed(FULL, evaluator___target_="EnsembleEvaluator"),
        r"\(EnsembleEvaluator\) is not supported; import bundles with SupervisedEvaluator",
    ),
    "own iteration": (
        changed(FULL, evaluator__iteration_update="$scripts.step"),
        "has iteration_update, which is not supported",
    ),
    "macro": (changed(SPLEEN, patch="%other.json::patch"), "inferer.roi_size is a macro"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_steps_are_refused_by_name(tmp_path: Path, name: str) -> None:
    config, message = REFUSED[name]
    described = BRATS_METADATA if config["network_def"] == BRATS["network_def"] else SPLEEN_METADATA
    for part in ("configs", "models"):
        (tmp_path / part).mkdir()
    (tmp_path / "configs" / "inference.json").write_text(json.dumps(config))
    (tmp_path / "configs" / "metadata.json").write_text(json.dumps(described))
    with pytest.raises(ExportError, match=message) as caught:
        read_monai(tmp_path)
    assert str(tmp_path / "configs" / "inference.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "$lambda x: torch.where(x[[2]] > 1, 4, 0)",
        "$lambda x, y: torch.where(x[[2]] > 0, 4, 0)",
        "$lambda x: os.where(x[[2]] > 0, 4, 0)",
        "$lambda x: torch.where(y[[2]] > 0, 4, 0)",
        "$lambda x: torch.where(x[[2]] > 0, 4, os.system('x'))",
        "$lambda x: torch.where(x[[2]] > 0, 4, 0, torch.where(x[[1]] > 0, 4, 0))",
        f"$lambda x: torch.where(x[[2]] > 0, 0x{'f' * 5000}, 0)",
        f"$lambda x: torch.where(x[[0x{'f' * 5000}]] > 0, 4, 0)",
        "$lambda x: torch.where(x[[-1]] > 0, 4, 0)",
        "$lambda x: torch.where(x[[2]] > 0, 4, 0, out=3)",
        "$lambda x: 0",
        "$print(",
        "$x",
    ],
)
def test_other_lambdas_are_refused(tmp_path: Path, text: str) -> None:
    config = changed(BRATS, **{f"{AFTER}__3__func": text})
    write_bundle(tmp_path, config, BRATS_METADATA)
    with pytest.raises(ExportError, match="which is Python that is not recognised; write nested"):
        read_monai(tmp_path)


def test_channels_without_a_label_are_refused(tmp_path: Path) -> None:
    steps = BRATS["postprocessing"]["transforms"]
    write_bundle(tmp_path, changed(BRATS, **{AFTER: steps[:3]}), BRATS_METADATA)
    with pytest.raises(ExportError, match=r"writes the channels \[\] of 3 as labels"):
        read_monai(tmp_path)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({}, "network_data_format names no channels of its inputs"),
        (
            metadata(["a", "b"], ["x", "y", "z"]),
            "names 2 channels of its inputs, the network has 1",
        ),
        (metadata(["a"], ["x", "y"]), "names 2 channels of its outputs, the network has 3"),
    ],
)
def test_metadata_must_name_the_channels(tmp_path: Path, described: Json, message: str) -> None:
    write_bundle(tmp_path, SPLEEN, described)
    with pytest.raises(ExportError, match=rf"metadata.json: {message}"):
        read_monai(tmp_path)


TOO_MANY = "labels must have values from 0 to 255, .*, got 257 labels from 0 to 256"


def test_256_labels_with_the_background_fit_in_a_byte(tmp_path: Path) -> None:
    config = changed(SPLEEN, classes=256)
    write_bundle(tmp_path, config, metadata(["a"], [f"label {i}" for i in range(256)]))
    assert read_monai(tmp_path).record.task.label_values == tuple(range(256))
    config = changed(SPLEEN, classes=257)
    write_bundle(tmp_path, config, metadata(["a"], [f"label {i}" for i in range(257)]))
    with pytest.raises(ExportError, match=rf"metadata\.json: {TOO_MANY}"):
        read_monai(tmp_path)


@pytest.mark.parametrize(
    ("named", "folder", "expected"),
    [("Milz CT", "a", "milz-ct"), ("脾臓", "Spleen CT", "spleen-ct"), ("脾臓", "脾", "model")],
)
def test_a_model_has_a_name(tmp_path: Path, named: str, folder: str, expected: str) -> None:
    write_bundle(tmp_path / folder, SPLEEN, {**SPLEEN_METADATA, "name": named})
    assert read_monai(tmp_path / folder).record.name == expected


def test_folders_that_are_no_bundle_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is not a folder; give the folder of a MONAI bundle"):
        read_monai(tmp_path / "missing")
    with pytest.raises(ExportError, match=r"has no configs/inference.json, so it is no MONAI"):
        read_monai(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "inference.yaml").write_text("a: 3")
    with pytest.raises(ExportError, match=r"inference.yaml: is YAML; convert it to inference.json"):
        read_monai(tmp_path)


def test_nothing_is_written_of_a_bundle_that_is_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "model", SPLEEN, SPLEEN_METADATA)
    config = changed(SPLEEN, patch=[30, 30, 30])
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="roi_size"):
        import_monai(tmp_path / "model", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
