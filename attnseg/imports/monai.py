"""Import of a MONAI bundle: its transforms and inferer as a record, and its network.

Source: MONAI 1.6.1 and the inference configs of its model zoo. `configs/inference.json` is parsed
and never evaluated. A bundle is imported if the runtime does what its sections `preprocessing`,
`inferer` and `postprocessing` say, voxel by voxel; otherwise, the error names the first step that
it does not do.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnseg.imports.folder import read_json, read_weights
from attnseg.imports.monai_config import Component, Config, is_number
from attnseg.imports.monai_networks import BuiltNetwork, build_monai
from attnseg.imports.networks import ImportedModel, load_weights
from attnseg.runtime.errors import ConfigError, ExportError
from attnseg.runtime.geometry import shape_of
from attnseg.runtime.model.manifest import Inference, ModelRecord
from attnseg.runtime.steps.normalise import Range, Scheme, Unchanged, ZScore
from attnseg.runtime.steps.preprocess import Preprocessing, PreprocessingStep
from attnseg.runtime.steps.resample import Grid, Quantity, Spacing
from attnseg.runtime.task import BRATS_CHANNELS, Activation, Channel, Label, Output, Task

_READERS = (None, "NibabelReader", "ITKReader", "nibabelreader", "itkreader")
_AXIS_LABELS = [["L", "R"], ["P", "A"], ["I", "S"]]
_MOST_LABELS = 255
_BRATS_LABELS = {
    "whole tumor": "oedema",
    "tumor core": "necrotic core",
    "enhancing tumor": "enhancing tumour",
}
"""Regions of BraTS, each within the one before, and the label of what the next leaves of it."""


def read_monai(folder: Path) -> ImportedModel:
    """Read a MONAI bundle.

    Args:
        folder: The folder, with `configs/metadata.json`, `configs/inference.json` and
            `models/model.pt`.

    Raises:
        ExportError: The folder is no such bundle, or the bundle needs something that the runtime
            does not have; the cause names the step and the argument.
    """
    path = _config_file(folder)
    metadata = read_json(folder / "configs" / "metadata.json")
    try:
        return _read(folder, Config(path), metadata)
    except ConfigError as error:
        raise ExportError(f"{path}: {error}") from error


def _config_file(folder: Path) -> Path:
    if not folder.is_dir():
        raise ExportError(f"{folder}: is not a folder", "give the folder of a MONAI bundle")
    path = folder / "configs" / "inference.json"
    if path.is_file():
        return path
    if other := sorted(path.parent.glob("inference.y*ml")):
        raise ExportError(f"{other[0]}: is YAML", f"convert it to {path.name}")
    raise ExportError(
        f"{folder}: has no configs/inference.json, so it is no MONAI bundle",
        "give the folder that holds configs/ and models/",
    )


def _read(folder: Path, config: Config, metadata: dict[str, Any]) -> ImportedModel:
    component = config.component("network_def", "network")
    kind = component.name
    built = build_monai(component)
    before = _Before.of(config, built)
    after = _After.of(config, before)
    preprocessing = before.preprocessing(after.back)
    inference = _inference(config, built)
    task = _Described(folder, metadata, before.image, built).task(after)
    file = folder / "models" / "model.pt"
    network = load_weights(file, built.network, _state(read_weights(file)))
    name = str(metadata.get("name") or folder.resolve().name)
    record = ModelRecord(
        name=re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower(),
        description=str(metadata.get("description") or f"MONAI bundle {name}"),
        intended_use=str(metadata.get("intended_use") or "research use only, not for clinical use"),
        task=task,
        spacing_mm=before.spacing_mm,
        preprocessing=preprocessing,
        inference=inference,
    )
    origin = {
        "framework": "MONAI",
        "bundle": name,
        "version": str(metadata.get("version", "")),
        "network": kind,
    }
    return ImportedModel(record, network, origin)


def _state(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """Weights of a checkpoint, of which `CheckpointLoader` takes the entry `model`."""
    for key in ("model", "state_dict"):
        if isinstance(own := stored.get(key), Mapping):
            return own
    return stored


@dataclass
class _Before:
    """What the transforms before the network do.

    Attributes:
        channels: Number of input channels.
        image: Key of the image.
        orientation: Axis codes that the image is turned to.
        spacing_mm: Voxel size that it is resampled to.
        schemes: Normalisation scheme of each channel.
        order: Order of resampling and normalisation.
    """

    channels: int
    image: str = "image"
    orientation: str | None = None
    spacing_mm: Spacing | None = None
    schemes: tuple[Scheme, ...] = ()
    order: list[PreprocessingStep] = field(default_factory=list)

    @classmethod
    def of(cls, config: Config, built: BuiltNetwork) -> _Before:
        """Read the section `preprocessing`."""
        found = cls(built.channels)
        steps = config.transforms("preprocessing")
        if not steps or steps[0].name != "LoadImaged":
            raise ExportError(f"{config.path}: preprocessing does not start with LoadImaged")
        for step in steps:
            if step.name not in (*_IGNORED, *_SCHEMES, "Orientationd", "Spacingd"):
                step.refuse("is a transform that is not supported")
            key = step.key()
            if step.name == "LoadImaged":
                found.image = key
            elif key != found.image:
                step.refuse(f"changes {key}, the image is {found.image}")
            found._take(step)
            step.done()
        return found

    def _take(self, step: Component) -> None:
        if step.name in _IGNORED:
            _IGNORED[step.name](step)
        elif step.name in _SCHEMES:
            if self.schemes:
                step.refuse("is the second normalisation; one is supported")
            try:
                self.schemes = _SCHEMES[step.name](step, self.channels)
            except ConfigError as error:
                step.refuse(error.cause)
            self.order.append("normalise")
        elif step.name == "Orientationd":
            self._turn(step)
        else:
            self._resample(step)

    def _turn(self, step: Component) -> None:
        if self.orientation or self.spacing_mm:
            step.refuse("comes after Orientationd or Spacingd")
        step.expect("as_closest_canonical", False)
        if step.take("labels", _AXIS_LABELS) not in (None, _AXIS_LABELS):
            step.refuse("has labels of axes; those of NIfTI are supported")
        self.orientation = str(step.take("axcodes")).upper()

    def _resample(self, step: Component) -> None:
        if self.spacing_mm:
            step.refuse("is the second resampling; one is supported")
        step.expect("mode", "bilinear")
        step.expect("padding_mode", "border")
        for name in ("diagonal", "scale_extent", "recompute_affine"):
            step.expect(name, False)
        step.ignore("align_corners")  # of the same positions
        edges = step.numbers("pixdim")
        x, y, z = (edges + edges[-1:] * 2)[:3]
        if min(x, y, z) <= 0:
            step.refuse(f"has pixdim {edges}; positive voxel sizes are supported")
        self.spacing_mm = (float(x), float(y), float(z))
        self.order.append("resample")

    def preprocessing(self, back: Quantity) -> Preprocessing:
        """The steps, with the quantity that is resampled to the scan's grid."""
        grid = None
        if self.spacing_mm is not None:
            grid = Grid(spacing_mm=self.spacing_mm, alignment="centres", back=back)
        resampled_last = self.order == ["normalise", "resample"]
        return Preprocessing(
            orientation=self.orientation,
            grid=grid,
            crop="all",
            normalisation=self.schemes or (Unchanged(),) * self.channels,
            order=("crop", "normalise", "resample")
            if resampled_last
            else ("resample", "crop", "normalise"),
        )


