from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from attnseg import Segmenter, SegmentOptions
from attnseg.runtime import folder
from attnseg.runtime.case.scans import Case, find_cases
from attnseg.runtime.errors import DeviceLostError, OutputError
from attnseg.runtime.folder import CaseResult, segment_folder
from attnseg.runtime.results.output import prepare_folder, write_results
from tests.conftest import LinearEngine
from tests.runtime.cuda.engines import Through
from tests.runtime.cuda.host_device import HostDevice


class Listener:
    def __init__(self) -> None:
        self.started: list[str] = []

    def case_started(self, name: str) -> None:
        self.started.append(name)

    def case_advanced(self, share: float) -> None:
        pass


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter(options=SegmentOptions(precision="fp32"))


def run(scan: Path, output: Path, segmenter: Segmenter, **options: bool) -> Sequence[CaseResult]:
    prepare_folder(output)
    cases = find_cases(scan).cases
    return list(segment_folder(cases, segmenter, output, Listener(), **options))


def test_each_case_gets_labels_picture_and_report(
    small_scan: Path, tmp_path: Path, segmenter: Segmenter
) -> None:
    (result,) = run(small_scan, tmp_path / "out", segmenter)
    assert result.status == "done"
    names = sorted(f.name for f in (tmp_path / "out").iterdir())
    assert names == ["small.json", "small.png", "small_seg.nii.gz"]

    labels = nib.load(tmp_path / "out" / "small_seg.nii.gz")
    source = nib.load(small_scan / "small" / "small_t1.nii.gz")
    assert labels.get_data_dtype() == np.uint8
    assert labels.shape == source.shape
    np.testing.assert_array_equal(labels.affine, source.affine)

    report = json.loads((tmp_path / "out" / "small.json").read_text())
    assert report == result.report
    voxels = np.asarray(labels.dataobj)
    assert report["volumes_ml"]["ET"] == round(int((voxels == 4).sum()) / 1000, 3)
    assert report["model"]["manifest_sha256"] == segmenter.bundle.sha256
    assert report["engine"]["name"] == "openvino"
    assert report["engine"]["precision"] == "fp32"
    assert set(report["inputs"]) == {"t1", "t1ce", "t2", "flair"}
    assert {"load", "preprocess", "network", "blend", "encode"} <= set(report["elapsed_ms"])

    with Image.open(tmp_path / "out" / "small.png") as picture:
        assert picture.format == "PNG"


def test_one_bad_case_does_not_stop_the_others(
    small_scan: Path, tmp_path: Path, segmenter: Segmenter
) -> None:
    for name in ("another", "zzz"):
        shutil.copytree(small_scan / "small", small_scan / name)
        for file in (small_scan / name).iterdir():
            file.rename(file.with_name(file.name.replace("small", name)))
    broken = small_scan / "small" / "small_t2.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-20])
    results = {r.name: r for r in run(small_scan, tmp_path / "out", segmenter)}
    assert [results[n].status for n in ("another", "small", "zzz")] == ["done", "failed", "done"]
    assert f"{broken}: the gzip stream is truncated" in results["small"].note
    assert not list((tmp_path / "out").glob("*small*"))
    np.testing.assert_array_equal(
        *(nib.load(tmp_path / "out" / f"{n}_seg.nii.gz").get_fdata() for n in ("another", "zzz"))
    )


def test_finished_cases_are_skipped_until_asked_for(
    small_scan: Path, tmp_path: Path, segmenter: Segmenter
) -> None:
    out = tmp_path / "out"
    run(small_scan, out, segmenter)
    written = (out / "small.json").stat().st_mtime_ns
    (again,) = run(small_scan, out, segmenter)
    assert (again.status, again.note) == ("skipped", "")
    assert (out / "small.json").stat().st_mtime_ns == written
    (anew,) = run(small_scan, out, segmenter, overwrite=True)
    assert anew.status == "done"
    assert (out / "small.json").stat().st_mtime_ns > written


