"""Version 3 of the manifest and specs: what each field says, and how a wrong one is named."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from attnseg import Bundle
from attnseg.runtime.errors import ConfigError
from attnseg.runtime.model.manifest import Inference, Manifest, ModelRecord
from attnseg.runtime.model.manifest_format import decode_manifest, decode_spec, encode_manifest
from attnseg.runtime.steps.preprocess import Preprocessing
from attnseg.runtime.steps.resample import Grid
from attnseg.runtime.steps.schemes import (
    ClipZScore,
    LandmarkMatching,
    Range,
    Scheme,
    SingleZScore,
    Unchanged,
    ZScore,
)
from attnseg.runtime.task import Channel, Label, Output, Task

SCHEMES: list[tuple[Scheme, dict[str, Any]]] = [
    (ZScore("nonzero"), {"scheme": "zscore", "region": "nonzero", "statistics": "double"}),
    (ZScore("all"), {"scheme": "zscore", "region": "all", "statistics": "double"}),
    (SingleZScore("filled"), {"scheme": "zscore", "region": "filled", "statistics": "single"}),
    (
        LandmarkMatching((1.0, 50.0, 99.0), (-2.0, 0.0, 2.5), "all"),
        {
            "scheme": "landmarks",
            "region": "all",
            "percentiles": [1.0, 50.0, 99.0],
            "values": [-2.0, 0.0, 2.5],
        },
    ),
    (
        ClipZScore(-958.0, 1327.0, 33.75, 320.5),
        {"scheme": "clip-zscore", "low": -958.0, "high": 1327.0, "mean": 33.75, "std": 320.5},
    ),
    (
        Range((-57.0, 164.0), None, (0.0, 1.0), True),
        {
            "scheme": "range",
            "source": [-57.0, 164.0],
            "percentiles": None,
            "target": [0.0, 1.0],
            "clip": True,
            "moments": None,
        },
    ),
    (
        Range(None, (0.5, 99.5), (-1.0, 1.0), False, (0.5, 0.25)),
        {
            "scheme": "range",
            "source": None,
            "percentiles": [0.5, 99.5],
            "target": [-1.0, 1.0],
            "clip": False,
            "moments": [0.5, 0.25],
        },
    ),
    (Unchanged(), {"scheme": "none"}),
]

REGIONS = Task(
    channels=(Channel("ct", ("",)),),
    labels=(Label("background", 0), Label("core", 1), Label("edge", 2)),
    regions={"whole": (1, 2), "core": (1,)},
    display=("ct",),
    activation="sigmoid",
    outputs=(Output("whole", 2, (0,), 0.5), Output("core", 1, (1,), 0.25)),
)


def model(**changes: Any) -> Manifest:
    """An imported model, in which no field has the value that older versions meant."""
    given: dict[str, Any] = {
        "task": REGIONS,
        "preprocessing": Preprocessing(
            orientation=None,
            grid=Grid(
                spacing_mm=(3.0, 0.75, 0.75), order=3, separate_above=3.0, back="probabilities"
            ),
            crop="nonzero",
            normalisation=(ClipZScore(-958.0, 1327.0, 33.75, 320.5),),
            order=("crop", "normalise", "resample"),
            axes=(2, 1, 0),
        ),
        "inference": Inference(
            window=(16, 32, 32),
            overlap=0.5,
            window_multiple=(8, 16, 32),
            min_voxels=0,
            placement="even",
            weights="gaussian-nnunet",
            mirror_axes=(0, 2),
            accumulate="half",
            empty_windows="run",
        ),
    }
    return replace(Bundle.default().manifest, **given | changes)


def stored(manifest: Manifest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(encode_manifest(manifest))
    return found


def test_every_field_of_an_imported_model_is_written_and_read_again() -> None:
    record = stored(model())
    assert record["format_version"] == 3
    assert record["activation"] == "sigmoid"
    assert record["outputs"] == [
        {"region": "whole", "label": 2, "channels": [0], "threshold": 0.5},
        {"region": "core", "label": 1, "channels": [1], "threshold": 0.25},
    ]
    assert (record["orientation"], record["axes"], record["crop"]) == (None, "zyx", "nonzero")
    assert record["order"] == ["crop", "normalise", "resample"]
    assert record["grid"] == {
        "shape": None,
        "spacing_mm": [3.0, 0.75, 0.75],
        "order": 3,
        "alignment": "faces",
        "separate_above": 3.0,
        "back": "probabilities",
    }
    assert record["inference"] == {
        "window": [16, 32, 32],
        "overlap": 0.5,
        "window_multiple": [8, 16, 32],
        "min_voxels": 0,
        "placement": "even",
        "weights": "gaussian-nnunet",
        "mirror_axes": [0, 2],
        "accumulate": "half",
        "empty_windows": "run",
    }
    assert decode_manifest(json.dumps(record).encode()) == model()


@pytest.mark.parametrize(
    ("axes", "name"), [((0, 1, 2), "xyz"), ((2, 1, 0), "zyx"), ((1, 2, 0), "yzx")]
)
def test_axes_are_written_by_name(axes: tuple[int, int, int], name: str) -> None:
    manifest = model(preprocessing=replace(model().preprocessing, axes=axes))
    record = stored(manifest)
    assert record["axes"] == name
    assert decode_manifest(json.dumps(record).encode()).preprocessing.axes == axes


def several(*schemes: Scheme) -> Manifest:
    """A model with one channel per scheme."""
    channels = tuple(Channel(f"c{i}", (f"_{i}",)) for i, _ in enumerate(schemes))
    return model(
        task=replace(REGIONS, channels=channels, display=("c0",)),
        preprocessing=replace(model().preprocessing, normalisation=schemes),
    )


@pytest.mark.parametrize(("scheme", "record"), SCHEMES, ids=lambda value: str(value)[:30])
def test_each_scheme_is_written_as_specified_and_read_again(
    scheme: Scheme, record: dict[str, Any]
) -> None:
    manifest = several(scheme)
    assert stored(manifest)["normalisation"] == [record]
    (again,) = decode_manifest(encode_manifest(manifest)).preprocessing.normalisation
    assert (type(again), again) == (type(scheme), scheme)


def test_each_channel_has_a_scheme_of_its_own() -> None:
    manifest = several(*(scheme for scheme, _ in SCHEMES))
    assert stored(manifest)["normalisation"] == [record for _, record in SCHEMES]
    assert decode_manifest(encode_manifest(manifest)) == manifest
    fewer = stored(manifest)
    fewer["normalisation"].pop()
    with pytest.raises(ConfigError, match=r"normalisation must have .* for 8 channels, got 7"):
        decode_manifest(json.dumps(fewer).encode())


def refuse(manifest: Manifest, path: str, value: object, message: str) -> None:
    record = target = stored(manifest)
    *parents, last = path.split(".")
    for parent in parents:
        target = target[int(parent) if parent.isdigit() else parent]
    target[last] = value
    with pytest.raises(ConfigError, match=message) as caught:
        decode_manifest(json.dumps(record).encode())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("index", "field", "value", "message"),
    [
        (0, "scheme", "z-score", r"normalisation\.0: .*'z-score'.*'clip-zscore'"),
        (0, "scheme", None, r"normalisation\.0: "),
        (0, "region", "brain", r"normalisation\.0\.zscore\.region: .*'filled' or 'all'"),
        (0, "statistics", "half", r"normalisation\.0\.zscore\.statistics: "),
        (0, "colour", "red", r"normalisation\.0\.zscore\.colour: Extra inputs"),
        (0, "low", 0, r"normalisation\.0\.zscore\.low: Extra inputs"),
        (3, "region", "filled", r"normalisation\.3\.landmarks\.region: .*'nonzero' or 'all'"),
        (3, "values", [-2, 0], "landmarks need one value per percentile"),
        (3, "values", [0, 0, 0], "landmarks must be at least two, and ascending"),
        (4, "low", "cold", r"normalisation\.4\.clip-zscore\.low: "),
        (4, "low", 1327, "clip-zscore needs finite low < high, .* got 1327, 1327, 33.75, 320.5"),
        (4, "std", 0, "clip-zscore needs .* a positive std, got -958, 1327, 33.75, 0"),
        (4, "mean", None, r"normalisation\.4\.clip-zscore\.mean: "),
        (5, "source", None, "range needs either a source or percentiles"),
        (5, "percentiles", [1, 99], "range needs either a source or percentiles"),
        (5, "source", [1, 1], r"range\.source must be two ascending numbers, got \(1\.0, 1\.0\)"),
        (5, "source", [1, 2, 3], r"normalisation\.5\.range\.source"),
        (5, "target", [1, 0], r"range\.target must be two ascending numbers, got \(1\.0, 0\.0\)"),
        (5, "clip", "maybe", r"normalisation\.5\.range\.clip: "),
        (6, "moments", [0, 0], r"range\.moments must be a mean and a positive std, got"),
        (6, "moments", [0], r"normalisation\.6\.range\.moments"),
        (6, "percentiles", [0, 101], r"range\.percentiles must ascend from 0 to 100"),
        (6, "percentiles", [50, 50], r"range\.percentiles must ascend from 0 to 100"),
        (7, "region", "all", r"normalisation\.7\.none\.region: Extra inputs"),
    ],
)
def test_a_scheme_that_breaks_a_rule_is_refused_by_name(
    index: int, field: str, value: object, message: str
) -> None:
    manifest = several(*(scheme for scheme, _ in SCHEMES))
    refuse(manifest, f"normalisation.{index}.{field}", value, message)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("normalisation", {"scheme": "zscore"}, "normalisation: "),
        ("normalisation", [], "normalisation must have a scheme"),
        ("activation", "relu", "activation: Input should be 'softmax' or 'sigmoid'"),
        ("activation", "softmax", "outputs belong to the activation sigmoid"),
        ("outputs", [], "outputs belong to the activation sigmoid"),
        ("outputs.0.region", "edge", "output edge names an unknown region"),
        ("outputs.0.label", 3, "output whole names an unknown region or label"),
        ("outputs.0.channels", [1], r"outputs must name each channel once, got channels \[1, 1\]"),
        ("outputs.1.threshold", 1, "output core needs a threshold within 0 and 1, got 1"),
        ("outputs.1.threshold", "high", r"outputs\.1\.threshold: "),
        ("outputs.1.colour", "red", r"outputs\.1\.colour"),
        ("orientation", "XYZ", "orientation XYZ does not name each axis once"),
        ("axes", "xyy", "axes must name x, y and z once, got xyy"),
        ("axes", "xy", "axes must name x, y and z once, got xy"),
        ("axes", [2, 1, 0], "axes: Input should be a valid string"),
        ("order", ["crop", "normalise"], "order must name crop, normalise and resample once"),
        ("order", ["crop", "crop", "normalise"], "order must name crop, .*, got crop, crop"),
        ("order", ["normalise", "crop", "resample"], "order must name crop before normalise"),
        ("order", ["crop", "normalise", "blur"], r"order\.2: Input should be 'resample'"),
        ("crop", "filled", "crop: Input should be 'nonzero' or 'all'"),
        ("grid.order", 2, r"grid\.order: Input should be 0, 1 or 3"),
        ("grid.alignment", "corners", r"grid\.alignment: Input should be 'faces' or 'centres'"),
        ("grid.separate_above", 0.5, "separate_above must be at least 1, got 0.5"),
        ("grid.back", "labels", r"grid\.back: Input should be 'logits' or 'probabilities'"),
        ("grid", {"shape": [8, 8, 8], "alignment": "centres"}, "centres needs a spacing_mm"),
        ("inference.placement", "random", r"inference\.placement: .*'stride' or 'even'"),
        ("inference.weights", "hann", r"inference\.weights: .*'gaussian-nnunet' or 'constant'"),
        ("inference.accumulate", "double", r"inference\.accumulate: .*'single' or 'half'"),
        ("inference.empty_windows", "blur", r"inference\.empty_windows: .*'skip' or 'run'"),
        ("inference.window_multiple", [8, 16, 0], r"inference\.window_multiple must be positive"),
        ("inference.window_multiple", [16, 32, 64], r"inference\.window is not a multiple of"),
        ("inference.window_multiple", [16, 32], r"inference\.window_multiple"),
        ("inference.mirror_axes", [0, 3], r"inference\.mirror_axes must be distinct axes from 0"),
        ("inference.mirror_axes", [1, 1], r"inference\.mirror_axes must be distinct axes from 0"),
        ("inference.mirror_axes", ["x"], r"inference\.mirror_axes\.0: "),
    ],
    ids=str,
)
def test_a_field_that_breaks_a_rule_is_refused_by_name(
    path: str, value: object, message: str
) -> None:
    refuse(model(), path, value, message)


@pytest.mark.parametrize(
    "field", ["activation", "outputs", "orientation", "axes", "order", "crop", "grid"]
)
def test_every_field_of_version_3_must_be_there(field: str) -> None:
    record = stored(model())
    del record[field]
    with pytest.raises(ConfigError, match=f"^{field}: Field required$"):
        decode_manifest(json.dumps(record).encode())


@pytest.mark.parametrize("version", [4, 0, "3", None])
def test_a_version_is_refused_before_the_fields_that_it_may_not_have(version: object) -> None:
    record = {**stored(model()), "format_version": version}
    del record["activation"]
    with pytest.raises(ConfigError, match=r"^format_version "):
        decode_manifest(json.dumps(record).encode())


SPEC: dict[str, Any] = {
    "name": "two channels",
    "channels": [{"name": "a", "suffixes": ["_a"]}, {"name": "b", "suffixes": ["_b"]}],
    "labels": [{"name": "background", "value": 0}, {"name": "object", "value": 1}],
    "inference": {"window": [8, 8, 8]},
}


def spec(**changes: Any) -> ModelRecord:
    return decode_spec(json.dumps({**SPEC, **changes}).encode())


def test_a_spec_without_its_optional_fields_has_these() -> None:
    found = spec()
    assert found.preprocessing == Preprocessing("RAS", None, "nonzero", (ZScore("nonzero"),) * 2)
    assert found.inference == Inference((8, 8, 8), 0.25, 1, 0)
    assert found.task.regions == {"object": (1,)}
    assert (found.task.activation, found.task.outputs) == ("softmax", ())


@pytest.mark.parametrize(("scheme", "record"), SCHEMES, ids=lambda value: str(value)[:30])
def test_one_scheme_of_a_spec_stands_for_every_channel(
    scheme: Scheme, record: dict[str, Any]
) -> None:
    assert spec(normalisation=record).preprocessing.normalisation == (scheme, scheme)


def test_fields_of_a_scheme_have_defaults_in_a_spec() -> None:
    found = spec(normalisation=[{"scheme": "zscore"}, {"scheme": "range", "source": [0, 255]}])
    assert found.preprocessing.normalisation == (ZScore("nonzero"), Range((0.0, 255.0)))


def test_a_spec_may_list_a_scheme_for_each_channel() -> None:
    (first, one), (second, other) = SCHEMES[2], SCHEMES[4]
    assert spec(normalisation=[one, other]).preprocessing.normalisation == (first, second)
    with pytest.raises(ConfigError, match=r"normalisation must have .* for 2 channels, got 1"):
        spec(normalisation=[one])
    with pytest.raises(ConfigError, match=r"normalisation\.1: .*'blur'"):
        spec(normalisation=[one, {"scheme": "blur"}])


def test_the_normalisation_of_older_specs_is_taken_with_its_crop() -> None:
    found = spec(normalisation={"foreground": "all", "landmarks": None}).preprocessing
    assert (found.crop, found.normalisation) == ("all", (ZScore("all"),) * 2)
    found = spec(normalisation={"foreground": "all"}).preprocessing
    assert (found.crop, found.normalisation) == ("all", (ZScore("all"),) * 2)
    rows = [[-1.0, 1.0], [-2.0, 2.0]]
    landmarks = {"percentiles": [10.0, 90.0], "values": rows}
    found = spec(normalisation={"landmarks": landmarks}).preprocessing
    assert found.crop == "nonzero"
    assert found.normalisation == (
        LandmarkMatching((10.0, 90.0), (-1.0, 1.0)),
        LandmarkMatching((10.0, 90.0), (-2.0, 2.0)),
    )


@pytest.mark.parametrize(
    ("normalisation", "message"),
    [
        ({"foreground": "filled"}, r"^normalisation\.foreground: "),
        ({"colour": "red"}, r"^normalisation\.colour: Extra inputs"),
        ({"landmarks": {"percentiles": [1, 9]}}, r"^normalisation\.landmarks\.values: "),
        ({"landmarks": {"percentiles": [1, 9], "values": [[0, 1]]}}, "normalisation must have"),
        ({"scheme": "blur"}, r"^normalisation\.0: .*'blur'"),
        ("zscore", "^normalisation: "),
        (None, "^normalisation: "),
    ],
    ids=str,
)
def test_a_normalisation_of_a_spec_that_breaks_a_rule_is_named(
    normalisation: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        spec(normalisation=normalisation)


def test_a_spec_that_crops_to_another_region_than_its_older_normalisation_is_refused() -> None:
    """Otherwise one of both would be ignored."""
    old = {"foreground": "nonzero", "landmarks": None}
    assert spec(crop="nonzero", normalisation=old).preprocessing.crop == "nonzero"
    with pytest.raises(ConfigError, match="crop"):
        spec(crop="all", normalisation=old)


def test_a_spec_may_have_every_field_of_version_3() -> None:
    record = stored(model())
    own = ("format", "format_version", "created_with", "network", "training", "validation")
    given = {name: value for name, value in record.items() if name not in (*own, "budget", "files")}
    found = decode_spec(json.dumps(given).encode())
    expected = model()
    for name in ("task", "preprocessing", "inference", "spacing_mm", "foreground_ml"):
        assert getattr(found, name) == getattr(expected, name)
