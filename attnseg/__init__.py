"""attnseg: 3-D medical image segmentation, from training to inference without PyTorch."""

from attnseg._version import __version__
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
