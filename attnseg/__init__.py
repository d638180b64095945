"""attnseg: 3-D segmentation from training to a workstation, and a runtime without PyTorch."""

from attnseg._version import __version__
from attnseg.runtime.bundle import Bundle
from attnseg.runtime.errors import AttnsegError
from attnseg.runtime.segmenter import Segmentation, Segmenter, SegmentOptions
from attnseg.runtime.volume import Volume

__all__ = [
    "AttnsegError",
    "Bundle",
    "SegmentOptions",
    "Segmentation",
    "Segmenter",
    "Volume",
    "__version__",
]
