"""Result files of a case: labels, picture and report, written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from attnseg._version import __version__
from attnseg.runtime.engines.base import EngineInfo
from attnseg.runtime.errors import OutputError, VolumeError
from attnseg.runtime.scans import Case
from attnseg.runtime.segmenter import Segmentation, Segmenter
from attnseg.runtime.volume import LABEL_DESCRIPTION, Volume, read_labels


def output_names(case: str) -> dict[str, str]:
    """File names of a case's results; the report comes last, as it marks the case as finished."""
    return {
        "labels": f"{case}_seg.nii.gz",
        "picture": f"{case}.png",
        "report": f"{case}.json",
    }


def prepare_output(folder: Path) -> None:
    """Make the folder and try whether files can be written there.

    Raises:
        OutputError: it is a file, or cannot be made or written to.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file, not a folder; choose another with -o")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"attnseg")
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written to ({error.strerror}); choose another with -o"
        ) from error


def _advice(error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "free some space and run again" if full else "check the folder and run again"


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files under temporary names, then rename them.

    The last file marks the set as finished: an old one is removed before the first rename and
    the new one comes last, so that a set which was interrupted never counts as finished.

    Raises:
        OutputError: a file could not be written. No partial file stays, and if it happened
            before the first rename, nothing has changed.
    """
    partial = {folder / f".{name}.{os.getpid()}.part": folder / name for name in files}
    try:
        for temporary, content in zip(partial, files.values(), strict=True):
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        list(partial.values())[-1].unlink(missing_ok=True)
        for temporary, final in partial.items():
            os.replace(temporary, final)
    except OSError as error:
        raise OutputError(
            f"{folder}: results could not be written ({error.strerror}); {_advice(error)}"
        ) from error
    finally:
        for temporary in partial:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _identity(segmenter: Segmenter, engine: EngineInfo) -> dict[str, Any]:
    """What a result depends on besides the scan."""
    manifest = segmenter.bundle.manifest
    return {
        "model": {"name": manifest.name, "manifest_sha256": segmenter.bundle.sha256},
        "engine": engine.to_dict(),
        "options": segmenter.settings,
    }


def _inputs(case: Case, sha256: Sequence[str], segmenter: Segmenter) -> dict[str, Any]:
    names = [channel.name for channel in segmenter.bundle.manifest.channels]
    files = zip(names, case.files, sha256, strict=True)
    return {name: {"file": file.name, "sha256": sha} for name, file, sha in files}


def earlier_report(folder: Path, case: Case, segmenter: Segmenter) -> dict[str, Any] | None:
    """The report of a finished case that this run would only repeat; None if it is not finished.

    Raises:
        OutputError: the folder holds a result of this name which another scan, model, engine or
            other options made, or files of its names that attnseg did not write.
    """
    names = output_names(case.name)
    report = _read_json(folder / names["report"])
    present = [folder / name for name in names.values() if (folder / name).exists()]
    if report is None or "attnseg" not in report:
        # Labels of attnseg without a report were left by a run that was stopped.
        if present and not _is_result(folder / names["labels"]):
            raise OutputError(
                f"{present[0]}: is there without a report of attnseg ({names['report']}); choose "
                "another folder with -o, or --overwrite"
            )
        return None
    differs = _difference(report, case, segmenter)
    if differs:
        raise OutputError(
            f"{folder}: holds a result of {case.name} from {differs}; choose another folder with "
            "-o, or --overwrite"
        )
    if len(present) < len(names):
        return None
    if _sha256(folder / names["labels"]) != report.get("labels_sha256"):
        raise OutputError(
            f"{folder / names['labels']}: was changed after attnseg wrote it; choose another "
            "folder with -o, or --overwrite"
        )
    return report


def _is_result(labels: Path) -> bool:
    """Whether attnseg wrote a label file, as its header says."""
    try:
        header = read_labels(labels).header
    except VolumeError:
        return False
    return header is not None and header["descrip"].item() == LABEL_DESCRIPTION


def _difference(report: Mapping[str, Any], case: Case, segmenter: Segmenter) -> str:
    """In words, what a report was made from that this run is not; empty if nothing."""
    expected = _identity(segmenter, segmenter.engine_info)
    if report.get("inputs") != _inputs(case, [_sha256(f) for f in case.files], segmenter):
        return "another scan"
    if report.get("model") != expected["model"]:
        return "another model"
    if report.get("options") != expected["options"]:
        return "other options"
    if any(
        report.get("engine", {}).get(key) != expected["engine"][key]
        for key in ("name", "precision")
    ):
        return "another engine or precision"
    return ""


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return ""  # reading it as a volume will say why


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None


def make_report(
    case: Case,
    volume: Volume,
    result: Segmentation,
    segmenter: Segmenter,
    labels: bytes,
    elapsed_ms: Mapping[str, float],
) -> dict[str, Any]:
    """The report of one case, as plain values for JSON; `labels` is the file of its result."""
    return {
        "case": case.name,
        "attnseg": __version__,
        "intended_use": segmenter.bundle.manifest.intended_use,
        **_identity(segmenter, result.engine),
        "inputs": _inputs(case, volume.sha256, segmenter),
        "labels_sha256": hashlib.sha256(labels).hexdigest(),
        "shape": list(volume.shape),
        "spacing_mm": [round(s, 6) for s in volume.spacing_mm],
        "orientation": volume.orientation,
        "volumes_ml": result.volumes_ml,
        "windows_per_pass": result.windows,
        "components_removed": result.components_removed,
        "elapsed_ms": {stage: round(ms, 1) for stage, ms in elapsed_ms.items()},
        **({"device_memory": result.memory} if result.memory else {}),
        "warnings": list(result.warnings),
    }


def encode_report(report: Mapping[str, Any]) -> bytes:
    """JSON, indented, ending in a newline."""
    return (json.dumps(report, indent=2) + "\n").encode()


def read_report(folder: Path, case: str) -> dict[str, Any] | None:
    """The report of a finished case, or None if it is not finished: a result file is missing."""
    names = output_names(case)
    if not all((folder / name).is_file() for name in names.values()):
        return None
    return _read_json(folder / names["report"])
