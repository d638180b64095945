"""Provenance of a result: model, engine and options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnseg.runtime.engines.base import EngineInfo
from attnseg.runtime.model.bundle import Bundle


@dataclass(frozen=True)
class Provenance:
    """Everything that a result depends on besides the scan.

    Attributes:
        bundle: Bundle of the model.
        engine: Engine that runs the model.
        settings: Options that affect the result.
    """

    bundle: Bundle
    engine: EngineInfo
    settings: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in reports."""
        model = {
            "name": self.bundle.manifest.name,
            "manifest_sha256": self.bundle.sha256,
        }
        return {"model": model, "engine": self.engine.to_dict(), "options": dict(self.settings)}
