"""Decisions of voxels by hand: argmax, thresholds on nested regions, regions in writing order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from attnseg import Bundle
from attnseg.runtime.errors import ConfigError
from attnseg.runtime.steps.decide import (
    Decision,
    argmax_classes,
    nested_outputs,
    region_channels,
    region_probabilities,
    sigmoid,
    softmax,
)
from attnseg.runtime.steps.tta import Fusion
from attnseg.runtime.task import Channel, Label, Output, Task

BRATS = Bundle.default().manifest.task  # labels 0, 1, 2, 4; WT (1, 2, 4), TC (1, 4), ET (4,)

REGIONS = Task(
    channels=(Channel("t1", ("_t1",)),),
    labels=tuple(Label(name, value) for value, name in enumerate(("none", "ncr", "ed", "et"))),
    regions={"whole": (1, 2, 3), "core": (1, 3), "enhancing": (3,)},
    display=("t1",),
    activation="sigmoid",
    outputs=(Output("whole", 2, (0,)), Output("core", 1, (1,)), Output("enhancing", 3, (2,))),
)
"""A network with one output per region, as nnU-Net trains BraTS: regions_class_order [2, 1, 3]."""


def voxels(*rows: tuple[float, ...]) -> np.ndarray:
    """Values of each voxel in a row along Z, `(K, 1, 1, Z)`."""
    return np.array(rows, np.float32).T[:, None, None]


def logits_of(values: np.ndarray) -> np.ndarray:
    return np.log(values) - np.log1p(-values)


def test_one_output_per_label_is_decided_by_the_largest() -> None:
    decision = Decision.of(BRATS)
    assert decision == Decision("softmax", (), (0, 1, 2, 4), 4)
    values = voxels((0.1, 0.2, 0.3, 0.4), (0.7, 0.1, 0.1, 0.1), (0.25, 0.25, 0.25, 0.25))
    assert decision.classes(np.log(values)).ravel().tolist() == [3, 0, 0]
    assert decision.classes(values, "probabilities").ravel().tolist() == [3, 0, 0]
    assert Decision.of(BRATS, "argmax") == decision


SUMS = [
    # background, necrosis 1, oedema 2, enhancing 4: the class by argmax, and by thresholds
    ((0.45, 0.20, 0.20, 0.15), 0, 2),  # WT 0.55, TC 0.35: oedema although background is largest
    ((0.30, 0.30, 0.15, 0.25), 0, 1),  # WT 0.70, TC 0.55, ET 0.25
    ((0.40, 0.02, 0.03, 0.55), 3, 3),  # ET 0.55
    ((0.55, 0.10, 0.10, 0.25), 0, 0),  # WT 0.45
    ((0.20, 0.30, 0.40, 0.10), 2, 2),  # WT 0.80, TC 0.40
]


@pytest.mark.parametrize(("voxel", "largest", "threshold"), SUMS)
def test_thresholds_on_the_regions_of_brats_by_hand(
    voxel: tuple[float, ...], largest: int, threshold: int
) -> None:
    """WT above 0.5 writes oedema, TC above 0.5 necrosis over it, and ET above 0.5 its own label."""
    values, decision = voxels(voxel), Decision.of(BRATS, "threshold")
    assert argmax_classes(np.log(values)).item() == largest
    assert decision.classes(np.log(values)).item() == threshold
    assert decision.classes(values, "probabilities").item() == threshold


def test_a_probability_of_exactly_the_threshold_writes_nothing() -> None:
    decision = Decision.of(BRATS, "threshold")
    assert decision.classes(voxels((0.5, 0.25, 0.125, 0.125)), "probabilities").item() == 0
    regions = Decision.of(REGIONS)
    assert regions.classes(voxels((0.0, 0.0, 0.0))).item() == 0
    assert regions.classes(voxels((0.5, 0.5, 0.5)), "probabilities").item() == 0


def test_nested_regions_write_the_label_that_those_inside_them_do_not_have() -> None:
    assert nested_outputs(BRATS) == (
        Output("WT", 2, (1, 2, 3)),
        Output("TC", 1, (1, 3)),
        Output("ET", 4, (3,)),
    )
    turned = replace(BRATS, regions=dict(reversed(BRATS.regions.items())))
    assert nested_outputs(turned) == nested_outputs(BRATS)  # the largest is written first


@pytest.mark.parametrize(
    ("regions", "rule"),
    [
        ({"WT": (1, 2, 4)}, "and WT adds 3"),
        ({"all": (1, 2), "first": (1,), "second": (2,)}, "and all adds 0"),
        ({"TC": (1, 4), "ED": (2, 4)}, "and TC adds 2"),
        # Both of the larger contain 1, and a voxel where both exceed 0.5 has no one label.
        ({"TC": (1, 4), "edge": (1, 2), "core": (1,)}, "TC"),
    ],
)
def test_thresholds_are_refused_where_regions_do_not_nest(
    regions: dict[str, tuple[int, ...]], rule: str
) -> None:
    task = replace(BRATS, regions=regions)
    with pytest.raises(ConfigError, match=f"thresholds need regions .*{rule}.*; decide by argmax"):
        Decision.of(task, "threshold")
    assert not Decision.of(task).outputs


def test_thresholds_are_refused_where_there_are_no_regions() -> None:
    with pytest.raises(ConfigError, match="thresholds need regions"):
        Decision.of(replace(BRATS, regions={}), "threshold")


def test_regions_are_written_in_order_each_over_those_before() -> None:
    decision = Decision.of(REGIONS)
    assert (decision.channels, decision.outputs) == (3, REGIONS.outputs)
    values = voxels(
        (0.4, 0.4, 0.4),
        (0.9, 0.1, 0.1),
        (0.9, 0.8, 0.1),
        (0.9, 0.8, 0.7),
        (0.1, 0.8, 0.1),  # the core without the whole is written all the same
        (0.9, 0.1, 0.8),
    )
    expected = [0, 2, 1, 3, 1, 3]
    assert decision.classes(logits_of(values)).ravel().tolist() == expected
    assert decision.classes(values, "probabilities").ravel().tolist() == expected
    # Written the other way round, the whole tumour covers the regions inside it.
    turned = replace(REGIONS, outputs=REGIONS.outputs[::-1])
    assert Decision.of(turned).classes(logits_of(values)).ravel().tolist() == [0, 2, 2, 2, 1, 2]


def test_the_label_is_found_by_its_value_and_not_by_its_place() -> None:
    last_is_oedema = replace(
        REGIONS, labels=(Label("none", 0), Label("et", 3), Label("ncr", 1), Label("ed", 2))
    )
    values = voxels((0.9, 0.1, 0.1), (0.9, 0.8, 0.1), (0.9, 0.8, 0.7))
    assert Decision.of(last_is_oedema).classes(logits_of(values)).ravel().tolist() == [3, 2, 1]


@pytest.mark.parametrize(("threshold", "label"), [(0.2, 2), (0.3, 0), (0.9, 0)])
def test_a_region_has_a_threshold_of_its_own(threshold: float, label: int) -> None:
    """A logit of -1 is a probability of 0.269."""
    outputs = (replace(REGIONS.outputs[0], threshold=threshold), *REGIONS.outputs[1:])
    decision = Decision.of(replace(REGIONS, outputs=outputs))
    logits = voxels((-1.0, -9.0, -9.0))
    assert decision.classes(logits).item() == label
    assert decision.classes(decision.activate(logits), "probabilities").item() == label


@given(hnp.arrays(np.float32, (3, 2, 3, 2), elements=st.floats(-8, 8, width=32)))
def test_regions_are_nnunets_rule_on_any_logits(logits: np.ndarray) -> None:
    expected = np.zeros((2, 3, 2), np.uint8)
    for channel, label in enumerate((2, 1, 3)):
        expected[torch.sigmoid(torch.from_numpy(logits[channel])).numpy() > 0.5] = label
    # Logits that are too small to move a probability away from 0.5 are left to either side.
    clear = (logits <= 0) | (logits > 1e-6)
    found = Decision.of(REGIONS).classes(logits)
    np.testing.assert_array_equal(found[clear.all(axis=0)], expected[clear.all(axis=0)])


def test_a_network_of_regions_has_no_argmax() -> None:
    with pytest.raises(ConfigError, match="argmax is for networks with one output per label"):
        Decision.of(REGIONS, "argmax")
    assert Decision.of(REGIONS, "threshold") == Decision.of(REGIONS)


@given(hnp.arrays(np.float32, (4, 2, 3, 2), elements=st.floats(-200, 200, width=32)))
def test_activations_are_those_of_torch(logits: np.ndarray) -> None:
    whole = torch.from_numpy(logits)
    np.testing.assert_allclose(softmax(logits), torch.softmax(whole, 0).numpy(), atol=1e-6)
    np.testing.assert_allclose(sigmoid(logits), torch.sigmoid(whole).numpy(), atol=1e-6)
    np.testing.assert_array_equal(Decision.of(BRATS).activate(logits), softmax(logits))
    np.testing.assert_array_equal(Decision.of(REGIONS).activate(logits[:3]), sigmoid(logits[:3]))


def test_the_probability_of_a_region_is_the_sum_of_its_labels() -> None:
    assert region_channels(BRATS) == {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
    found = region_probabilities(voxels((0.5, 0.0625, 0.3125, 0.125)), BRATS)
    assert found.ravel().tolist() == [0.5, 0.1875, 0.125]


def test_probabilities_of_regions_are_in_the_order_of_the_regions() -> None:
    """Outputs are in the order in which they are written, which may be another."""
    turned = replace(REGIONS, outputs=REGIONS.outputs[::-1])
    assert list(turned.regions) == ["whole", "core", "enhancing"]
    found = region_probabilities(voxels((0.75, 0.5, 0.25)), turned)
    assert found.ravel().tolist() == [0.75, 0.5, 0.25]


@pytest.mark.parametrize("quantity", ["logits", "probabilities"])
def test_passes_of_regions_are_decided_by_their_mean_probabilities(quantity: str) -> None:
    # The whole tumour 0.6, 0.6 and 0.1: a mean of 0.43; the core 0.4, 0.4 and 0.8: 0.53.
    passes = [voxels((0.6, 0.4, 0.1)), voxels((0.6, 0.4, 0.1)), voxels((0.1, 0.8, 0.1))]
    fusion = Fusion("mean", Decision.of(REGIONS))
    for probabilities in passes:
        given = logits_of(probabilities) if quantity == "logits" else probabilities
        fusion.add(given, quantity)  # type: ignore[arg-type]
    np.testing.assert_allclose(fusion.probabilities.ravel(), [1.3 / 3, 1.6 / 3, 0.1], rtol=1e-6)
    assert fusion.classes().item() == 1