def test_a_result_of_other_options_is_neither_taken_nor_lost(
    small_scan: Path, tmp_path: Path, segmenter: Segmenter
) -> None:
    run(small_scan, tmp_path / "out", segmenter)
    before = (tmp_path / "out" / "small_seg.nii.gz").read_bytes()
    other = Segmenter(options=SegmentOptions(precision="fp32", min_voxels=7))
    (result,) = run(small_scan, tmp_path / "out", other)
    assert result.status == "failed"
    assert (
        "holds a result of small from other options (min_voxels 150); choose another output"
        in result.note
    )
    (result,) = run(
        small_scan, tmp_path / "out", Segmenter(options=SegmentOptions(engine="onnxruntime"))
    )
    assert "from another engine or precision" in result.note
    assert (tmp_path / "out" / "small_seg.nii.gz").read_bytes() == before
    (result,) = run(small_scan, tmp_path / "out", other, overwrite=True)
    assert result.status == "done"


def test_the_result_of_another_patient_of_the_same_name_is_not_taken(
    small_scan: Path, tmp_path: Path, segmenter: Segmenter
) -> None:
    run(small_scan, tmp_path / "out", segmenter)
    file = small_scan / "small" / "small_t1.nii.gz"
    image = nib.load(file)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1], image.affine), file)
    (result,) = run(small_scan, tmp_path / "out", segmenter)
    assert result.status == "failed"
    assert "holds a result of small from another scan" in result.note


@pytest.mark.parametrize("lost", ["small.png", "small_seg.nii.gz"])
def test_a_case_that_lacks_a_file_is_not_finished(
    small_scan: Path, tmp_path: Path, segmenter: Segmenter, lost: str
) -> None:
    run(small_scan, tmp_path / "out", segmenter)
    (tmp_path / "out" / lost).unlink()
    (result,) = run(small_scan, tmp_path / "out", segmenter)
    assert result.status == "done"


def test_an_option_that_only_one_of_two_runs_has_is_named(small_scan: Path, tmp_path: Path) -> None:
    plain = Segmenter(options=SegmentOptions(precision="fp32"))
    other = Segmenter(options=SegmentOptions(precision="fp32", decide="threshold"))
    for first, second, said in (
        (plain, other, "(fuse vote, without decide)"),
        (other, plain, "(fuse mean, decide threshold)"),
    ):
        out = tmp_path / said
        run(small_scan, out, first)
        (result,) = run(small_scan, out, second)
        assert f"from other options {said}" in result.note


def test_a_case_that_lacks_a_file_is_still_of_its_options(
    small_scan: Path, tmp_path: Path, segmenter: Segmenter
) -> None:
    run(small_scan, tmp_path / "out", segmenter)
    (tmp_path / "out" / "small.png").unlink()
    other = Segmenter(options=SegmentOptions(precision="fp32", min_voxels=7))
    (result,) = run(small_scan, tmp_path / "out", other)
    assert result.status == "failed"
    assert "from other options" in result.note


@pytest.mark.parametrize("kind", ["pipe", "device", "nested"])
def test_a_report_that_is_none_is_neither_waited_for_nor_replaced(
    small_scan: Path, tmp_path: Path, segmenter: Segmenter, kind: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    report = out / "small.json"
    if kind == "pipe":
        os.mkfifo(report)
    elif kind == "device":
        report.symlink_to("/dev/zero")
    else:
        report.write_text("[" * 100_000)
    (result,) = segment_folder(find_cases(small_scan).cases, segmenter, out, Listener())
    assert "small.json: exists without a report of attnseg" in result.note
    assert [file.name for file in out.iterdir()] == ["small.json"]


def test_labels_that_were_corrected_by_hand_are_kept(
    small_scan: Path, tmp_path: Path, segmenter: Segmenter
) -> None:
    run(small_scan, tmp_path / "out", segmenter)
    labels = tmp_path / "out" / "small_seg.nii.gz"
    labels.write_bytes(labels.read_bytes() + b"x")
    (result,) = run(small_scan, tmp_path / "out", segmenter)
    assert result.status == "failed"
    assert f"{labels}: was changed after attnseg wrote it" in result.note
    assert labels.read_bytes().endswith(b"x")


def test_labels_that_a_stopped_run_left_are_made_anew(
    small_scan: Path, tmp_path: Path, segmenter: Segmenter
) -> None:
    run(small_scan, tmp_path / "out", segmenter)
    (tmp_path / "out" / "small.json").unlink()
    (result,) = run(small_scan, tmp_path / "out", segmenter)
    assert result.status == "done"


@pytest.mark.parametrize("name", ["small.json", "small.png"])
def test_files_of_unknown_origin_are_not_overwritten(
    small_scan: Path, tmp_path: Path, segmenter: Segmenter, name: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    (result,) = run(small_scan, tmp_path / "out", segmenter)
    assert result.status == "failed"
    assert f"{name}: exists without a report of attnseg" in result.note
    assert (tmp_path / "out" / name).read_text() == "{}"


def test_warnings_are_in_the_report(small_scan: Path, tmp_path: Path, segmenter: Segmenter) -> None:
    for file in (small_scan / "small").iterdir():
        image = nib.load(file)
        coarse = image.affine @ np.diag([2.0, 2, 2, 1])
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), coarse), file)
    run(small_scan, tmp_path / "out", segmenter)
    report = json.loads((tmp_path / "out" / "small.json").read_text())
    assert "spacing is 2 x 2 x 2 mm" in report["warnings"][0]


