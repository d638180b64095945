from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from attnseg.runtime.errors import ConfigError
from attnseg.runtime.steps.decide import Decision, argmax_classes
from attnseg.runtime.steps.tta import PASSES, Fusion, passes_of


def labels(count: int) -> Decision:
    """The argmax of so many labels."""
    return Decision("softmax", (), tuple(range(count)), count)


TRANSFORMS = [t for scheme in PASSES.values() for t in scheme]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_every_transform_is_undone_exactly(transform) -> None:
    array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    np.testing.assert_array_equal(transform.invert(transform.apply(array)), array)
    np.testing.assert_array_equal(transform.invert(transform.apply(array[0])), array[0])


def test_the_paper_takes_identity_mirror_and_quarter_turn() -> None:
    array = np.arange(24).reshape(2, 3, 4)
    identity, mirror, turn = PASSES["paper"]
    np.testing.assert_array_equal(identity.apply(array), array)
    np.testing.assert_array_equal(mirror.apply(array), array[::-1])
    np.testing.assert_array_equal(turn.apply(array), np.rot90(array, axes=(0, 1)))


def test_mirror8_is_every_combination_of_flips_once() -> None:
    array = np.arange(24).reshape(2, 3, 4)
    results = {t.apply(array).tobytes() for t in PASSES["mirror8"]}
    assert len(results) == len(PASSES["mirror8"]) == 8


def test_passes_of_an_image_with_axes_zyx_by_hand() -> None:
    """The mirror still swaps left and right, and the quarter turn is still axial."""
    volume = np.arange(24).reshape(2, 3, 4)
    image = volume.transpose(2, 1, 0)
    identity, mirror, turn = passes_of("paper", (2, 1, 0))
    np.testing.assert_array_equal(identity.apply(image), image)
    np.testing.assert_array_equal(mirror.apply(image), image[:, :, ::-1])
    np.testing.assert_array_equal(turn.apply(image), np.rot90(image, axes=(2, 1)))


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("axes", list(permutations(range(3))))
def test_passes_turn_the_volume_alike_whatever_the_axes_of_the_image(
    name: str, axes: tuple[int, int, int]
) -> None:
    volume = np.arange(24).reshape(2, 3, 4)
    passes = passes_of(name, axes)
    assert len(passes) == len(PASSES[name])
    for own, plain in zip(passes, PASSES[name], strict=True):
        image = volume.transpose(axes)
        np.testing.assert_array_equal(own.apply(image), plain.apply(volume).transpose(axes))
        np.testing.assert_array_equal(own.invert(own.apply(image)), image)


def test_the_models_own_augmentation_is_a_single_pass() -> None:
    """Its windows are mirrored one by one."""
    assert passes_of("model", (0, 1, 2)) == passes_of("none", (0, 1, 2)) == PASSES["none"]


def test_a_vote_without_passes_is_refused() -> None:
    with pytest.raises(ConfigError, match="no pass"):
        Fusion("vote", labels(2)).classes()


@settings(max_examples=50)
@given(hnp.arrays(np.float32, (4, 3, 4, 5), elements=st.integers(-3, 3).map(float)))
def test_argmax_is_numpys_with_ties(logits: np.ndarray) -> None:
    np.testing.assert_array_equal(argmax_classes(logits), logits.argmax(axis=0))


def one_voxel(*probabilities: tuple[float, ...]) -> list[np.ndarray]:
    return [np.log(np.array(p, np.float32)).reshape(-1, 1, 1, 1) for p in probabilities]


def fuse(mode: str, logits: list[np.ndarray]) -> int:
    fusion = Fusion(mode, labels(len(logits[0])))
    for each in logits:
        fusion.add(each)
    return int(fusion.classes()[0, 0, 0])


def test_two_votes_beat_one_however_sure_it_is() -> None:
    voxel = one_voxel((0.51, 0.49), (0.51, 0.49), (0.01, 0.99))
    assert fuse("vote", voxel) == 0
    assert fuse("mean", voxel) == 1


def test_a_tie_goes_to_the_higher_mean_probability() -> None:
    # One vote each; mean probabilities 0.4, 0.2667, 0.3333.
    voxel = one_voxel((0.6, 0.2, 0.2), (0.3, 0.5, 0.2), (0.3, 0.1, 0.6))
    assert fuse("vote", voxel) == 0
    # The last class has the highest mean of the three.
    voxel = one_voxel((0.4, 0.3, 0.3), (0.3, 0.4, 0.3), (0.1, 0.1, 0.8))
    assert fuse("vote", voxel) == 2


def test_a_tie_in_probability_too_goes_to_the_lowest_index() -> None:
    assert fuse("vote", one_voxel((0.25, 0.75), (0.75, 0.25))) == 0


@settings(max_examples=40)
@given(hnp.arrays(np.float32, (5, 3, 2, 2, 2), elements=st.floats(-4, 4, width=32)))
def test_the_vote_is_a_plain_count_with_tie_break(passes_: np.ndarray) -> None:
    fusion = Fusion("vote", labels(3))
    for logits in passes_:
        fusion.add(logits)
    exponential = np.exp(passes_.astype(np.float64))
    mean = (exponential / exponential.sum(axis=1, keepdims=True)).mean(axis=0)
    votes = np.stack([(passes_.argmax(axis=1) == k).sum(axis=0) for k in range(3)])
    chosen = fusion.classes()
    for index in np.ndindex(chosen.shape):
        best = votes[(slice(None), *index)] == votes[(slice(None), *index)].max()
        assert best[chosen[index]]
        others = mean[(slice(None), *index)][best]
        assert mean[(chosen[index], *index)] >= others.max() - 1e-5