def _load(step: Component) -> None:
    step.expect("reader", *_READERS)
    step.expect_float32()
    step.ignore("image_only", "ensure_channel_first", "meta_keys", "meta_key_postfix")
    step.ignore("overwriting", "simple_keys", "prune_meta_pattern", "prune_meta_sep", "expanduser")


def _put_channel_first(step: Component) -> None:
    step.expect("channel_dim", None, "no_channel", -1)
    step.ignore("strict_check", "meta_keys", "meta_key_postfix")


def _keep_type(step: Component) -> None:
    step.expect_float32()
    step.ignore("data_type", "device", "wrap_sequence", "track_meta")


_IGNORED: dict[str, Callable[[Component], None]] = {
    "CastToTyped": _keep_type,
    "EnsureChannelFirstd": _put_channel_first,
    "EnsureTyped": _keep_type,
    "LoadImaged": _load,
    "ToTensord": _keep_type,
}
"""Transforms that change no voxel."""


def _per_channel(step: Component, channels: int) -> None:
    """Refuse statistics over all channels together."""
    if not step.flag("channel_wise", False) and channels > 1:
        step.refuse(f"is computed over all {channels} channels; channel_wise is supported")


def _normalize_intensity(step: Component, channels: int) -> tuple[Scheme, ...]:
    step.expect_float32()
    nonzero = step.flag("nonzero", False)
    means, deviations = step.take("subtrahend"), step.take("divisor")
    if means is None and deviations is None:
        _per_channel(step, channels)
        return (ZScore("nonzero" if nonzero else "all"),) * channels
    step.ignore("channel_wise")
    if nonzero or means is None or deviations is None:
        step.refuse("has subtrahend or divisor; both are supported, without nonzero")
    pairs = zip(*(_each(step, value, channels) for value in (means, deviations)), strict=True)
    return tuple(Range(source=(mean, mean + deviation)) for mean, deviation in pairs)


