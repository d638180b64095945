"""Preprocessing of a MONAI bundle: the transforms before the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from attnseg.imports.monai.config import Component, Config, is_number
from attnseg.imports.monai.networks import BuiltNetwork
from attnseg.runtime.errors import ConfigError, ExportError
from attnseg.runtime.steps.preprocess import Preprocessing, PreprocessingStep
from attnseg.runtime.steps.resample import Grid, Quantity, Spacing
from attnseg.runtime.steps.schemes import Range, Scheme, Unchanged, ZScore

_READERS = (None, "NibabelReader", "ITKReader", "nibabelreader", "itkreader")
_AXIS_LABELS = [["L", "R"], ["P", "A"], ["I", "S"]]


@dataclass
class Before:
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
    def of(cls, config: Config, built: BuiltNetwork) -> Before:
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


def keep_type(step: Component) -> None:
    """Refuse a transform of data types unless it gives float32."""
    step.expect_float32()
    step.ignore("data_type", "device", "wrap_sequence", "track_meta")


_IGNORED: dict[str, Callable[[Component], None]] = {
    "CastToTyped": keep_type,
    "EnsureChannelFirstd": _put_channel_first,
    "EnsureTyped": keep_type,
    "LoadImaged": _load,
    "ToTensord": keep_type,
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
