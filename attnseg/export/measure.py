"""What of a bundle this machine can run, and the parity gate over all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from attnseg.export.parity import Candidate, Gate, NotRun, ParityReport, SimulatedFp16
from attnseg.export.samples import Sample
from attnseg.runtime.bundle import Budget, Bundle, FileEntry
from attnseg.runtime.engines.base import Engine, EngineInfo
from attnseg.runtime.engines.choice import ENGINES, installed_engines
from attnseg.runtime.errors import EngineError
from attnseg.runtime.golden import Golden
from attnseg.runtime.segmenter import available_threads
from attnseg.trainer.networks import Network


class TorchEngine:
    """The trained network itself, in fp32: what everything else is compared with."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.info = EngineInfo("torch", torch.__version__, "fp32", "cpu")

    def infer(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `attnseg.runtime.engines.base.Engine.infer`."""
        with torch.inference_mode():
            return np.asarray(self._network(torch.from_numpy(batch)).numpy())


def _candidates(bundle: Bundle, threads: int) -> Iterator[Candidate]:
    """Everything that this machine can run, made one by one as each holds memory."""
    installed = [name for name, version in installed_engines().items() if version]
    if not installed:
        raise EngineError("parity needs an inference engine; pip install 'attnseg[cpu]'")
    graph = bundle.file("onnx")
    for name in installed:
        yield Candidate("fp32", ENGINES[name](graph, "fp32", threads))
    if "openvino" in installed:
        try:
            engine = ENGINES["openvino"](graph, "bf16", threads)
        except EngineError:
            pass  # the processor has no bf16
        else:
            yield Candidate("bf16", engine, gated=False)  # a way to run, not a file
    if bundle.has("onnx", "fp16"):
        content = bundle.file("onnx", "fp16").read_bytes()
        yield Candidate("fp16", SimulatedFp16(content, threads))


def not_run(files: Mapping[str, FileEntry]) -> tuple[NotRun, ...]:
    """The engines among these files, none of which is run by this version, and why."""
    gpu = Path("/proc/driver/nvidia/version").exists()
    reason = "engines are not run by this version" if gpu else "no NVIDIA GPU on this machine"
    return tuple(
        NotRun(
            entry.precision,
            f"{entry.engine.builder} {entry.engine.version}, {entry.engine.target} ({name})",
            reason,
        )
        for name, entry in files.items()
        if entry.engine and entry.precision
    )


def measure(
    bundle: Bundle,
    reference: Engine,
    golden: Golden,
    samples: Sequence[Sample],
    budget: Budget,
    progress: Callable[[str], None],
) -> ParityReport:
    """Compare every precision that can run here with the reference.

    Args:
        bundle: the model.
        reference: the trained network in fp32.
        golden: a window with the reference's logits.
        samples: cases.
        budget: that the bundle's files have to keep.
        progress: told what is run next.

    Raises:
        EngineError: no engine is installed, or one refuses the graph.
    """
    gate = Gate(bundle, reference, golden, samples, progress)
    measured = tuple(gate.measure(c) for c in _candidates(bundle, available_threads()))
    name = f"{reference.info.name} {reference.info.version} {reference.info.precision}"
    return ParityReport(name, budget, measured, not_run(bundle.manifest.files))