def _each(step: Component, value: Any, channels: int) -> list[float]:
    """One number for each channel."""
    numbers = value if isinstance(value, list) else [value] * channels
    if len(numbers) != channels or not all(is_number(number) for number in numbers):
        step.refuse(f"has {value!r}, not a number for each of {channels} channels")
    return [float(number) for number in numbers]


def _target(step: Component, clip: bool) -> tuple[float, float]:
    low, high = step.take("b_min"), step.take("b_max")
    if low is None and high is None and not clip:
        return 0.0, 1.0
    if not (is_number(low) and is_number(high)):
        step.refuse(f"has b_min {low!r} and b_max {high!r}; two numbers are supported")
    return float(low), float(high)


def _scale_range(step: Component, channels: int) -> tuple[Scheme, ...]:
    step.expect_float32()
    clip = step.flag("clip", False)
    source = step.number("a_min"), step.number("a_max")
    return (Range(source=source, target=_target(step, clip), clip=clip),) * channels


def _scale_percentiles(step: Component, channels: int) -> tuple[Scheme, ...]:
    step.expect_float32()
    step.expect("relative", False)
    _per_channel(step, channels)
    clip = step.flag("clip", False)
    percent = step.number("lower"), step.number("upper")
    return (Range(percentiles=percent, target=_target(step, clip), clip=clip),) * channels


def _scale(step: Component, channels: int) -> tuple[Scheme, ...]:
    step.expect_float32()
    step.expect("factor", None)
    _per_channel(step, channels)
    target = step.number("minv", 0.0), step.number("maxv", 1.0)
    return (Range(percentiles=(0.0, 100.0), target=target),) * channels


_SCHEMES: dict[str, Callable[[Component, int], tuple[Scheme, ...]]] = {
    "NormalizeIntensityd": _normalize_intensity,
    "ScaleIntensityRangePercentilesd": _scale_percentiles,
    "ScaleIntensityRanged": _scale_range,
    "ScaleIntensityd": _scale,
}


def _inference(config: Config, built: BuiltNetwork) -> Inference:
    """Options of the inferer, which must be a `SlidingWindowInferer`."""
    step = config.component("inferer")
    if step.name != "SlidingWindowInferer":
        step.refuse("is not supported", "import bundles with SlidingWindowInferer")
    sizes = step.numbers("roi_size")
    window: Sequence[Any] = sizes * 3 if len(sizes) == 1 else sizes
    multiple = built.window_multiple
    if len(window) != 3 or any(
        not isinstance(w, int) or w < 1 or w % m for w, m in zip(window, multiple, strict=True)
    ):
        step.refuse(f"has roi_size {sizes}; the network takes three multiples of {list(multiple)}")
    overlaps = set(step.numbers("overlap", 0.25))
    if len(overlaps) > 1:
        step.refuse("has different overlaps along the axes")
    weights = str(step.take("mode", "constant"))
    if weights not in ("constant", "gaussian"):
        step.refuse(f"has mode {weights!r}, which is not supported")
    step.expect("sigma_scale", 0.125)
    step.expect("padding_mode", "constant")
    step.expect("cval", 0.0, 0)
    step.expect("with_coord", False)
    step.ignore("sw_batch_size", "sw_device", "device", "progress", "cache_roi_weight_map")
    step.ignore("cpu_thresh", "buffer_steps", "buffer_dim")
    step.done()
    return Inference(
        window=shape_of(window),
        overlap=overlaps.pop(),
        window_multiple=multiple,
        min_voxels=0,
        placement="stride",
        weights="gaussian" if weights == "gaussian" else "constant",
        accumulate="single",
        empty_windows="run",
    )


