"""Result files of a case: names, report, and the check of an earlier result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attnseg._version import __version__
from attnseg.runtime.case.nifti import LABEL_DESCRIPTION, read_labels
from attnseg.runtime.case.scans import Case
from attnseg.runtime.case.volume import Volume
from attnseg.runtime.errors import OutputError, Setting, VolumeError
from attnseg.runtime.model.bundle import Bundle
from attnseg.runtime.pipelines.base import Segmentation
from attnseg.runtime.results.provenance import Provenance

_ANOTHER_OR_OVERWRITE: tuple[Any, ...] = (
    "choose another output folder, or give {}",
    Setting("overwrite", True),
)


def output_names(case: str, probabilities: bool = False) -> dict[str, str]:
    """File names of a case's results; the report comes last, as it marks the case as finished."""
    return {
        "labels": f"{case}_seg.nii.gz",
        **({"probabilities": f"{case}_prob.nii.gz"} if probabilities else {}),
        "picture": f"{case}.png",
        "report": f"{case}.json",
    }


def _inputs(case: Case, sha256: Sequence[str], bundle: Bundle) -> dict[str, Any]:
    files = zip(bundle.manifest.task.channel_names, case.files, sha256, strict=True)
    return {name: {"file": file.name, "sha256": sha} for name, file, sha in files}


def earlier_report(folder: Path, case: Case, provenance: Provenance) -> dict[str, Any] | None:
    """Report of a finished case that this run would only repeat; None if it is not finished.

    Raises:
        OutputError: The folder holds a result of this name from another scan, model, engine or
            other options, one whose labels were changed, or files that attnseg did not write.
    """
    names = output_names(case.name, bool(provenance.settings.get("probabilities")))
    report = _read_json(folder / names["report"])
    present = [folder / name for name in names.values() if (folder / name).exists()]
    if report is None or "attnseg" not in report:
        # Labels of attnseg without a report were left by a run that was stopped.
        if present and not _is_result(folder / names["labels"]):
            raise OutputError(
                f"{present[0]}: exists without a report of attnseg ({names['report']})",
                *_ANOTHER_OR_OVERWRITE,
            )
        return None
    differs = _difference(report, case, provenance)
    if differs:
        raise OutputError(
            f"{folder}: holds a result of {case.name} from {differs}", *_ANOTHER_OR_OVERWRITE
        )
    if len(present) < len(names):
        return None
    if _sha256(folder / names["labels"]) != report.get("labels_sha256"):
        raise OutputError(
            f"{folder / names['labels']}: was changed after attnseg wrote it",
            *_ANOTHER_OR_OVERWRITE,
        )
    return report


def _is_result(labels: Path) -> bool:
    """Whether attnseg wrote a label file, according to its header."""
    try:
        header = read_labels(labels).header
    except VolumeError:
        return False
    return header is not None and header["descrip"].item() == LABEL_DESCRIPTION


def _options_that_differ(before: object, now: Mapping[str, Any]) -> str:
    """Options of a report that are not this run's, as text."""
    if not isinstance(before, Mapping):
        return "unknown"
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    return ", ".join(f"{n} {before[n]}" if n in before else f"without {n}" for n in names)


def _difference(report: Mapping[str, Any], case: Case, provenance: Provenance) -> str:
    """Name of what differs between a report's provenance and this run's; empty if nothing."""
    expected, sha256 = provenance.to_dict(), [_sha256(file) for file in case.files]
    if report.get("inputs") != _inputs(case, sha256, provenance.bundle):
        return "another scan"
    if report.get("model") != expected["model"]:
        return "another model"
    before, now = report.get("options"), expected["options"]
    if before != now:
        return f"other options ({_options_that_differ(before, now)})"
    if any(
        report.get("engine", {}).get(key) != expected["engine"][key]
        for key in ("name", "precision")
    ):
        return "another engine or precision"
    return ""


def _sha256(file: Path) -> str:
    if not file.is_file():  # a pipe would be waited for
        return ""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return ""  # reading it as a volume raises the error


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():  # a pipe would be waited for
        return None
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return report if isinstance(report, dict) else None


def make_report(
    case: Case, volume: Volume, result: Segmentation, provenance: Provenance, labels: bytes
) -> dict[str, Any]:
    """Report of one case as plain values for JSON; `labels` is the content of its label file."""
    regions = list(provenance.bundle.manifest.task.regions)  # in the order of the fourth axis
    return {
        "case": case.name,
        "attnseg": __version__,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "intended_use": provenance.bundle.manifest.intended_use,
        **provenance.to_dict(),
        "inputs": _inputs(case, volume.sha256, provenance.bundle),
        "labels_sha256": hashlib.sha256(labels).hexdigest(),
        "shape": list(volume.shape),
        "spacing_mm": [round(s, 6) for s in volume.spacing_mm],
        "orientation": volume.orientation,
        "resampled_to_mm": list(result.resampled_to_mm) if result.resampled_to_mm else None,
        "volumes_ml": result.volumes_ml,
        **({"probabilities": regions} if result.probabilities is not None else {}),
        "windows_per_pass": result.windows,
        "components_removed": result.components_removed,
        "elapsed_ms": {stage: round(ms, 1) for stage, ms in result.elapsed_ms.items()},
        **({"device_memory": result.memory} if result.memory else {}),
        "warnings": list(result.warnings),
    }


def encode_report(report: Mapping[str, Any]) -> bytes:
    """Encode a report as indented JSON that ends in a newline."""
    return (json.dumps(report, indent=2) + "\n").encode()
