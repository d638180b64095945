"""A folder of cases: each is read, segmented and written; a bad one does not stop the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from attnseg.runtime.clock import StageClock
from attnseg.runtime.errors import AttnsegError, OutputError
from attnseg.runtime.outputs import (
    earlier_report,
    encode_report,
    make_report,
    output_names,
    write_files,
)
from attnseg.runtime.picture import render_picture
from attnseg.runtime.scans import Case
from attnseg.runtime.segmenter import Pending, Segmenter, Staged
from attnseg.runtime.volume import encode_labels, read_volume


@dataclass(frozen=True)
class CaseResult:
    """What became of a case.

    Attributes:
        name: of the case.
        status: `done`, `skipped` because it was finished before, or `failed`.
        report: of a case that is done or was skipped.
        note: why it failed, in one line.
        error: the same with its traceback.
    """

    name: str
    status: Literal["done", "skipped", "failed"]
    report: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    error: Exception | None = None


class Listener(Protocol):
    """Told how a folder goes on."""

    def case_started(self, name: str) -> None:
        """A case is about to be segmented."""

    def case_advanced(self, share: float) -> None:
        """The share of the network's work on it that is done, 0 to 1."""


@dataclass(frozen=True)
class _Loaded:
    staged: Staged
    elapsed_ms: float


def _load(case: Case, segmenter: Segmenter) -> _Loaded:
    clock = StageClock()
    with clock.stage("load"):
        volume = read_volume(case.files, segmenter.threads)
    return _Loaded(segmenter.stage(volume), clock.elapsed_ms["load"])


def _check_output(case: Case, output: Path) -> None:
    """Refuse to write beside the scan, where `CASE_seg.nii.gz` is the name of expert labels."""
    if case.folder.resolve() == output.resolve():
        raise OutputError(
            f"{output}: is the folder of case {case.name}, whose label file could be overwritten; "
            "choose another folder with -o"
        )


def _finish(
    case: Case, loaded: _Loaded, pending: Pending, segmenter: Segmenter, output: Path
) -> CaseResult:
    """Write the files of a case that was segmented."""
    clock = StageClock()
    clock.elapsed_ms["load"] = loaded.elapsed_ms
    volume, names = loaded.staged.volume, output_names(case.name)
    result = pending.result()
    clock.elapsed_ms.update(result.elapsed_ms)
    with clock.stage("encode"):
        labels = encode_labels(result.labels, volume)
    with clock.stage("picture"):
        manifest = segmenter.bundle.manifest
        picture = render_picture(volume, result.labels, manifest, case.name)
    report = make_report(case, volume, result, segmenter, labels, clock.elapsed_ms)
    contents = (labels, picture, encode_report(report))
    write_files(output, dict(zip(names.values(), contents, strict=True)))
    return CaseResult(case.name, "done", report)


def _failed(case: Case, error: Exception) -> CaseResult:
    if isinstance(error, AttnsegError):
        note = str(error)
    elif isinstance(error, MemoryError):
        note = f"{case.folder}: not enough memory; close other programs or use a smaller window"
    else:
        note = f"{case.folder}: unexpected {type(error).__name__} ({error}); see --debug"
    return CaseResult(case.name, "failed", note=note, error=error)


def _earlier(case: Case, segmenter: Segmenter, output: Path) -> CaseResult | None:
    """What an earlier run left of a case: finished, in the way, or nothing."""
    try:
        report = earlier_report(output, case, segmenter)
    except AttnsegError as error:
        return _failed(case, error)
    return CaseResult(case.name, "skipped", report) if report else None


def _loaded_ahead(
    cases: Sequence[Case], segmenter: Segmenter
) -> Iterator[tuple[Case, Future[_Loaded]]]:
    """Each case with its volume, which is read while the one before it is segmented."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(_load, cases[0], segmenter) if cases else None
        for index, case in enumerate(cases):
            assert ahead is not None
            current, ahead = ahead, None
            current.exception()  # wait, so that no more volumes than one wait in memory
            if index + 1 < len(cases):
                ahead = pool.submit(_load, cases[index + 1], segmenter)
            yield case, current


def _results(
    cases: Sequence[Case], segmenter: Segmenter, output: Path, listener: Listener
) -> Iterator[Future[CaseResult]]:
    """Each case's result, whose files are written while the next case is segmented."""

    def finish(case: Case, loaded: _Loaded, pending: Pending) -> CaseResult:
        try:
            return _finish(case, loaded, pending, segmenter, output)
        except Exception as error:  # whatever it is, the other cases go on
            return _failed(case, error)

    with ThreadPoolExecutor(1) as finisher:
        for case, ahead in _loaded_ahead(cases, segmenter):
            listener.case_started(case.name)
            try:
                _check_output(case, output)
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
    """Segment cases one after the other, and give each result as it comes.

    One case is read and one is written while a third is segmented.

    Args:
        cases: in the order to take them.
        segmenter: the model and options.
        output: folder for the result files; must exist.
        listener: told of progress.
        overwrite: take finished cases again instead of skipping them.
    """
    pending = []
    for case in cases:
        earlier = None if overwrite else _earlier(case, segmenter, output)
        if earlier:
            yield earlier
        else:
            pending.append(case)
    before: Future[CaseResult] | None = None
    for current in _results(pending, segmenter, output, listener):
        if before:
            yield before.result()
        before = current
    if before:
        yield before.result()
