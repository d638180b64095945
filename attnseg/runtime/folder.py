"""Segmentation of a list of cases; a failed case does not stop the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from attnseg.runtime.case.nifti import encode_labels, encode_probabilities, read_volume
from attnseg.runtime.case.scans import Case
from attnseg.runtime.errors import AttnsegError, OutputError, Setting, VolumeError
from attnseg.runtime.files import LONGEST_NAME, remove_partial
from attnseg.runtime.limits import unforeseen
from attnseg.runtime.pipelines.base import Pending, Staged
from attnseg.runtime.results.output import write_results
from attnseg.runtime.results.picture import render_picture
from attnseg.runtime.results.provenance import Provenance
from attnseg.runtime.results.report import earlier_report, encode_report, make_report, output_names
from attnseg.runtime.segmenter import Segmenter
from attnseg.runtime.steps.clock import StageClock
from attnseg.runtime.threads import Call, Threads


@dataclass(frozen=True)
class CaseResult:
    """Result of one case.

    Attributes:
        name: Name of the case.
        status: `done`, `skipped` (already finished by an earlier run) or `failed`.
        report: Report of a case that is done or skipped; empty for a failed one.
        error: Exception of a failed case, with its traceback; None otherwise.
    """

    name: str
    status: Literal["done", "skipped", "failed"]
    report: Mapping[str, Any] = field(default_factory=dict)
    error: AttnsegError | None = None

    @property
    def note(self) -> str:
        """Reason of the failure in one line, empty otherwise."""
        return str(self.error) if self.error else ""


class Listener(Protocol):
    """Receiver of progress notifications."""

    def case_started(self, name: str) -> None:
        """Called before a case is segmented."""

    def case_advanced(self, share: float) -> None:
        """Called with the fraction of the network's work on the case that is done, 0 to 1."""


@dataclass(frozen=True)
class _Loaded:
    staged: Staged
    elapsed_ms: float


def _load(case: Case, segmenter: Segmenter) -> _Loaded:
    clock = StageClock()
    with clock.stage("load"):
        volume = read_volume(case.files, segmenter.plan.threads)
    return _Loaded(segmenter.stage(volume), clock.elapsed_ms["load"])


def _check_output(case: Case, output: Path, probabilities: bool) -> None:
    """Reject the scan's own folder, where `CASE_seg.nii.gz` is the name of expert labels.

    A name that is too long for a result is also rejected, before any work.
    """
    if case.folder.resolve() == output.resolve():
        raise OutputError(
            f"{output}: is the folder of case {case.name}, whose label file could be overwritten",
            "choose another output folder",
        )
    longest = max(len(name.encode()) for name in output_names(case.name, probabilities).values())
    if longest > LONGEST_NAME:
        raise OutputError(
            f"the name of the case is {len(case.name.encode())} bytes long, too long for a result",
            f"shorten the names of its files by {longest - LONGEST_NAME} bytes",
        )


def _finish(
    case: Case,
    loaded: _Loaded,
    pending: Pending,
    segmenter: Segmenter,
    output: Path,
    overwrite: bool,
) -> CaseResult:
    """Wait for the segmentation of a case and write its result files."""

    def check_again() -> None:  # another process may have finished the case in the meantime
        if not overwrite:
            earlier_report(output, case, segmenter.provenance)

    clock = StageClock()
    clock.elapsed_ms["load"] = loaded.elapsed_ms
    volume = loaded.staged.volume
    result = pending.result()
    probabilities = result.probabilities
    names = output_names(case.name, probabilities is not None)
    clock.elapsed_ms.update(result.elapsed_ms)
    with clock.stage("encode"):
        labels = encode_labels(result.labels, volume)
        maps = [] if probabilities is None else [encode_probabilities(probabilities, volume)]
    with clock.stage("picture"):
        picture = render_picture(
            volume,
            result.labels,
            segmenter.bundle.manifest,
            case.name,
            warnings=result.warnings,
        )
    timed = replace(result, elapsed_ms=clock.elapsed_ms)
    provenance = Provenance(segmenter.bundle, result.engine, segmenter.plan.settings())
    report = make_report(case, volume, timed, provenance, labels)
    contents = (labels, *maps, picture, encode_report(report))
    write_results(output, dict(zip(names.values(), contents, strict=True)), check_again)
    return CaseResult(case.name, "done", report)


