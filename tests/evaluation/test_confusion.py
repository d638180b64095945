from __future__ import annotations

import csv
import io
import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from attnseg.cli.app import main
from attnseg.data.labelled import LabelledCase, find_labelled_cases
from attnseg.data.task import BRATS
from attnseg.evaluation import evaluate as evaluation
from attnseg.evaluation.confusion import (
    confusion_matrix,
    describe_matrix,
    draw_matrix,
    encode_matrices,
    total,
)
from attnseg.evaluation.evaluate import evaluate
from attnseg.runtime.case.nifti import read_labels, read_volume
from attnseg.runtime.case.volume import Volume
from attnseg.runtime.errors import TrainingError
from attnseg.synthetic import make_case, write_case
from tests.evaluation.test_evaluate import FakeSegmenter

BRATS_VALUES = BRATS.task.label_values
NAMES = ("background", "liver", "lesion")
# Of six voxels of background four are correct; of four of liver two; the one of lesion is not.
MATRIX = np.array([[4, 2, 0], [1, 2, 1], [0, 1, 0]])


def labels(*values: int) -> np.ndarray:
    return np.array(values, np.uint8).reshape(-1, 1, 1)


def test_three_labels_by_hand() -> None:
    # Pairs of true and predicted label; the values are not the indices.
    truth = labels(0, 0, 0, 0, 0, 0, 5, 5, 5, 5, 9)
    prediction = labels(0, 0, 0, 0, 5, 5, 0, 5, 5, 9, 5)
    matrix = confusion_matrix(prediction, truth, (0, 5, 9))
    assert matrix.dtype == np.int64
    assert matrix.tolist() == MATRIX.tolist()
    # The order is that of the labels, not that of their values.
    assert confusion_matrix(prediction, truth, (0, 9, 5)).tolist() == [
        [4, 0, 2],
        [0, 0, 1],
        [1, 1, 2],
    ]


@pytest.mark.parametrize("values", [BRATS_VALUES, tuple(range(256))], ids=len)
@pytest.mark.parametrize("order", ["C", "F"])
def test_it_is_numpys_histogram_of_pairs(values: tuple[int, ...], order: str) -> None:
    rng = np.random.default_rng(0)
    shape = (90, 70, 60)  # more voxels than are counted at once
    truth, prediction = (
        np.asarray(values, np.uint8)[rng.integers(len(values), size=shape)] for _ in "ab"
    )
    found = confusion_matrix(np.asarray(prediction, order=order), truth[::-1], values)
    edges = [*values, 256]
    expected, _, _ = np.histogram2d(truth[::-1].ravel(), prediction.ravel(), (edges, edges))
    assert np.array_equal(found, expected)
    assert found.sum() == truth.size


def test_no_voxel_counts_nothing() -> None:
    empty = np.zeros((0, 4, 4), np.uint8)
    assert confusion_matrix(empty, empty, (0, 1)).tolist() == [[0, 0], [0, 0]]


def test_counting_takes_less_memory_than_the_labels() -> None:
    truth = np.zeros((256, 256, 256), np.uint8)
    tracemalloc.start()
    try:
        confusion_matrix(truth, truth[::-1], (0, 1))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < truth.nbytes / 2


@pytest.mark.parametrize("wrong", ["truth", "prediction"])
def test_a_value_that_is_no_label_is_named(wrong: str) -> None:
    arrays = {"truth": labels(0, 1), "prediction": labels(0, 1), wrong: labels(0, 3)}
    with pytest.raises(TrainingError, match=r"a voxel has label 3; the task has labels \[0, 1\]"):
        confusion_matrix(**arrays, label_values=(0, 1))


def test_arrays_of_two_shapes_are_refused_though_numpy_would_broadcast_them() -> None:
    with pytest.raises(TrainingError, match="must have one shape"):
        confusion_matrix(np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 1), np.uint8), (0, 1))


def test_the_file_has_the_sum_and_then_each_case() -> None:
    file = encode_matrices(
        ("background", "=liver"), {"b": np.eye(2, dtype=int), "-a": MATRIX[:2, :2]}
    )
    assert list(csv.reader(io.StringIO(file.decode()))) == [
        ["case", "true label", "background", "'=liver"],
        ["", "background", "5", "2"],
        ["", "'=liver", "1", "3"],
        ["b", "background", "1", "0"],
        ["b", "'=liver", "0", "1"],
        ["'-a", "background", "4", "2"],
        ["'-a", "'=liver", "1", "2"],
    ]


