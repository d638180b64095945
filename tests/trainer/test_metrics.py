from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from medpy.metric.binary import dc

from attnseg.trainer.metrics import dice, region_dice

masks = hnp.arrays(bool, (4, 4, 4), elements=st.booleans())


@given(masks, masks)
def test_dice_is_medpys(prediction: np.ndarray, truth: np.ndarray) -> None:
    if prediction.any() or truth.any():
        assert dice(prediction, truth) == pytest.approx(dc(prediction, truth))


def test_dice_of_empty_masks_follows_brats() -> None:
    empty, one = np.zeros((2, 2, 2), bool), np.ones((2, 2, 2), bool)
    assert dice(empty, empty) == 1
    assert dice(empty, one) == dice(one, empty) == 0


def test_regions_join_their_labels_by_hand() -> None:
    truth = np.array([0, 1, 2, 4]).reshape(1, 2, 2)
    prediction = np.array([0, 2, 2, 4]).reshape(1, 2, 2)
    result = region_dice(prediction, truth, {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)})
    assert result == {"WT": 1, "TC": pytest.approx(2 / 3), "ET": 1}
