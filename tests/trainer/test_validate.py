from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attnseg.runtime.errors import TrainingError
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.data import TrainingCase
from attnseg.trainer.devices import Devices
from attnseg.trainer.interrupt import Interrupt
from attnseg.trainer.model import NetworkConfig
from attnseg.trainer.validate import validate

CONFIG = TrainConfig(
    network=NetworkConfig(1, 2, (2, 4), 4, "none", False), patch=8, precision="fp32"
)
ALONE = Devices(torch.device("cpu"))


class Sign(nn.Module):
    """Class 1 where the image is positive."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([-image, image], dim=1)


def scored(cases: list[TrainingCase], regions: dict[str, Any], interrupt: Interrupt) -> Any:
    network: Any = Sign()
    return validate(network, cases, CONFIG, devices=ALONE, regions=regions, interrupt=interrupt)


def slab_case(name: str, seen: int, true: int) -> TrainingCase:
    """The first `seen` of ten slices look like class 1, the first `true` of them are."""
    image, classes = np.full((1, 10, 8, 8), -20, np.float16), np.zeros((10, 8, 8), np.uint8)
    image[0, :seen], classes[:true] = 20, 1
    return TrainingCase(name, image, classes)


def test_scores_are_the_mean_over_whole_cases() -> None:
    cases = [slab_case("a", 4, 4), slab_case("b", 2, 6)]
    scores = validate(
        Sign(), cases, CONFIG, devices=ALONE, regions={"slab": (1,)}, interrupt=Interrupt()
    )
    assert set(scores) == {"loss", "slab"}
    assert scores["slab"] == pytest.approx((1 + 2 * 2 / (2 + 6)) / 2)
    # In case b, 4 of 10 slices are wrong by a logit difference of 40.
    assert scores["loss"] == pytest.approx((0.5 * 0.5 + 0.5 * 0.4 * 40) / 2, rel=1e-3)


def test_a_region_joins_classes() -> None:
    assert validate(
        Sign(),
        [slab_case("a", 3, 5)],
        CONFIG,
        devices=ALONE,
        regions={"all": (0, 1)},
        interrupt=Interrupt(),
    )["all"] == pytest.approx(1)


def test_numbers_that_are_not_finite_are_refused_with_the_case() -> None:
    case = slab_case("case7", 4, 4)
    case.image[0, 0, 0, 0] = np.inf
    with pytest.raises(TrainingError, match=r"case case7: the logits .* are not finite in fp32"):
        validate(
            Sign(), [case], CONFIG, devices=ALONE, regions={"slab": (1,)}, interrupt=Interrupt()
        )


def test_an_interrupt_stops_after_the_case() -> None:
    interrupt = Interrupt()
    interrupt.asked = True
    with pytest.raises(KeyboardInterrupt):
        validate(
            Sign(),
            [slab_case("a", 4, 4)] * 2,
            CONFIG,
            devices=ALONE,
            regions={"slab": (1,)},
            interrupt=interrupt,
        )


def test_an_interrupt_stops_between_two_windows_of_a_case() -> None:
    interrupt, seen = Interrupt(), []

    class Interrupted(Sign):
        def forward(self, image: Tensor) -> Tensor:
            seen.append(image.shape)
            interrupt.asked = True
            return super().forward(image)

    network: Any = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        validate(
            network,
            [slab_case("a", 4, 4)],  # ten slices: two windows of eight
            CONFIG,
            devices=ALONE,
            regions={"slab": (1,)},
            interrupt=interrupt,
        )
    assert len(seen) == 1


def test_each_finished_case_is_told() -> None:
    told: list[str] = []
    validate(
        Sign(),
        [slab_case("b", 4, 4), slab_case("a", 2, 6)],
        CONFIG,
        devices=ALONE,
        regions={"slab": (1,)},
        interrupt=Interrupt(),
        progress=told.append,
    )
    assert told == ["b", "a"]
