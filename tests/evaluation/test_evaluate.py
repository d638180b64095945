from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from attnseg import Bundle
from attnseg.data.decide import decide_labels
from attnseg.data.labelled import LabelledCase, find_labelled_cases
from attnseg.data.task import BRATS
from attnseg.evaluation.cases import cases_to_evaluate
from attnseg.evaluation.evaluate import evaluate
from attnseg.evaluation.metrics import EMPTY_HD95_MM, Scores
from attnseg.evaluation.scores import column, compare, read_scores
from attnseg.runtime.case.nifti import read_labels, read_volume
from attnseg.runtime.case.volume import Volume
from attnseg.runtime.engines.base import EngineInfo
from attnseg.runtime.errors import EngineError, ScanError, TrainingError, VolumeError
from attnseg.runtime.task import Label, Task
from attnseg.synthetic import make_case, write_case

SHAPE = (40, 44, 36)


class FakeSegmenter:
    """Gives labels that the test chooses, in place of a network's."""

    def __init__(
        self, labels_of: Callable[[Volume], np.ndarray], warnings: tuple[str, ...] = ()
    ) -> None:
        self._warnings = warnings
        self.bundle = Bundle.default()
        self.engine = EngineInfo("fake", "1", "fp32", "cpu")
        self.plan = SimpleNamespace(settings=lambda: {"tta": "none"})
        self._labels_of = labels_of

    def segment(self, volume: Volume) -> SimpleNamespace:
        return SimpleNamespace(labels=self._labels_of(volume), warnings=self._warnings)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[LabelledCase]:
    folder = tmp_path_factory.mktemp("cases")
    for seed in (1, 2, 3, 4):
        write_case(make_case(seed, SHAPE), folder, f"case{seed}")
    return list(find_labelled_cases(folder).cases.values())


@pytest.fixture(scope="module")
def truth(cases: list[LabelledCase]) -> Callable[[Volume], np.ndarray]:
    """The true labels of a volume, found by its first file's checksum."""
    labels = {
        read_volume(case.case.files).sha256: np.asarray(
            read_labels(case.label).channels[0], np.uint8
        )
        for case in cases
    }
    return lambda volume: labels[volume.sha256]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "cases.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_truth_itself_scores_one_and_no_distance(cases, truth, tmp_path: Path) -> None:
    result = evaluate(cases, FakeSegmenter(truth), BRATS, tmp_path)
    for structure in ("WT", "TC", "ET", "necrotic core", "oedema"):
        assert column(result.scores, structure, "dice").tolist() == [1.0] * 4
        assert column(result.scores, structure, "hd95_mm").tolist() == [0.0] * 4
    assert len(rows(tmp_path)) == 4 * 5  # enhancing tumour is ET


def test_an_empty_result_scores_as_in_brats(cases, tmp_path: Path) -> None:
    nothing = FakeSegmenter(lambda volume: np.zeros(volume.shape, np.uint8))
    evaluate(cases, nothing, BRATS, tmp_path)
    for row in rows(tmp_path):
        assert float(row["dice"]) == 0
        assert float(row["hd95_mm"]) == pytest.approx(EMPTY_HD95_MM)
        assert float(row["sensitivity"]) == 0
        assert float(row["specificity"]) == 1


def test_a_region_is_scored_whatever_its_classes_are(cases, truth, tmp_path: Path) -> None:
    # Everything predicted as oedema: the whole tumour is correct, its core is missed.
    one = FakeSegmenter(lambda volume: np.where(truth(volume) > 0, 2, 0).astype(np.uint8))
    result = evaluate(cases, one, BRATS, tmp_path)
    assert column(result.scores, "WT", "dice").tolist() == [1.0] * 4
    assert column(result.scores, "TC", "dice").tolist() == [0.0] * 4


def test_the_table_reads_back(cases, truth, tmp_path: Path) -> None:
    half = FakeSegmenter(lambda volume: np.where(truth(volume) == 4, 0, truth(volume)))
    scores = evaluate(cases, half, BRATS, tmp_path).scores
    back = read_scores(tmp_path)
    assert list(back) == [case.name for case in cases]
    for case, by_structure in scores.items():
        for structure, values in by_structure.items():
            assert back[case][structure].dice == pytest.approx(values.dice, rel=1e-5)


