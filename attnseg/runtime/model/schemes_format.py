"""JSON format of normalisation schemes, in manifests and checkpoints; see `manifest_format`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from attnseg.runtime.errors import ConfigError
from attnseg.runtime.steps.foreground import Crop, Foreground
from attnseg.runtime.steps.schemes import (
    ClipZScore,
    LandmarkMatching,
    Range,
    Scheme,
    SingleZScore,
    Statistics,
    Unchanged,
    ZScore,
)


class JsonRecord(BaseModel):
    """Base class of JSON objects; unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LandmarksJson(JsonRecord):
    """Landmarks of all channels; `values[c][p]` is the z-score of channel c at percentile p."""

    percentiles: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]


class NormalisationJson(JsonRecord):
    """Normalisation of all channels in versions 1 and 2; all fields are required."""

    foreground: Crop
    landmarks: LandmarksJson | None

    def schemes(self, channels: int) -> tuple[Scheme, ...]:
        """Normalisation scheme of each channel."""
        if self.landmarks is None:
            return (ZScore(self.foreground),) * channels
        percentiles = self.landmarks.percentiles
        return tuple(
            LandmarkMatching(percentiles, row, self.foreground) for row in self.landmarks.values
        )


def encode_normalisation(schemes: tuple[Scheme, ...]) -> dict[str, Any]:
    """Convert schemes of one kind to JSON values of version 2, which checkpoints store.

    Raises:
        ConfigError: Version 2 cannot represent the schemes.
    """
    first = schemes[0]
    landmarks = None
    if isinstance(first, LandmarkMatching):
        rows = [s.values for s in schemes if isinstance(s, LandmarkMatching)]
        landmarks = {"percentiles": first.percentiles, "values": rows}
    record = {"foreground": first.foreground, "landmarks": landmarks}
    if NormalisationJson.model_validate(record).schemes(len(schemes)) != schemes:
        raise ConfigError("normalisation: a checkpoint has one scheme for all channels")
    return record


class ZScoreJson(JsonRecord):
    """Zero mean and unit variance of a region."""

    scheme: Literal["zscore"]
    region: Foreground = "nonzero"
    statistics: Statistics = "double"

    def decode(self) -> Scheme:
        """The scheme."""
        return (SingleZScore if self.statistics == "single" else ZScore)(self.region)


class LandmarkJson(JsonRecord):
    """Histogram matching: the z-score of the training set at each percentile."""

    scheme: Literal["landmarks"]
    region: Crop = "nonzero"
    percentiles: tuple[float, ...]
    values: tuple[float, ...]

    def decode(self) -> Scheme:
        """The scheme."""
        return LandmarkMatching(self.percentiles, self.values, self.region)


class ClipZScoreJson(JsonRecord):
    """Clipping, and a fixed mean and standard deviation, for CT."""

    scheme: Literal["clip-zscore"]
    low: float
    high: float
    mean: float
    std: float

    def decode(self) -> Scheme:
        """The scheme."""
        return ClipZScore(self.low, self.high, self.mean, self.std)


class RangeJson(JsonRecord):
    """Linear map of a range of intensities, or of percentiles."""

    scheme: Literal["range"]
    source: tuple[float, float] | None = None
    percentiles: tuple[float, float] | None = None
    target: tuple[float, float] = (0.0, 1.0)
    clip: bool = False
    moments: tuple[float, float] | None = None

    def decode(self) -> Scheme:
        """The scheme."""
        return Range(self.source, self.percentiles, self.target, self.clip, self.moments)


class NoneJson(JsonRecord):
    """No normalisation."""

    scheme: Literal["none"]

    def decode(self) -> Scheme:
        """The scheme."""
        return Unchanged()


SchemeJson = Annotated[
    ZScoreJson | LandmarkJson | ClipZScoreJson | RangeJson | NoneJson,
    Field(discriminator="scheme"),
]


def encode_scheme(scheme: Scheme) -> SchemeJson:
    """Convert a scheme to its JSON object of version 3."""
    if isinstance(scheme, LandmarkMatching):
        return LandmarkJson(
            scheme="landmarks",
            region=scheme.foreground,
            percentiles=scheme.percentiles,
            values=scheme.values,
        )
    if isinstance(scheme, ClipZScore):
        numbers = {name: getattr(scheme, name) for name in ("low", "high", "mean", "std")}
        return ClipZScoreJson(scheme="clip-zscore", **numbers)
    if isinstance(scheme, Range):
        names = ("source", "percentiles", "target", "clip", "moments")
        return RangeJson(scheme="range", **{name: getattr(scheme, name) for name in names})
    if isinstance(scheme, Unchanged):
        return NoneJson(scheme="none")
    statistics: Statistics = "single" if isinstance(scheme, SingleZScore) else "double"
    return ZScoreJson(scheme="zscore", region=scheme.foreground, statistics=statistics)
