"""Result files of a case: labels, picture and report, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnseg._version import __version__
from attnseg.runtime.errors import OutputError
from attnseg.runtime.scans import Case
from attnseg.runtime.segmenter import Segmentation, Segmenter
from attnseg.runtime.volume import Volume


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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"attnseg")
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written to ({error.strerror}); choose another with -o"
        ) from error


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files under temporary names, then rename them, the last one last.

    Raises:
        OutputError: a file could not be written; none of the new ones stays.
    """
    partial: list[tuple[Path, Path]] = []
    try:
        for name, content in files.items():
            temporary = folder / f".{name}.{os.getpid()}.part"
            partial.append((temporary, folder / name))
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        for temporary, final in partial:
            os.replace(temporary, final)
    except OSError as error:
        raise OutputError(
            f"{folder}: results could not be written ({error.strerror}); "
            "free some space and run again"
        ) from error
    finally:
        for temporary, _ in partial:
            temporary.unlink(missing_ok=True)


def identity(segmenter: Segmenter) -> dict[str, Any]:
    """What a result depends on besides the scan; equal for runs that give equal labels."""
    manifest = segmenter.bundle.manifest
    return {
        "model": {"name": manifest.name, "manifest_sha256": segmenter.bundle.sha256},
        "engine": segmenter.engine_info.to_dict(),
        "options": segmenter.settings,
    }


def make_report(
    case: Case,
    volume: Volume,
    result: Segmentation,
    segmenter: Segmenter,
    elapsed_ms: Mapping[str, float],
) -> dict[str, Any]:
    """The report of one case, as plain values for JSON."""
    names = [channel.name for channel in segmenter.bundle.manifest.channels]
    files = zip(names, case.files, volume.sha256, strict=True)
    return {
        "case": case.name,
        "attnseg": __version__,
        "intended_use": segmenter.bundle.manifest.intended_use,
        **identity(segmenter),
        "inputs": {name: {"file": file.name, "sha256": sha} for name, file, sha in files},
        "shape": list(volume.shape),
        "spacing_mm": [round(s, 6) for s in volume.spacing_mm],
        "orientation": volume.orientation,
        "volumes_ml": result.volumes_ml,
        "windows_per_pass": result.windows,
        "components_removed": result.components_removed,
        "elapsed_ms": {stage: round(ms, 1) for stage, ms in elapsed_ms.items()},
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
    try:
        report = json.loads((folder / names["report"]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None
