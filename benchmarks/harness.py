"""Functions shared by the benchmarks: description of the machine, and timing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = [x for x in info.read_text().splitlines() if ":" in x]
    fields = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    flags = set(fields.get("flags", "").split())
    units = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return f"{fields.get('model name', 'unknown')} ({', '.join(units)})"


def print_machine(*packages: str) -> None:
    """Print processor, threads, load average, and the versions of Python and `packages`."""
    load = f"{os.getloadavg()[0]:.1f}"
    print(f"machine   {_processor()}, {os.cpu_count()} threads, load {load}")
    print(f"python    {platform.python_version()}, {platform.system()} {platform.release()}")
    for package in packages:
        try:
            print(f"{package:<9} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package:<9} not installed")


def median_ms(run: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
    """Median wall-clock time of `run` in milliseconds, after `warm_up` untimed calls."""
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)
