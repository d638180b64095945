"""Options are checked and completed once, by `resolve`."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from attnseg import Bundle, SegmentOptions
from attnseg.runtime.errors import ConfigError
from attnseg.runtime.options import Plan, available_threads, resolve


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
        "decide": "argmax",
        "window": [32, 32, 32],
        "overlap": 0.0,
        "min_voxels": 0,
        "resample": "auto",
    }
    assert plan(window="full").windows.window is None
    assert plan(window="full").settings()["window"] == "full"


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        plan().tta = "paper"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tta": "mirror"}, "tta mirror does not exist; choose none, paper, mirror8, model"),
        ({"fuse": "max"}, "fuse max does not exist; choose vote, mean"),
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
