"""Devices of a training run: one process, or several through torch.distributed.

Several are started by `torchrun --nproc-per-node N -m attnseg train ...`: NCCL on GPUs, Gloo on
CPUs.
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
    """Device of this process, and its place among the processes that train together.

    Attributes:
        device: Device that this process computes on.
        rank: Rank of this process; 0 writes and prints.
        count: Number of processes.
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def name(self) -> str:
        """Name of the hardware, as recorded in manifests."""
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
        """Gather the `value` of every process, in rank order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait for every process at the end; an error in one is raised in all."""
        error: AttnsegError | None = None
        try:
            yield
        except AttnsegError as problem:
            error = problem
        others = [parts for parts in self.gather(error and error.args) if parts]
        if error:
            raise error
        if others:
            raise TrainingError(*others[0])


def first_process() -> bool:
    """Whether this process writes and prints, for callers without `Devices`."""
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def open_devices() -> Iterator[Devices]:
    """Open the devices that `torchrun` describes in the environment, else this process alone."""
    count, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    cuda = torch.cuda.is_available()
    if count == 1:
        yield Devices(torch.device("cuda" if cuda else "cpu"))
        return
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # The others wait while the slowest process prepares its cases, which may take hours.
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1))
    try:
        yield Devices(device, rank, count)
    finally:
        distributed.destroy_process_group()