def test_the_sum_holds_more_voxels_than_32_bits_count() -> None:
    large = np.full((2, 2), 3 << 30)
    assert total({"a": large, "b": large}).tolist() == [[6 << 30] * 2] * 2


def test_tables_by_hand() -> None:
    matrices, false_positives = describe_matrix(NAMES, MATRIX).split("## False positives")
    assert matrices.splitlines()[-5:-1] == [
        "| --- | --- | --- | --- |",
        "| background | 4 (66.7 %) | 2 (33.3 %) | 0 (0.0 %) |",
        "| liver | 1 (25.0 %) | 2 (50.0 %) | 1 (25.0 %) |",
        "| lesion | 0 (0.0 %) | 1 (100.0 %) | 0 (0.0 %) |",
    ]
    # Of five voxels predicted as liver three are false: two of background, one of lesion.
    assert false_positives.splitlines()[-2:] == [
        "| liver | 5 | 3 | 60.0 % | background 66.7 %, lesion 33.3 % |",
        "| lesion | 1 | 1 | 100.0 % | liver 100.0 % |",
    ]


def test_a_label_that_is_nowhere_has_no_percentages() -> None:
    text = describe_matrix(("background", "liver"), np.array([[7, 0], [0, 0]]))
    assert "| liver | 0 (-) | 0 (-) |" in text
    assert "| liver | 0 | 0 | - | - |" in text