@dataclass
class _After:
    """What the transforms after the network do.

    Attributes:
        activation: Function from logits to probabilities; None if none is applied.
        inverted: Whether the outputs were returned to the scan's grid.
        back: Quantity that was returned.
        threshold: Probability above which a channel is written; None for argmax.
        decided: Whether a label or a channel was decided.
        written: Channel and label of each region in the order of writing; empty for one channel.
    """

    activation: Activation | None = None
    inverted: bool = False
    back: Quantity = "logits"
    threshold: float | None = None
    decided: bool = False
    written: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, config: Config, before: _Before) -> _After:
        """Read the section `postprocessing`."""
        found, keys = cls(), set[str]()
        for step in config.transforms("postprocessing"):
            keys.add(step.key())
            if len(keys) > 1:
                step.refuse(f"changes another key than {min(keys)}")
            found._take(step, before)
            step.done()
        if not found.decided:
            raise ExportError(f"{config.path}: postprocessing has no AsDiscreted")
        if before.spacing_mm and not found.inverted:
            raise ExportError(
                f"{config.path}: postprocessing has no Invertd, so labels stay on the grid of "
                "Spacingd",
                "add Invertd before AsDiscreted",
            )
        return found

    def _take(self, step: Component, before: _Before) -> None:
        match step.name:
            case "EnsureTyped" | "ToTensord":
                _keep_type(step)
            case "Activationsd":
                self._activate(step)
            case "Invertd":
                self._invert(step, before)
            case "AsDiscreted":
                self._decide(step)
            case "Lambdad":
                self._write(step)
            case "SaveImaged":
                _save(step)
            case _:
                step.refuse("is a transform that is not supported")

    def _activate(self, step: Component) -> None:
        if self.activation or self.decided:
            step.refuse("comes after an activation or AsDiscreted")
        kinds = [name for name in ("softmax", "sigmoid") if step.flag(name, False)]
        if len(kinds) != 1:
            step.refuse("needs either softmax or sigmoid")
        step.expect("other", None)
        self.activation = "softmax" if kinds == ["softmax"] else "sigmoid"

    def _invert(self, step: Component, before: _Before) -> None:
        reference = str(step.raw("transform")).removeprefix("$").strip()
        if reference != "@preprocessing":
            step.refuse(f"has transform {reference}, not @preprocessing")
        step.expect("orig_keys", before.image)
        step.expect("post_func", None)
        nearest = step.flag("nearest_interp", True)
        step.ignore("meta_keys", "orig_meta_keys", "meta_key_postfix", "to_tensor", "device")
        if before.spacing_mm and (nearest or self.decided):
            step.refuse("resamples labels", "set nearest_interp to false, before AsDiscreted")
        self.inverted = True
        self.back = "probabilities" if self.activation else "logits"

    def _decide(self, step: Component) -> None:
        if self.decided:
            step.refuse("is the second AsDiscreted")
        argmax = step.flag("argmax", False)
        threshold = step.take("threshold")
        if argmax == (threshold is not None):
            step.refuse("needs either argmax or threshold")
        if (self.activation == "sigmoid") == argmax:
            step.refuse("needs argmax after softmax or no activation, or threshold after sigmoid")
        if not argmax and not (is_number(threshold) and 0 < threshold < 1):
            step.refuse(f"has threshold {threshold!r}, not a number within 0 and 1")
        step.expect("to_onehot", None)
        step.expect("rounding", None)
        self.threshold = None if argmax else float(threshold)
        self.decided = True

    def _write(self, step: Component) -> None:
        if self.threshold is None or self.written:
            step.refuse("is supported once, after AsDiscreted with a threshold")
        step.expect("overwrite", True)
        text = str(step.raw("func"))
        written = _written(text)
        if written is None:
            step.refuse(
                f"has func {text[:160]}, which is Python that is not recognised",
                "write nested torch.where(x[[CHANNEL]] > 0, LABEL, OTHERWISE), the last 0",
            )
        self.written = written


def _save(step: Component) -> None:
    step.expect("scale", None)
    step.expect("channel_dim", 0)
    step.ignore("output_dir", "output_postfix", "output_ext", "output_dtype", "resample", "mode")
    step.ignore("padding_mode", "dtype", "squeeze_end_dims", "data_root_dir", "separate_folder")
    step.ignore("print_log", "output_format", "meta_keys", "meta_key_postfix", "writer")
    step.ignore("output_name_formatter", "folder_layout", "savepath_in_metadict")


