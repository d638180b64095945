"""Compilation of the kernels by NVRTC, on a machine with or without a GPU.

Cubins are cached in the user's cache folder, keyed by GPU target, version of NVRTC and source. A
cache file that is damaged or cannot be written only costs a compilation.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

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
        Contents of the cubin. For a target that is newer than NVRTC: PTX of the newest compute
        capability that it knows, which the driver compiles when it loads it.

    Raises:
        EngineError: NVRTC is missing, or does not support the target.
    """
    from cuda.bindings import nvrtc

    def call(name: str, *args: Any) -> Any:
        status, *results = getattr(nvrtc, name)(*args)
        if int(status):
            raise _CompilerError(nvrtc.nvrtcGetErrorString(status)[1].decode())
        return results[0] if results else None

    program = None
    try:
        newest, wanted = max(call("nvrtcGetSupportedArchs")), int(target[2:])
        kind = f"sm_{wanted}" if wanted <= newest else f"compute_{newest}"
        source = SOURCE.read_bytes()
        program = call("nvrtcCreateProgram", source, SOURCE.name.encode(), 0, [], [])
        options = [f"--gpu-architecture={kind}", "--fmad=false", "--std=c++17"]
        encoded = [option.encode() for option in options]
        try:
            call("nvrtcCompileProgram", program, len(encoded), encoded)
        except _CompilerError as error:
            log = b" " * call("nvrtcGetProgramLogSize", program)
            call("nvrtcGetProgramLog", program, log)
            raise _CompilerError(log.decode().strip(" \0") or str(error)) from error
        form = "CUBIN" if kind.startswith("sm_") else "PTX"
        code = b" " * call(f"nvrtcGet{form}Size", program)
        call(f"nvrtcGet{form}", program, code)
        return bytes(code)
    except _CompilerError as error:
        reason = " ".join(str(error).split())[:300]
        raise EngineError(
            f"NVRTC cannot compile the kernels for {target}: {reason}",
            f"{install('gpu')}, or use {{}}",
            Setting("device", "cpu"),
        ) from error
    finally:
        if program is not None:
            nvrtc.nvrtcDestroyProgram(program)


class _CompilerError(Exception):
    """NVRTC's message."""


def cached_kernels(target: str, folder: Path) -> bytes:
    """Return the code for a target, compiled and cached in `folder` on first use.

    Several processes may fill the cache concurrently.

    Raises:
        EngineError: The kernels cannot be compiled, see `compile_kernels`.
    """
    compiler = ".".join(map(str, compiler_version()))
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
