"""JSON and weights of a model folder of another framework, read without running anything in it."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attnseg.runtime.errors import ConfigError, ExportError
from attnseg.runtime.files import read_file
from attnseg.runtime.user_json import parse_json

_SCALAR_TYPES = ("Float64", "Float32", "Float16", "Int64", "Int32", "Bool")


def read_json(path: Path) -> dict[str, Any]:
    """Object of a JSON file.

    Raises:
        ExportError: The file is missing, not JSON, or no object.
    """
    try:
        found = parse_json(read_file(path))
    except FileNotFoundError as error:
        raise ExportError(f"{path}: is missing", f"give a folder with {path.name}") from error
    except OSError as error:
        raise ExportError(f"{path}: cannot be read ({error.strerror})") from error
    except ConfigError as error:
        raise ExportError(f"{path}: {error.cause}") from error
    if not isinstance(found, dict):
        raise ExportError(f"{path}: is not a JSON object")
    return found


@contextmanager
def naming_file(path: Path, mend: str) -> Iterator[None]:
    """Raise errors of the content of a file as `ExportError` that names it.

    Args:
        path: The file.
        mend: Mend of an entry that is missing or of another type.
    """
    try:
        yield
    except ConfigError as error:
        raise ExportError(f"{path}: {error.cause}", error.mend, *error.settings) from error
    except KeyError as error:
        raise ExportError(f"{path}: has no entry {error.args[0]}", mend) from error
    except (TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ExportError(f"{path}: has an entry of another form ({what})", mend) from error


def read_weights(path: Path) -> Mapping[str, Any]:
    """Dictionary of a file written by `torch.save`, with tensors and plain values only.

    Raises:
        ExportError: The file is missing or damaged, or unpickling it would run code.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not check its CRCs
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} does not match its CRC")
        with torch.serialization.safe_globals(_numpy_scalars()):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ExportError(f"{path}: cannot be read ({error.strerror})") from error
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None:
            raise ExportError(f"{path}: is not a checkpoint of PyTorch") from error
        raise ExportError(
            f"{path}: wants to unpickle {wanted[1]}, which could run code",
            "save it again with tensors and plain values only",
        ) from error
    except Exception as error:  # a damaged file can raise any type of exception
        raise ExportError(f"{path}: is not a checkpoint of PyTorch, or is damaged") from error
    if not isinstance(found, Mapping):
        raise ExportError(f"{path}: holds a {type(found).__name__}, not a dictionary of weights")
    return found


def _numpy_scalars() -> list[Any]:
    """What unpickling a number of NumPy needs; nnU-Net logs such numbers."""
    kinds = [type(np.dtype(name.lower())) for name in _SCALAR_TYPES]
    scalar = np.float64(0).__reduce__()[0]
    # Checkpoints name the function by its module at the time, which moved in NumPy 2.
    return [
        np.dtype,
        *kinds,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
    ]
