"""Options are checked and completed once, by `resolve`."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from attnseg import Bundle, SegmentOptions
from attnseg.runtime.errors import ConfigError
from attnseg.runtime.options import Plan, available_threads, resolve
from attnseg.runtime.steps.windows import Blending


def plan(**options: object) -> Plan:
    return resolve(SegmentOptions(**options), Bundle.default().manifest)  # type: ignore[arg-type]


def test_what_is_left_out_is_the_models_own_value() -> None:
    model = Bundle.default().manifest
    found = plan()
    assert found.windows.window == model.inference.window
    assert found.windows.overlap == model.inference.overlap
    assert found.min_voxels == model.inference.min_voxels
    assert found.preprocessing == model.preprocessing
    assert found.task == model.task
    assert found.threads == available_threads()


def test_what_is_given_replaces_it() -> None:
    found = plan(window=32, overlap=0.0, min_voxels=0, threads=3, tta="mirror8", fuse="mean")
    assert found.windows.window == found.engine.window == (32, 32, 32)
    assert (found.windows.overlap, found.min_voxels, found.threads) == (0.0, 0, 3)
    assert len(found.transforms) == 8
    assert found.settings() == {
        "tta": "mirror8",
        "fuse": "mean",
        "window": [32, 32, 32],
        "overlap": 0.0,
        "empty_windows": "skip",
        "min_voxels": 0,
        "resample": "auto",
    }
    assert plan(window="full").windows.window is None
    assert plan(window="full").settings()["window"] == "full"


def test_passes_are_fused_by_vote_unless_regions_may_overlap() -> None:
    assert plan(tta="paper").fuse == "vote"
    assert plan(tta="paper", decide="threshold").fuse == "mean"
    assert plan(tta="paper", probabilities=True).fuse == "mean"
    assert plan(decide="threshold", fuse="vote").fuse == "vote"  # of a single pass


def test_a_decision_that_is_not_the_models_is_one_of_the_settings() -> None:
    assert not {"decide", "probabilities"} & set(plan().settings())
    assert not {"decide", "probabilities"} & set(plan(decide="argmax").settings())
    found = plan(decide="threshold", probabilities=True)
    assert (found.settings()["decide"], found.settings()["probabilities"]) == ("threshold", True)
    assert [output.label for output in found.decision.outputs] == [2, 1, 4]


def test_probabilities_are_refused_where_there_are_no_regions() -> None:
    manifest = Bundle.default().manifest
    without = replace(manifest, task=replace(manifest.task, regions={}))
    assert not resolve(SegmentOptions(), without).probabilities
    with pytest.raises(ConfigError, match=r"probabilities .*regions"):
        resolve(SegmentOptions(probabilities=True), without)


def test_mirror_axes_of_the_model_are_used_unless_other_passes_are_asked_for() -> None:
    manifest = Bundle.default().manifest
    assert (plan().tta, plan().windows.blending.mirrors) == ("none", ((),))
    assert len(plan(tta="model").transforms) == 1
    mirrored = replace(manifest, inference=replace(manifest.inference, mirror_axes=(0, 1)))
    found = resolve(SegmentOptions(), mirrored)
    assert (found.tta, len(found.transforms)) == ("model", 1)
    assert found.windows.blending.mirrors == ((), (0,), (1,), (0, 1))
    for tta, passes in (("none", 1), ("mirror8", 8)):
        found = resolve(SegmentOptions(tta=tta), mirrored)
        assert (found.tta, len(found.transforms)) == (tta, passes)
        assert found.windows.blending.mirrors == ((),)
    found = resolve(SegmentOptions(mirror_axes=(1,)), mirrored)
    assert (found.tta, found.windows.blending.mirrors) == ("model", ((), (1,)))
    assert found.settings()["mirror_axes"] == [1]
    other: Any
    for other in ((1, 2), (1, 1), (True,), 1, 0.5, "1"):
        with pytest.raises(ConfigError, match=r"mirror_axes must be some of the model's, \(0, 1\)"):
            resolve(SegmentOptions(mirror_axes=other), mirrored)
    with pytest.raises(ConfigError, match="for the test-time augmentation of the model, not for"):
        resolve(SegmentOptions(tta="mirror8", mirror_axes=(1,)), mirrored)


def test_windows_of_zeros_are_run_where_it_is_asked_for() -> None:
    assert plan().windows.blending.empty_windows == "skip"
    found = plan(empty_windows="run")
    assert found.windows.blending.empty_windows == found.settings()["empty_windows"] == "run"
    with pytest.raises(ConfigError, match="empty_windows no does not exist; choose skip, run"):
        plan(empty_windows="no")


def test_windows_are_placed_and_blended_as_the_model_says() -> None:
    manifest = Bundle.default().manifest
    inference = replace(
        manifest.inference,
        placement="even",
        weights="gaussian-nnunet",
        accumulate="half",
        empty_windows="run",
    )
    found = resolve(SegmentOptions(), replace(manifest, inference=inference)).windows
    assert found.placement == "even"
    assert found.blending == Blending("gaussian-nnunet", (), "half", "run")


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        plan().tta = "paper"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tta": "mirror"}, "tta mirror does not exist; choose none, paper, mirror8, model"),
        ({"fuse": "max"}, "fuse max does not exist; choose vote, mean"),
        ({"decide": "vote"}, "decide vote does not exist; choose argmax, threshold"),
        ({"probabilities": 1}, "probabilities must be true or false, got 1"),
        (
            {"tta": "paper", "fuse": "vote", "decide": "threshold"},
            "a vote counts one label per voxel and pass, and regions have thresholds; "
            "leave fuse out",
        ),
        (
            {"tta": "mirror8", "fuse": "vote", "probabilities": True},
            "a vote counts one label per voxel and pass, and the result has probabilities; "
            "leave fuse out",
        ),
        ({"window": 0}, "window must be full or a multiple of 16 voxels, got 0"),
        ({"window": -8}, "window must be full or a multiple of 16 voxels, got -8"),
        ({"window": 272}, "window must be at most 256 voxels, or full, got 272"),
        ({"window": 12}, "window must be full or a multiple of 16 voxels, got 12"),
        ({"window": 64.0}, "window must be full or a multiple of 16 voxels, got 64.0"),
        ({"window": "all"}, "window must be full or a multiple of 16 voxels, got 'all'"),
        ({"overlap": 1.0}, "overlap must be at least 0 and below 1, got 1.0"),
        ({"overlap": -0.1}, "overlap must be at least 0 and below 1, got -0.1"),
        ({"overlap": float("nan")}, "overlap must be at least 0 and below 1, got nan"),
        ({"min_voxels": -1}, "min_voxels must be at least 0, got -1"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"threads": 2.5}, "threads must be a whole number, got 2.5"),
        ({"threads": 10**9}, "threads must be at most 1024, got 1000000000"),
        ({"overlap": True}, "overlap must be a number, got True"),
        ({"min_voxels": True}, "min_voxels must be a whole number, got True"),
        ({"max_memory_bytes": 0}, "max_memory_bytes must be at least 1, got 0"),
        ({"max_memory_bytes": "4GB"}, "max_memory_bytes must be a whole number, got '4GB'"),
        ({"stream": [1]}, "stream must be a whole number, got [1]"),
        ({"fallback": "gpu"}, "fallback must be cpu, or left out, got 'gpu'"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(**options)
    assert str(caught.value) == message


def test_the_rule_for_windows_is_the_models() -> None:
    manifest = Bundle.default().manifest
    coarse = replace(manifest, inference=replace(manifest.inference, window_multiple=32))
    assert resolve(SegmentOptions(window=96), coarse).windows.window == (96, 96, 96)
    with pytest.raises(ConfigError, match="a multiple of 32 voxels, got 48"):
        resolve(SegmentOptions(window=48), coarse)


def test_a_cubic_window_fits_the_multiple_of_each_axis() -> None:
    """Multiples of 8, 32 and 48 along the axes: 96 is the least of all three."""
    manifest = Bundle.default().manifest
    inference = replace(manifest.inference, window=(8, 64, 96), window_multiple=(8, 32, 48))
    model = replace(manifest, inference=inference)
    assert resolve(SegmentOptions(), model).windows.window == (8, 64, 96)
    assert resolve(SegmentOptions(window=96), model).windows.window == (96, 96, 96)
    with pytest.raises(ConfigError, match="a multiple of 96 voxels, got 64"):
        resolve(SegmentOptions(window=64), model)
    whole = resolve(SegmentOptions(window="full"), model).windows
    assert whole.plan((9, 33, 49)).window == (16, 64, 96)