def pixels(picture: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(picture)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def count(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int(np.count_nonzero((abs(picture - colour) < 4).all(axis=2)))


def test_the_picture_shows_shares_of_rows_as_colour() -> None:
    # Nine tenths of the rare label are missed; of all voxels that is next to nothing.
    missed = pixels(draw_matrix(NAMES[:2], np.array([[10**6, 0], [90, 10]]), "a"))
    found = pixels(draw_matrix(NAMES[:2], np.array([[10**6, 0], [0, 100]]), "a"))
    full, none = (8, 48, 107), (247, 251, 255)  # ends of the colours; the bar has them too
    assert count(found, full) > 1.8 * count(missed, full) > 0
    assert count(found, none) > 1.8 * count(missed, none) > 0


def test_each_cell_of_the_picture_has_its_numbers() -> None:
    without = pixels(draw_matrix(NAMES[:2], np.array([[9, 0], [0, 9]]), "a"))
    longer = pixels(draw_matrix(NAMES[:2], np.array([[9 * 10**8, 0], [0, 9 * 10**8]]), "a"))
    white = (255, 255, 255)
    changed = (without != longer).any(axis=2)
    assert count(longer[changed][None], white) > count(without[changed][None], white)


def test_the_picture_grows_with_the_labels_until_numbers_are_left_out() -> None:
    sizes = [pixels(draw_matrix(["a"] * n, np.eye(n), "a")).shape for n in (2, 12, 31)]
    assert sizes[1][1] > 2 * sizes[0][1] and sizes[1][0] > 2 * sizes[0][0]
    assert sizes[2][1] < sizes[1][1]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[LabelledCase]:
    folder = tmp_path_factory.mktemp("cases")
    for seed in (1, 2):
        write_case(make_case(seed, (40, 44, 36)), folder, f"case{seed}")
    return list(find_labelled_cases(folder).cases.values())


Truth = Callable[[Volume], np.ndarray]


@pytest.fixture(scope="module")
def truth(cases: list[LabelledCase]) -> Truth:
    """Function that returns the true labels of a volume."""
    found = {
        read_volume(case.case.files).sha256: np.asarray(
            read_labels(case.label).channels[0], "uint8"
        )
        for case in cases
    }
    return lambda volume: found[volume.sha256]


def as_oedema(truth: Truth) -> FakeSegmenter:
    return FakeSegmenter(lambda volume: np.where(truth(volume) == 1, 2, truth(volume)))


def test_an_evaluation_writes_the_matrices_of_its_cases_and_their_sum(
    cases: list[LabelledCase], truth: Truth, tmp_path: Path
) -> None:
    result = evaluate(cases, as_oedema(truth), BRATS, tmp_path)
    sizes = {
        case.name: [int((truth(read_volume(case.case.files)) == v).sum()) for v in BRATS_VALUES]
        for case in cases
    }
    assert all(min(size) > 0 for size in sizes.values())
    for name, (nothing, core, oedema, enhancing) in sizes.items():
        assert result.matrices[name].tolist() == [
            [nothing, 0, 0, 0],
            [0, 0, core, 0],
            [0, 0, oedema, 0],
            [0, 0, 0, enhancing],
        ]
    with (tmp_path / "confusion.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))
    core, oedema = (sum(size[i] for size in sizes.values()) for i in (1, 2))
    assert rows[0][2:] == ["background", "necrotic core", "oedema", "enhancing tumour"]
    assert rows[2] == ["", "necrotic core", "0", "0", str(core), "0"]
    assert rows[6][:5] == ["case1", "necrotic core", "0", "0", str(sizes["case1"][1])]
    assert len(rows) == 1 + 3 * 4
    share = f"{100 * core / (core + oedema):.1f} %"
    line = f"| oedema | {core + oedema} | {core} | {share} | necrotic core 100.0 % |"
    assert line in (tmp_path / "summary.md").read_text().splitlines()
    assert pixels((tmp_path / "confusion.png").read_bytes()).any()


def test_the_sections_come_before_the_comparison(
    cases: list[LabelledCase], truth: Truth, tmp_path: Path
) -> None:
    evaluate(cases, FakeSegmenter(truth), BRATS, tmp_path / "a")
    text = evaluate(
        cases, FakeSegmenter(truth), BRATS, tmp_path / "b", against=tmp_path / "a"
    ).summary
    headings = [line.split()[1] for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["Confusion", "False", "Against"]


def test_a_case_with_a_value_that_is_no_label_fails_alone(
    cases: list[LabelledCase], truth: Truth, tmp_path: Path
) -> None:
    first = truth(read_volume(cases[0].case.files))
    wrong = FakeSegmenter(lambda volume: truth(volume) + 3 * (truth(volume) is first))
    result = evaluate(cases, wrong, BRATS, tmp_path)
    assert "a voxel has label 3" in str(result.failed["case1"])
    assert list(result.scores) == list(result.matrices) == ["case2"]


def test_names_with_dollar_signs_are_drawn_as_they_are(
    cases: list[LabelledCase], truth: Truth, tmp_path: Path
) -> None:
    segmenter = FakeSegmenter(truth)
    name = r"$\frac$"  # no formula of matplotlib's
    manifest = segmenter.bundle.manifest
    names = [replace(label, name=name) for label in manifest.task.labels]
    task = replace(manifest.task, labels=tuple(names), regions={name: (1, 2, 4)})
    manifest = replace(manifest, name=name, task=task)
    segmenter.bundle = SimpleNamespace(manifest=manifest, sha256="0" * 64)
    evaluate(cases, segmenter, BRATS, tmp_path)
    assert (tmp_path / "boxes.png").exists() and (tmp_path / "confusion.png").exists()


def test_nothing_changes_if_a_picture_cannot_be_drawn(
    cases: list[LabelledCase], truth: Truth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(cases[:1], FakeSegmenter(truth), BRATS, tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*")}

    def fail(*_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(evaluation, "draw_matrix", fail)
    with pytest.raises(MemoryError):
        evaluate(cases[1:], FakeSegmenter(truth), BRATS, tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*")} == before


def test_machines_get_the_sum_and_the_matrix_of_each_case(small_scan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("evaluate", "--data", small_scan, "--cases", "all", "--precision", "fp32", "--json")
    result = CliRunner().invoke(main, [*map(str, command), "-o", str(out)])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    with (out / "confusion.csv").open(newline="") as stream:
        header, *rows = csv.reader(stream)
    assert document["labels"] == header[2:]
    counts = [[int(cell) for cell in row[2:]] for row in rows]
    assert document["confusion"] == counts[:4]
    assert document["cases"][0]["confusion"] == counts[4:]
    assert sum(map(sum, counts[4:])) == 80 * 88 * 72


def test_a_case_that_failed_has_no_matrix(small_scan: Path, tmp_path: Path) -> None:
    write_case(make_case(4, (32, 32, 32)), small_scan, "torn")
    (small_scan / "torn" / "torn_t1.nii.gz").write_bytes(b"")
    command = ("evaluate", "--data", small_scan, "--cases", "all", "--precision", "fp32", "--json")
    result = CliRunner().invoke(main, [*map(str, command), "-o", str(tmp_path / "out")])
    assert result.exit_code == 1, result.stderr
    small, torn = json.loads(result.stdout)["cases"]
    assert (torn["status"], torn["confusion"]) == ("failed", None)
    assert len(small["confusion"]) == 4