def _written(text: str) -> tuple[tuple[int, int], ...] | None:
    """Channel and label of each `where` of a lambda, the innermost first; None if it differs."""
    try:
        tree = ast.parse(text.removeprefix("$").strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(tree, ast.Lambda) or len(tree.args.args) != 1:
        return None
    image, node, found = tree.args.args[0].arg, tree.body, list[tuple[int, int]]()
    while not (isinstance(node, ast.Constant) and node.value == 0):
        pattern = rf"(?:torch|np|numpy)\.where\({image}\[\[(\d+)\]\] > 0, (\d+), (.+)\)"
        matched = re.fullmatch(pattern, ast.unparse(node))
        if not (matched and isinstance(node, ast.Call) and len(node.args) == 3):
            return None
        found.append((int(matched[1]), int(matched[2])))
        node = node.args[2]
    return tuple(reversed(found)) or None


@dataclass(frozen=True)
class _Described:
    """Channels and outputs as `metadata.json` names them, and the network counts them."""

    folder: Path
    metadata: dict[str, Any]
    image: str
    built: BuiltNetwork

    def task(self, after: _After) -> Task:
        """Channels, labels and regions.

        Raises:
            ExportError: Names are missing, or their number is not that of the network's channels.
        """
        channels = self._channels()
        shown = (channels[0].name,)
        if after.threshold is None:
            names = self._names("outputs", "pred", self.built.outputs)
            if len(names) > _MOST_LABELS:
                raise self._error(f"{len(names)} labels, and at most {_MOST_LABELS} fit in a byte")
            labels = tuple(Label(name, index) for index, name in enumerate(names))
            return Task(channels, labels, {n.name: (n.value,) for n in labels[1:]}, shown)
        names, written = self._names("outputs", "pred", self.built.outputs), after.written
        if not written and len(names) == 1:
            written = ((0, 1),)
        regions, labels = self._regions(names, written)
        outputs = tuple(
            Output(names[channel], label, (channel,), after.threshold) for channel, label in written
        )
        return Task(channels, labels, regions, shown, "sigmoid", outputs)

    def _regions(
        self, names: Sequence[str], written: Sequence[tuple[int, int]]
    ) -> tuple[dict[str, tuple[int, ...]], tuple[Label, ...]]:
        """Label values of each region, and the labels.

        A region has the label that its channel writes. The metadata do not say whether regions
        contain others, except that those of BraTS do.
        """
        if sorted(channel for channel, _ in written) != list(range(len(names))):
            raise self._error(
                f"postprocessing writes the channels {[channel for channel, _ in written]} of "
                f"{len(names)} as labels; each must be written once",
                "add a Lambdad as that of brats_mri_segmentation",
            )
        values = [label for _, label in written]
        named = {names[channel]: label for channel, label in written}
        regions: dict[str, tuple[int, ...]] = {name: (named[name],) for name in names}
        texts = {label: name for name, label in named.items()}
        if [name.lower() for name in named] == list(_BRATS_LABELS):
            regions = {names[c]: tuple(values[i:]) for i, (c, _) in enumerate(written)}
            texts = dict(zip(values, _BRATS_LABELS.values(), strict=True))
        background = Label("background", 0)
        return regions, (background, *(Label(texts[v], v) for v in sorted(set(values))))

    def _channels(self) -> tuple[Channel, ...]:
        given, count = self._given("inputs", self.image), self.built.channels
        names = self._names("inputs", self.image, count)
        suffixes = [_suffixes(name) for name in given]
        if len(set(suffixes)) < count or count == 1:  # the volumes of one file
            suffixes = [("",)] * count
        return tuple(Channel(*both) for both in zip(names, suffixes, strict=True))

    def _names(self, side: str, key: str, count: int) -> list[str]:
        """Names of the channels of an input or output, made distinct."""
        names = self._given(side, key)
        if len(names) == 1:
            names *= count
        if len(names) != count:
            raise self._error(f"names {len(names)} channels of its {side}, the network has {count}")
        return [n if names.count(n) == 1 else f"{n} {i}" for i, n in enumerate(names)]

    def _given(self, side: str, key: str) -> list[str]:
        try:
            known = self.metadata["network_data_format"][side]
            own = known[key] if key in known else next(iter(known.values()))
            given = own["channel_def"]
            return [" ".join(str(given[index]).split()) for index in sorted(given, key=int)]
        except (KeyError, TypeError, AttributeError, ValueError, StopIteration) as error:
            raise self._error(f"network_data_format names no channels of its {side}") from error

    def _error(self, cause: str, mend: str = "") -> ExportError:
        return ExportError(f"{self.folder / 'configs' / 'metadata.json'}: {cause}", mend)


def _suffixes(name: str) -> tuple[str, ...]:
    """File-name suffixes of a channel; those of BraTS stand for each other."""
    word = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    own = (f"_{word}", f"-{word}")
    known = (channel.suffixes for channel in BRATS_CHANNELS)
    return next((suffixes for suffixes in known if own[0] in suffixes), own)