def test_labels_of_unknown_origin_are_not_overwritten(
    small_scan: Path, tmp_path: Path, segmenter: Segmenter
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "small_seg.nii.gz").write_bytes(b"corrected by hand")
    (result,) = run(small_scan, tmp_path / "out", segmenter)
    assert result.status == "failed"
    assert "exists without a report of attnseg" in result.note
    assert (tmp_path / "out" / "small_seg.nii.gz").read_bytes() == b"corrected by hand"


def test_an_error_that_nobody_foresaw_fails_one_case(
    small_scan: Path, tmp_path: Path, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr(folder, "render_picture", fail)
    (result,) = run(small_scan, tmp_path / "out", segmenter)
    assert result.status == "failed"
    assert "unexpected ZeroDivisionError (surprise)" in result.note
    assert result.error is not None
    assert isinstance(result.error.__cause__, ZeroDivisionError)
    assert list((tmp_path / "out").iterdir()) == []


def test_expert_labels_beside_the_scan_are_never_overwritten(
    small_scan: Path, segmenter: Segmenter
) -> None:
    truth = small_scan / "small" / "small_seg.nii.gz"
    before = truth.read_bytes()
    (result,) = run(small_scan, small_scan / "small", segmenter, overwrite=True)
    assert result.status == "failed"
    assert "could be overwritten" in result.note
    assert truth.read_bytes() == before


def test_a_write_that_fails_leaves_nothing_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_results(tmp_path, {"a": b"new", "b": b"new"})
    assert [f.name for f in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_set_that_was_half_replaced_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("labels", "picture", "report"):
        (tmp_path / name).write_bytes(b"old")
    replace = os.replace

    def fail_at_picture(source: Path, target: Path) -> None:
        if target.name == "picture":
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_picture)
    with pytest.raises(OutputError, match="Permission denied"):
        write_results(tmp_path, dict.fromkeys(("labels", "picture", "report"), b"new"))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["labels", "picture"]


def copies(scan: Path, number: int) -> None:
    """More cases `c0`, `c1`, ... like `small`."""
    for index in range(number):
        shutil.copytree(scan / "small", scan / f"c{index}")
        for file in (scan / f"c{index}").iterdir():
            file.rename(file.with_name(file.name.replace("small", f"c{index}")))


def test_one_case_is_read_and_one_written_while_a_third_is_segmented(
    small_scan: Path, tmp_path: Path, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step waits for one of its neighbour, which would never come if they took turns."""
    copies(small_scan, 2)
    names = ["c0", "c1", "small"]
    began = {step: {name: Event() for name in names} for step in ("load", "submit", "finish")}
    load, finish, submit = folder._load, folder._finish, Segmenter.submit
    order = iter(names)

    def wait_for(step: str, name: str, offset: int) -> None:
        place = names.index(name) + offset
        if place < len(names):
            assert began[step][names[place]].wait(60), f"{step} {names[place]} came too late"

    def noted_load(case: Case, *rest: Any) -> Any:
        began["load"][case.name].set()
        return load(case, *rest)

    def noted_submit(self: Segmenter, *rest: Any) -> Any:
        name = next(order)
        began["submit"][name].set()
        wait_for("load", name, 1)
        return submit(self, *rest)

    def noted_finish(case: Case, *rest: Any) -> Any:
        wait_for("submit", case.name, 1)
        return finish(case, *rest)

    monkeypatch.setattr(folder, "_load", noted_load)
    monkeypatch.setattr(folder, "_finish", noted_finish)
    monkeypatch.setattr(Segmenter, "submit", noted_submit)
    results = run(small_scan, tmp_path / "out", segmenter)
    assert [(r.name, r.status) for r in results] == [(name, "done") for name in names]


@pytest.mark.parametrize("fallback", [None, "cpu"])
def test_a_gpu_that_is_lost_fails_its_case_and_the_rest_go_on_where_it_was_said(
    small_scan: Path, tmp_path: Path, host: HostDevice, fallback: Any
) -> None:
    copies(small_scan, 3)
    engine = Through(host, LinearEngine(np.eye(4, dtype=np.float32)), (1, 1))
    segmenter = Segmenter(options=SegmentOptions(fallback=fallback), engine=engine)

    def lose(*_: Any) -> None:
        raise DeviceLostError("the GPU failed in kernel blend: CUDA_ERROR_LAUNCH_FAILED (it did)")

    class Listening(Listener):
        def case_started(self, name: str) -> None:
            if name == "c1":
                engine.enqueue = lose  # type: ignore[method-assign]

    prepare_folder(tmp_path / "out")
    cases = find_cases(small_scan).cases
    results = list(segment_folder(cases, segmenter, tmp_path / "out", Listening()))
    states = [(r.name, r.status) for r in results]
    assert states[:2] == [("c0", "done"), ("c1", "failed")]
    assert "CUDA_ERROR_LAUNCH_FAILED" in results[1].note
    assert results[0].report["engine"]["name"] == "linear"
    assert results[0].report["device_memory"]["planned_bytes"] > 0
    if fallback:
        assert states[2:] == [("c2", "done"), ("small", "done")]
        assert {r.report["engine"]["device"] for r in results[2:]} == {"cpu"}
    else:
        assert states[2:] == [("c2", "failed"), ("small", "failed")]
        assert all("not tried, as the GPU failed" in r.note for r in results[2:])
    written = sorted(f.stem for f in (tmp_path / "out").glob("*.json"))
    assert written == [name for name, status in states if status == "done"]


@pytest.mark.parametrize("length", [222, 250])  # and 11 for the ending, and 23 for temporary names
def test_a_name_too_long_for_a_result_is_found_before_any_work(
    small_scan: Path,
    tmp_path: Path,
    segmenter: Segmenter,
    monkeypatch: pytest.MonkeyPatch,
    length: int,
) -> None:
    (case,) = find_cases(small_scan).cases
    long = replace(case, name="x" * length)
    monkeypatch.setattr(segmenter, "submit", None)
    (tmp_path / "out").mkdir()
    (result,) = segment_folder([long], segmenter, tmp_path / "out", Listener())
    cause = f"the name of the case is {length} bytes long, too long for a result;"
    assert result.note.startswith(cause)
    assert f"by {length - 221} bytes" in result.note
    monkeypatch.undo()
    (result,) = segment_folder(
        [replace(case, name="x" * 221)], segmenter, tmp_path / "out", Listener()
    )
    assert result.status == "done"


def test_the_warnings_of_a_case_are_in_its_report_and_picture(
    small_scan: Path, tmp_path: Path, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = find_cases(small_scan).cases
    for file in case.files:
        image = nib.load(file)
        thick = nib.Nifti1Image(np.asarray(image.dataobj), image.affine @ np.diag([1, 1, 1.5, 1]))
        nib.save(thick, file)
    drawn: list[tuple[str, ...]] = []
    draw = folder.render_picture

    def spy(*args: Any, **given: Any) -> bytes:
        drawn.append(given["warnings"])
        return draw(*args, **given)

    monkeypatch.setattr(folder, "render_picture", spy)
    (result,) = run(small_scan, tmp_path / "out", segmenter)
    (warning,) = result.report["warnings"]
    assert warning.startswith("spacing is 1 x 1 x 1.5 mm")
    assert drawn == [(warning,)]
    assert result.report["resampled_to_mm"] == [1, 1, 1]
    written = datetime.fromisoformat(result.report["written"])
    assert timedelta(0) <= datetime.now(UTC) - written < timedelta(minutes=10)


def test_a_finished_case_with_warnings_fails_a_strict_run(
    small_scan: Path, tmp_path: Path, segmenter: Segmenter
) -> None:
    (case,) = find_cases(small_scan).cases
    for file in case.files:
        image = nib.load(file)
        thick = nib.Nifti1Image(np.asarray(image.dataobj), image.affine @ np.diag([1, 1, 1.5, 1]))
        nib.save(thick, file)
    assert run(small_scan, tmp_path / "out", segmenter)[0].status == "done"
    assert run(small_scan, tmp_path / "out", segmenter)[0].status == "skipped"
    strict = Segmenter(options=SegmentOptions(precision="fp32", strict=True))
    (result,) = run(small_scan, tmp_path / "out", strict)
    assert result.status == "failed"
    assert "leave strict out" in result.note
    assert len(list((tmp_path / "out").iterdir())) == 3  # the results are kept


class Meanwhile(Listener):
    """Lets another run finish the same cases as soon as a case is begun."""

    def __init__(self, scan: Path, output: Path, other: Segmenter) -> None:
        super().__init__()
        self.scan, self.output, self.other = scan, output, other

    def case_started(self, name: str) -> None:
        (result,) = run(self.scan, self.output, self.other)
        assert result.status == "done"


@pytest.mark.parametrize(
    ("min_voxels", "overwrite", "kept"), [(7, False, 7), (7, True, 150), (150, False, 150)]
)
def test_a_result_that_another_run_wrote_meanwhile_is_kept_unless_it_is_the_same(
    small_scan: Path,
    tmp_path: Path,
    segmenter: Segmenter,
    min_voxels: int,
    overwrite: bool,
    kept: int,
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    other = Segmenter(options=SegmentOptions(precision="fp32", min_voxels=min_voxels))
    cases, listener = find_cases(small_scan).cases, Meanwhile(small_scan, out, other)
    (result,) = segment_folder(cases, segmenter, out, listener, overwrite)
    report = json.loads((out / "small.json").read_text())
    assert report["options"]["min_voxels"] == kept
    assert report["labels_sha256"] == sha256((out / "small_seg.nii.gz").read_bytes()).hexdigest()
    if kept == 7:
        assert result.status == "failed"
        assert result.note == (
            f"{out}: holds a result of small from other options (min_voxels 7); choose another "
            "output folder, or give overwrite=True"
        )
    else:
        assert result.status == "done"


def test_what_a_killed_run_left_is_removed_by_the_next(
    small_scan: Path, tmp_path: Path, segmenter: Segmenter
) -> None:
    left = [f".small.json.{'0' * 16}.part", f".gone_seg.nii.gz.{'f' * 16}.part"]
    for name in left:
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".small.json.part").write_bytes(b"of somebody else")
    list(segment_folder(find_cases(small_scan).cases, segmenter, tmp_path, Listener()))
    hidden = [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]
    assert hidden == [".small.json.part"]


@pytest.mark.parametrize(
    ("made", "given", "message"),
    [
        ("file", "file", "file: is a file, not a folder; choose another output folder"),
        ("file", "file/out", "file: is a file, not a folder"),
        ("link", "link", "link: is a link to nowhere, which does not exist; create nowhere, or"),
        ("link", "link/deep/out", "link: is a link to nowhere, which does not exist"),
        ("", "a\0b", "holds a null character; choose another output folder"),
    ],
)
def test_a_path_that_cannot_be_a_folder_is_refused(
    tmp_path: Path, made: str, given: str, message: str
) -> None:
    if made == "file":
        (tmp_path / made).touch()
    elif made == "link":
        (tmp_path / made).symlink_to("nowhere")
    with pytest.raises(OutputError, match=re.escape(message)):
        prepare_folder(tmp_path / given)
    assert [file.name for file in tmp_path.iterdir()] == [made] * bool(made)
