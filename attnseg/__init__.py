"""attnseg: 3-D medical image segmentation, from training to inference without PyTorch.

The names of `__all__` are imported on first use (PEP 562), so that the command line starts, and
answers Ctrl-C, before numpy is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attnseg._version import __version__

if TYPE_CHECKING:
    from attnseg.runtime.case.volume import Volume
    from attnseg.runtime.errors import AttnsegError
    from attnseg.runtime.model.bundle import Bundle
    from attnseg.runtime.options import SegmentOptions
    from attnseg.runtime.pipelines.base import Segmentation
    from attnseg.runtime.segmenter import Segmenter

__all__ = [
    "AttnsegError",
    "Bundle",
    "SegmentOptions",
    "Segmentation",
    "Segmenter",
    "Volume",
    "__version__",
]

_MODULES = {
    "AttnsegError": "errors",
    "Bundle": "model.bundle",
    "SegmentOptions": "options",
    "Segmentation": "pipelines.base",
    "Segmenter": "segmenter",
    "Volume": "case.volume",
}
"""Module of `attnseg.runtime` that defines each name."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"attnseg.runtime.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