def test_the_worst_cases_are_drawn_with_the_truth_below(cases, truth, tmp_path: Path) -> None:
    (tmp_path / "worst").mkdir()
    (tmp_path / "worst" / f".a.png.{'0' * 16}.part").touch()  # of a process that was killed
    bad = truth(read_volume(cases[2].case.files))

    def labels_of(volume: Volume) -> np.ndarray:
        labels = truth(volume)
        return np.zeros_like(labels) if labels is bad else labels

    result = evaluate(cases, FakeSegmenter(labels_of), BRATS, tmp_path)
    assert f"Lowest mean Dice: {cases[2].name} (0.000)" in result.summary
    assert len(list((tmp_path / "worst").iterdir())) == 3
    with Image.open(tmp_path / "worst" / f"{cases[2].name}.png") as picture:
        rows = np.asarray(picture.convert("RGB")).astype(int)
    above, below = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert above.shape == below.shape
    coloured = [np.count_nonzero(np.ptp(part, axis=2) > 60) for part in (above, below)]
    assert coloured[1] > 2 * coloured[0]  # outlines of the truth; legend only above


def test_the_summary_has_the_papers_row_beside(cases, truth, tmp_path: Path) -> None:
    evaluate(cases, FakeSegmenter(truth), BRATS, tmp_path)
    summary = (tmp_path / "summary.md").read_text()
    assert "| WT | 1.000 ± 0.000 (1.000) | 0.0 ± 0.0 (0.0) |" in summary
    assert "0.915, 6.9 mm |" in summary


