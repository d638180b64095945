"""One process, or several that train together through torch.distributed.

Started by `torchrun --nproc-per-node N -m attnseg train ...`: NCCL on GPUs, gloo on CPUs.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from attnseg.runtime.errors import AttnsegError, TrainingError


@dataclass(frozen=True)
class Devices:
    """This process among those that train together.

    Attributes:
        device: that it computes on.
        rank: its number, 0 for the one that writes and prints.
        count: of processes.
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def name(self) -> str:
        """Of the hardware, for manifests."""
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        return name if self.count == 1 else f"{self.count} x {name}"

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every process, in the order of their ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait at the end for every process; what stopped one of them stops all, in its words."""
        error: AttnsegError | None = None
        try:
            yield
        except AttnsegError as problem:
            error = problem
        words = [problem for problem in self.gather(error and str(error)) if problem]
        if error:
            raise error
        if words:
            raise TrainingError(words[0])


def first_process() -> bool:
    """Whether this process writes and prints, for callers that have no `Devices` at hand."""
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def open_devices() -> Iterator[Devices]:
    """The devices as `torchrun` says in the environment; without it, this process alone."""
    count, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    cuda = torch.cuda.is_available()
    if count == 1:
        yield Devices(torch.device("cuda" if cuda else "cpu"))
        return
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # The processes meet while the slowest still prepares cases, which may take hours.
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1))
    try:
        yield Devices(device, rank, count)
    finally:
        distributed.destroy_process_group()
