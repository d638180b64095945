"""The golden window: an input with the logits that the trained network gave for it in fp32.

An engine that a bundle brings along is run on it before it is trusted.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnseg.runtime.bundle import Bundle
from attnseg.runtime.errors import BundleError


@dataclass(frozen=True)
class Golden:
    """One window and its logits.

    Attributes:
        image: `(1, C, X, Y, Z)` float32, each value one that fp16 holds exactly.
        logits: `(1, K, X, Y, Z)` float32, of the trained network in fp32.
    """

    image: NDArray[np.float32]
    logits: NDArray[np.float32]

    def difference(self, logits: NDArray[np.float32]) -> float:
        """Largest difference of an engine's logits, as a share of the largest logit."""
        return float(np.abs(logits - self.logits).max() / np.abs(self.logits).max())

    def disagreement(self, logits: NDArray[np.float32]) -> float:
        """Share of the voxels whose most likely class differs."""
        return float(np.mean(logits.argmax(axis=1) != self.logits.argmax(axis=1)))


def encode_golden(golden: Golden) -> bytes:
    """An `.npz` file: `image` as float16, `logits` as float32; the same bytes each time."""
    stream = io.BytesIO()
    np.savez_compressed(stream, image=golden.image.astype(np.float16), logits=golden.logits)
    return stream.getvalue()


def read_golden(bundle: Bundle) -> Golden:
    """The bundle's golden window.

    Raises:
        BundleError: it has none, or the file does not hold one.
    """
    file = bundle.file("golden")
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as stored:
            image, logits = stored["image"], stored["logits"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise BundleError(f"{file}: holds no golden window ({error}); export it again") from error
    channels, classes = len(bundle.manifest.channels), len(bundle.manifest.labels)
    space = image.shape[2:]
    expected = ((1, channels, *space), (1, classes, *space))
    if (image.shape, logits.shape) != expected or len(space) != 3:
        raise BundleError(
            f"{file}: its shapes {image.shape} and {logits.shape} are not those of a window of "
            f"{channels} channels and {classes} classes; export it again"
        )
    return Golden(image.astype(np.float32), logits.astype(np.float32))
