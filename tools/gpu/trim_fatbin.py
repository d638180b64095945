"""Remove machine code from a CUDA library, so that it compresses better.

    python trim_fatbin.py LIBRARY OUTPUT --arch 90 --drop 'flash|cutlass|attention'

The code for other compute capabilities, and of modules in which the name of every kernel matches
`--drop`, is overwritten with zeros. Nothing moves, so the library still loads. CUDA loads a module
when one of its kernels is first called (CUDA_MODULE_LOADING=LAZY, the default), so code that is
never called may be missing. Requires `zstandard`, with which nvcc of CUDA 13 compresses code.
"""

from __future__ import annotations

import argparse
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import zstandard

MAGIC = 0xBA55ED50
_SYMBOL = re.compile(rb"\.text\.([A-Za-z0-9_$]+)")


def fatbin_section(data: bytes) -> tuple[int, int]:
    """Offset and size in bytes of the section `.nv_fatbin` of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    heads = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * size) for i in range(count)]
    for head in heads:
        start = heads[names][4] + head[0]
        if data[start : data.index(b"\0", start)] == b".nv_fatbin":
            return head[4], head[5]
    raise SystemExit("the file has no section .nv_fatbin")


def entries(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Offset, size, compute capability and header of each module of machine code."""
    at, size = fatbin_section(data)
    end = at + size
    while at < end - 16:
        magic, _, header, length = struct.unpack_from("<IHHQ", data, at)
        if magic != MAGIC:
            at += 8
            continue
        piece, at = at + header, at + header + length
        while piece < at:
            _, _, head, length = struct.unpack_from("<HHIQ", data, piece)
            (arch,) = struct.unpack_from("<I", data, piece + 28)
            yield piece + head, length, arch, data[piece : piece + head]
            piece += head + length


def kernels_of(content: bytes, header: bytes) -> list[bytes]:
    """Names of the kernels of a module; empty if it cannot be read."""
    packed = struct.unpack_from("<I", header, 16)[0]
    unpacked = struct.unpack_from("<Q", header, 56)[0] if len(header) >= 64 else 0
    content = content[:packed] if packed else content
    if content[:4] != b"\x7fELF":
        try:
            content = zstandard.ZstdDecompressor().decompress(
                content, max_output_size=unpacked or 1 << 28
            )
        except zstandard.ZstdError:
            return []
    return sorted(set(_SYMBOL.findall(content)))


def main() -> None:
    """Write the trimmed library."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("library", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--drop", default="$^")
    options = parser.parse_args()
    source = options.library.read_bytes()
    target, drop = bytearray(source), re.compile(options.drop.encode())
    kept = dropped = 0
    for at, size, arch, header in entries(source):
        wanted = arch == options.arch
        if wanted:
            names = [
                n for n in kernels_of(source[at : at + size], header) if b"EmptyKernel" not in n
            ]
            wanted = not names or not all(drop.search(name) for name in names)
        if wanted:
            kept += size
        else:
            dropped += size
            target[at : at + size] = bytes(size)
    options.output.write_bytes(target)
    print(f"kept {kept / 1e6:.1f} MB of machine code, dropped {dropped / 1e6:.1f}")


if __name__ == "__main__":
    main()