@pytest.mark.parametrize(
    "changes",
    [
        {"network": {"architecture": "attnresunet", "attention": "se", "multi_scale": True}},
        {"network": {"onnx": "other.onnx"}},
        {"task": replace(BRATS.task, regions={"lesion": (1, 2, 4)})},
    ],
    ids=["another network", "an ONNX file", "another task"],
)
def test_only_the_papers_network_and_task_are_compared_with_the_paper(
    cases, truth, tmp_path: Path, changes: dict[str, object]
) -> None:
    segmenter = FakeSegmenter(truth)
    bundle = segmenter.bundle
    segmenter.bundle = replace(bundle, manifest=replace(bundle.manifest, **changes))
    evaluate(cases, segmenter, BRATS, tmp_path)
    assert "paper" not in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (VolumeError("case1_t1.nii.gz: holds only zeros"), "case1_t1.nii.gz: holds only zeros"),
        (EngineError("the GPU failed"), "the GPU failed"),
        (MemoryError(), "not enough memory"),
        (ZeroDivisionError("bug"), "bug"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_case_that_fails_is_named_and_the_others_are_scored(
    cases, truth, tmp_path: Path, error: Exception, reason: str
) -> None:
    def labels_of(volume: Volume) -> np.ndarray:
        if truth(volume) is truth(read_volume(cases[0].case.files)):
            raise error
        return truth(volume)

    result = evaluate(cases, FakeSegmenter(labels_of), BRATS, tmp_path)
    assert list(result.failed) == [cases[0].name]
    assert reason in str(result.failed[cases[0].name])
    assert len(result.scores) == 3
    assert f"Failed: {cases[0].name}: " in result.summary


def test_warnings_are_kept_by_case(cases, truth, tmp_path: Path) -> None:
    assert evaluate(cases, FakeSegmenter(truth), BRATS, tmp_path).warnings == {}
    warned = evaluate(cases, FakeSegmenter(truth, ("spacing is odd",)), BRATS, tmp_path).warnings
    assert warned == {case.name: ("spacing is odd",) for case in cases}


def test_no_case_at_all_is_an_error_that_says_why(cases, tmp_path: Path) -> None:
    def fail(_: Volume) -> np.ndarray:
        raise ScanError("t1: is broken")

    with pytest.raises(TrainingError, match="no case could be evaluated: t1: is broken"):
        evaluate(cases, FakeSegmenter(fail), BRATS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def made_up(values: list[float]) -> dict[str, dict[str, Scores]]:
    return {f"c{i}": {"WT": Scores(v, 10 * v, 0, 0, 0)} for i, v in enumerate(values)}


def test_paired_tests_by_hand() -> None:
    # Differences 1, 2, 3: t = 2 / (1 / sqrt 3) = 3.464 with 2 degrees of freedom, p = 0.0742;
    # all three positive: Wilcoxon's two-sided p is 2 / 2^3.
    text = compare(made_up([1, 2, 3]), made_up([0, 0, 0]), Path("other"))
    assert "| WT | dice | +2.0000 | 0.0742 | 0.25 |" in text
    assert "| WT | hd95_mm | +20.00 | 0.0742 | 0.25 |" in text


def test_equal_results_have_no_p_value() -> None:
    text = compare(made_up([1, 2]), made_up([1, 2]), Path("other"))
    assert "| WT | dice | +0.0000 | - | - |" in text


def test_only_common_cases_are_compared() -> None:
    other = {"c1": made_up([0, 5])["c1"]}
    assert "1 cases that both evaluate" in compare(made_up([1, 2, 3]), other, Path("other"))
    with pytest.raises(TrainingError, match="evaluates none of these cases"):
        compare(made_up([1]), {"x": made_up([1])["c0"]}, Path("other"))


def test_a_folder_without_a_table_is_refused_before_hours_are_spent(cases, tmp_path: Path) -> None:
    def fail(_: Volume) -> np.ndarray:
        raise AssertionError

    with pytest.raises(TrainingError, match=r"cases\.csv: is not the table of an evaluation"):
        evaluate(cases, FakeSegmenter(fail), BRATS, tmp_path / "out", against=tmp_path)


def test_cases_that_the_model_was_trained_on_are_left_out(
    cases: list[LabelledCase],
) -> None:
    scans = find_labelled_cases(cases[0].case.folder.parent)
    manifest = Bundle.default().manifest
    training = replace(manifest.training, train_cases=("case1", "case3"))
    manifest = replace(manifest, training=training)
    names = {
        which: [c.name for c in cases_to_evaluate(scans, manifest, which)]
        for which in ("held-out", "trained-on", "all")
    }
    assert names["held-out"] == ["case2", "case4"]
    assert names["trained-on"] == ["case1", "case3"]
    assert len(names["all"]) == 4
    everything = replace(training, train_cases=tuple(names["all"]))
    with pytest.raises(TrainingError, match="trained on all 4; give other data, or cases='all'"):
        cases_to_evaluate(scans, replace(manifest, training=everything), "held-out")


def test_data_of_another_task_is_refused(cases: list[LabelledCase]) -> None:
    scans = find_labelled_cases(cases[0].case.folder.parent)
    organs = (Label("background", 0), Label("liver", 1))
    task = Task(BRATS.task.channels, organs, {}, BRATS.task.display)
    other = replace(scans, task=replace(BRATS, task=task, aliases={}))
    with pytest.raises(TrainingError, match=r"labels \[0, 1\] and 4 channels, the model labels"):
        cases_to_evaluate(other, Bundle.default().manifest, "all")


def test_the_summary_of_another_task_says_nothing_of_the_paper(
    cases: list[LabelledCase], truth: Callable[[Volume], np.ndarray], tmp_path: Path
) -> None:
    segmenter = FakeSegmenter(truth)
    manifest = segmenter.bundle.manifest
    task = replace(manifest.task, regions={"whole": (1, 2, 4)})
    segmenter.bundle = SimpleNamespace(manifest=replace(manifest, task=task), sha256="0" * 64)
    text = evaluate(cases, segmenter, BRATS, tmp_path).summary
    assert "| whole | 1.000" in text
    assert "paper" not in text


def test_the_summary_says_what_was_decided_about_label_values(
    cases: list[LabelledCase], truth: Callable[[Volume], np.ndarray], tmp_path: Path
) -> None:
    scans = decide_labels(find_labelled_cases(cases[0].case.folder.parent))
    evaluate(cases, FakeSegmenter(truth), scans.task, tmp_path)
    line = (
        "Expert labels: enhancing tumour is label 4, as in BraTS until 2022: 4 of 4 cases have it."
    )
    assert line in (tmp_path / "summary.md").read_text().splitlines()


def test_the_box_plots_are_a_picture(cases, truth, tmp_path: Path) -> None:
    evaluate(cases, FakeSegmenter(truth), BRATS, tmp_path)
    image = Image.open(io.BytesIO((tmp_path / "boxes.png").read_bytes()))
    assert image.format == "PNG"
    assert len(np.unique(np.asarray(image.convert("L")))) > 10


def test_an_evaluation_compared_with_itself_differs_nowhere(cases, truth, tmp_path: Path) -> None:
    # Scores read back from the table are the same to the last bit, so no tie is broken.
    half = FakeSegmenter(lambda volume: np.where(truth(volume) == 4, 2, truth(volume)))
    evaluate(cases, half, BRATS, tmp_path / "a")
    text = evaluate(cases, half, BRATS, tmp_path / "b", against=tmp_path / "a").summary
    rows = [line for line in text.split("## Against")[1].splitlines() if "hd95_mm" in line]
    assert rows
    assert all(line.endswith("| +0.00 | - | - |") for line in rows)


def test_an_evaluation_of_other_cases_is_refused_before_hours_are_spent(
    cases, truth, tmp_path: Path
) -> None:
    evaluate(cases[:1], FakeSegmenter(truth), BRATS, tmp_path / "a")

    def fail(_: Volume) -> np.ndarray:
        raise AssertionError

    with pytest.raises(TrainingError, match="evaluates none of these cases"):
        evaluate(cases[1:], FakeSegmenter(fail), BRATS, tmp_path / "b", against=tmp_path / "a")


def test_pictures_of_an_earlier_evaluation_are_removed(cases, truth, tmp_path: Path) -> None:
    evaluate(cases[:1], FakeSegmenter(truth), BRATS, tmp_path)
    evaluate(cases[1:2], FakeSegmenter(truth), BRATS, tmp_path)
    assert [f.name for f in (tmp_path / "worst").iterdir()] == [f"{cases[1].name}.png"]
