"""Golden window: a network input and the fp32 logits of the trained network for it.

The runtime verifies every GPU engine on it before use.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.errors import BundleError
from attnseg.runtime.model.bundle import Bundle
from attnseg.runtime.steps.decide import Decision

_SMALL_BYTES = 64 << 20  # size of the arrays up to which their compression does not matter
_LARGEST_RATIO = 100  # of the sizes of larger arrays and their file


@dataclass(frozen=True)
class Golden:
    """One window and its reference logits, or several equal ones.

    Attributes:
        image: `(N, C, X, Y, Z)` float32; all values are exactly representable in fp16.
        logits: `(N, K, X, Y, Z)` float32 logits of the trained network in fp32.
    """

    image: NDArray[np.float32]
    logits: NDArray[np.float32]

    def repeated(self, count: int) -> Golden:
        """The first window `count` times, as one batch."""
        image, logits = (np.repeat(array[:1], count, axis=0) for array in (self.image, self.logits))
        return Golden(image, logits)

    def difference(self, logits: NDArray[np.float32]) -> float:
        """Maximum absolute error of an engine's logits, relative to the largest absolute logit."""
        return float(np.abs(logits - self.logits).max() / np.abs(self.logits).max())

    def disagreement(self, logits: NDArray[np.float32], decision: Decision) -> float:
        """Fraction of the voxels whose class differs."""
        pairs = zip(logits, self.logits, strict=True)
        differ = [decision.classes(own) != decision.classes(known) for own, known in pairs]
        return float(np.mean(differ))


def encode_golden(golden: Golden) -> bytes:
    """Encode as `.npz`: `image` as float16, `logits` as float32; the output is deterministic."""
    stream = io.BytesIO()
    np.savez_compressed(stream, image=golden.image.astype(np.float16), logits=golden.logits)
    return stream.getvalue()


def _load(stored: bytes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The two arrays of the file, whose sizes are looked at before they are inflated."""
    with zipfile.ZipFile(io.BytesIO(stored)) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > _LARGEST_RATIO * len(stored) + _SMALL_BYTES:
        raise ValueError(f"{size} bytes in a file of {len(stored)}")
    with np.load(io.BytesIO(stored), allow_pickle=False) as arrays:
        image, logits = arrays["image"], arrays["logits"]
    if image.dtype.kind != "f" or logits.dtype.kind != "f":
        raise TypeError(f"arrays of {image.dtype} and {logits.dtype}")
    with np.errstate(over="ignore"):
        image, logits = image.astype(np.float32), logits.astype(np.float32)
    if not (np.isfinite(image).all() and np.isfinite(logits).all() and logits.any()):
        raise ValueError("values that are not finite, or logits that are all 0")
    return image, logits


def read_golden(bundle: Bundle) -> Golden:
    """Read the golden window of a bundle.

    Raises:
        BundleError: The bundle has no golden window, or the file is invalid.
    """
    file = bundle.file("golden")
    content = file.read_bytes()
    try:
        image, logits = _load(content)
    except Exception as error:  # numpy raises any type for a damaged file, SyntaxError among them
        reason = " ".join(str(error).split())
        raise BundleError(
            f"{file}: holds no golden window ({reason})", "export it again"
        ) from error
    task = bundle.manifest.task
    channels, classes = len(task.channels), task.output_channels
    space = image.shape[2:]
    expected = ((1, channels, *space), (1, classes, *space))
    if (image.shape, logits.shape) != expected or len(space) != 3:
        raise BundleError(
            f"{file}: its shapes {image.shape} and {logits.shape} are not those of a window of "
            f"{channels} channels and {classes} classes",
            "export it again",
        )
    return Golden(image, logits)
