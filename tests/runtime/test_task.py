"""Rules of a task's outputs, which say what a network with one output per region writes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from attnseg import Bundle
from attnseg.runtime.errors import ConfigError
from attnseg.runtime.task import Channel, Label, Output, Task, distinct_names

WHOLE, CORE = Output("whole", 2, (0,)), Output("core", 1, (1,), 0.25)


def task(*outputs: Output) -> Task:
    return Task(
        channels=(Channel("ct", ("",)),),
        labels=(Label("background", 0), Label("core", 1), Label("edge", 2)),
        regions={"core": (1,), "whole": (1, 2)},
        display=("ct",),
        activation="sigmoid",
        outputs=outputs,
    )


def test_a_network_returns_one_channel_per_label_or_one_per_output() -> None:
    assert task(WHOLE, CORE).output_channels == 2
    assert replace(task(WHOLE, CORE), activation="softmax", outputs=()).output_channels == 3
    assert Bundle.default().manifest.task.output_channels == 4


def test_outputs_may_be_written_in_any_order_of_their_channels() -> None:
    assert task(CORE, WHOLE).outputs == (CORE, WHOLE)


def test_outputs_are_of_the_activation_sigmoid_alone() -> None:
    rule = "outputs belong to the activation sigmoid, and to no other"
    with pytest.raises(ConfigError, match=rule):
        task()
    with pytest.raises(ConfigError, match=rule):
        replace(task(WHOLE, CORE), activation="softmax")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (replace(CORE, channels=(0,)), r"each channel once, got channels \[0, 0\]"),
        (replace(CORE, channels=(2,)), r"each channel once, got channels \[0, 2\]"),
        (replace(CORE, channels=(1, 2)), r"each channel once, got channels \[0, 1, 2\]"),
        (replace(CORE, channels=()), r"each channel once, got channels \[0\]"),
        (replace(CORE, channels=(-1,)), r"each channel once, got channels \[-1, 0\]"),
        (replace(CORE, region="edge"), "output edge names an unknown region or label"),
        (replace(CORE, label=3), "output core names an unknown region or label"),
        (replace(CORE, label=0), "output core names an unknown region or label"),  # background
        (replace(CORE, threshold=0.0), "core needs a threshold within 0 and 1, got 0.0"),
        (replace(CORE, threshold=1.0), "core needs a threshold within 0 and 1, got 1.0"),
        (replace(CORE, threshold=math.nan), "core needs a threshold within 0 and 1, got nan"),
    ],
    ids=str,
)
def test_an_output_that_breaks_a_rule_is_refused(second: Output, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task(WHOLE, second)


def test_an_output_without_a_channel_is_refused_though_another_has_two() -> None:
    with pytest.raises(ConfigError, match="outputs must name"):
        task(replace(WHOLE, channels=(0, 1)), replace(CORE, channels=()))


@pytest.mark.parametrize(
    "outputs",
    [(replace(WHOLE, region="core"), CORE), (WHOLE,), (WHOLE, replace(CORE, region="whole"))],
    ids=["core twice", "core missing", "whole twice"],
)
def test_each_region_has_one_output(outputs: tuple[Output, ...]) -> None:
    """Its probability is that of the output's channel."""
    with pytest.raises(ConfigError, match="region"):
        task(*outputs)


def test_names_that_repeat_are_numbered_by_position() -> None:
    assert distinct_names(["t1", "t2"]) == ("t1", "t2")
    assert distinct_names(["z", "t2", "z"]) == ("z 0", "t2", "z 2")
    # "z 0" is the number of the first, too.
    assert distinct_names(["z", "z", "z 0"]) == ("z 0 0", "z 1", "z 0 2")
