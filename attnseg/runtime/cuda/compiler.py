"""Compilation of the kernels by NVRTC, on a machine with or without a GPU.

Cubins are cached in the user's cache folder, keyed by GPU target, cuda-core version and source. A
cache file that is damaged or cannot be written only costs a compilation.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from contextlib import suppress
from pathlib import Path

from attnseg.runtime.cuda.kernels import SOURCE
from attnseg.runtime.errors import EngineError, Setting, UnavailableError
from attnseg.runtime.extras import install
from attnseg.runtime.files import write_file

_DIGEST_BYTES = 32


def compiler_version() -> tuple[int, int]:
    """Return the version of NVRTC as (major, minor).

    Raises:
        UnavailableError: NVRTC is not installed.
    """
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # a missing package or library; they share no base
        raise UnavailableError("NVRTC is not installed", install("gpu")) from error
    return int(major), int(minor)


def compile_kernels(target: str) -> bytes:
    """Compile `kernels.cu` for a compute capability, with or without a GPU.

    Args:
        target: Compute capability, such as `sm86`.

    Returns:
        Contents of the cubin.

    Raises:
        EngineError: cuda-core or NVRTC is missing, or NVRTC does not support the target.
    """
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise EngineError("cuda-core is not installed", install("gpu")) from error
    options = ProgramOptions(arch=f"sm_{target[2:]}", fma=False, std="c++17")
    try:
        compiled = Program(SOURCE.read_text(), "c++", options).compile("cubin")
        return bytes(compiled.code)
    except Exception as error:  # cuda-core's errors share no base but Exception
        reason = " ".join(str(error).split())[:300]
        raise EngineError(
            f"NVRTC cannot compile the kernels for {target}: {reason}",
            f"{install('gpu')}, or use {{}}",
            Setting("device", "cpu"),
        ) from error


def cached_kernels(target: str, folder: Path) -> bytes:
    """Return the cubin for a target, compiled and cached in `folder` on first use.

    Several processes may fill the cache concurrently.

    Raises:
        EngineError: The kernels cannot be compiled, see `compile_kernels`.
    """
    compiler = importlib.metadata.version("cuda-core")
    source = hashlib.sha256(SOURCE.read_bytes() + compiler.encode()).hexdigest()[:16]
    file = folder / f"kernels-{target}-{source}.cubin"
    with suppress(OSError):
        stored = file.read_bytes()
        digest, cubin = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
        if cubin and hashlib.sha256(cubin).digest() == digest:
            return cubin
    cubin = compile_kernels(target)
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_file(file, hashlib.sha256(cubin).digest() + cubin)
    return cubin