def case_error(case: Case, error: Exception) -> AttnsegError:
    """Convert an exception of a case to an `AttnsegError`; those are returned unchanged."""
    return error if isinstance(error, AttnsegError) else unforeseen(error, f"{case.folder}: ")


def _failed(case: Case, error: Exception) -> CaseResult:
    return CaseResult(case.name, "failed", error=case_error(case, error))


def _earlier(case: Case, segmenter: Segmenter, output: Path) -> CaseResult | None:
    """Result of an earlier run: `skipped`, `failed` if it conflicts, None if unfinished."""
    try:
        _check_output(case, output, segmenter.plan.probabilities)
        report = earlier_report(output, case, segmenter.provenance)
    except Exception as error:  # whatever it is, the other cases go on
        return _failed(case, error)
    if report and segmenter.plan.rules.strict and report.get("warnings"):
        first = str(report["warnings"][0])
        warned = VolumeError(first, "mend the scan, or leave {} out", Setting("strict"))
        return CaseResult(case.name, "failed", report, warned)
    return CaseResult(case.name, "skipped", report) if report else None


def _loaded_ahead(
    cases: Sequence[Case], segmenter: Segmenter
) -> Iterator[tuple[Case, Call[_Loaded]]]:
    """Cases with their volumes; each is read while the previous case is segmented."""
    with Threads() as reader:
        ahead = reader.submit(_load, cases[0], segmenter) if cases else None
        for index, case in enumerate(cases):
            assert ahead is not None
            current, ahead = ahead, None
            current.wait()  # so that at most one volume is held ahead
            if index + 1 < len(cases):
                ahead = reader.submit(_load, cases[index + 1], segmenter)
            yield case, current


def _results(
    cases: Sequence[Case],
    segmenter: Segmenter,
    output: Path,
    listener: Listener,
    overwrite: bool,
) -> Iterator[Call[CaseResult]]:
    """Results of the cases; files are written while the next case is segmented."""

    def finish(case: Case, loaded: _Loaded, pending: Pending) -> CaseResult:
        try:
            return _finish(case, loaded, pending, segmenter, output, overwrite)
        except Exception as error:  # whatever it is, the other cases go on
            return _failed(case, error)

    with Threads() as finisher:
        for case, ahead in _loaded_ahead(cases, segmenter):
            listener.case_started(case.name)
            try:
                _check_output(case, output, segmenter.plan.probabilities)
                loaded = ahead.result()
                pending = segmenter.submit(loaded.staged, listener.case_advanced)
            except Exception as error:  # whatever it is, the other cases go on
                yield finisher.submit(_failed, case, error)
            else:
                yield finisher.submit(finish, case, loaded, pending)


def segment_folder(
    cases: Iterable[Case],
    segmenter: Segmenter,
    output: Path,
    listener: Listener,
    overwrite: bool = False,
) -> Iterator[CaseResult]:
    """Segment cases in order, and yield each result as soon as it is available.

    Reading, segmenting and writing of consecutive cases overlap. Several processes may write to
    one folder: a result of other options that another process writes in the meantime is kept, and
    the case fails. What killed processes left in the folder is removed.

    Args:
        cases: Cases in processing order.
        segmenter: Segmenter that runs the model.
        output: Folder for the result files; must exist.
        listener: Receiver of progress notifications.
        overwrite: Whether finished cases are segmented again instead of skipped.

    Yields:
        Result of each case; skipped cases, and those with a conflicting result, come first.
    """
    remove_partial(output)
    pending = []
    for case in cases:
        earlier = None if overwrite else _earlier(case, segmenter, output)
        if earlier:
            yield earlier
        else:
            pending.append(case)
    before: Call[CaseResult] | None = None
    for current in _results(pending, segmenter, output, listener, overwrite):
        if before:
            yield before.result()
        before = current
    if before:
        yield before.result()
