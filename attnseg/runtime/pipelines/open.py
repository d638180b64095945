"""Opening of a model: the engine that runs it here, and the pipeline for that engine.

The CUDA pipeline is imported only for an engine on a device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from attnseg.runtime.engines.base import Engine, EngineInfo
from attnseg.runtime.engines.select import (
    GPU_ENGINES,
    EngineRequest,
    Refusal,
    candidates,
    select_engine,
)
from attnseg.runtime.errors import ConfigError, EngineError, Setting
from attnseg.runtime.model.bundle import Bundle
from attnseg.runtime.model.verdict import over_budget
from attnseg.runtime.options import Plan
from attnseg.runtime.pipelines.base import Pipeline, check_channels
from attnseg.runtime.pipelines.host import HostPipeline

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A pipeline, and the reasons why faster engines are not used.

    Attributes:
        pipeline: Pipeline of the model.
        refusals: Engine files of the bundle that are unavailable here, or the failure of the
            requested GPU.
    """

    pipeline: Pipeline
    refusals: tuple[Refusal | EngineError, ...] = ()


def _on_cpu(request: EngineRequest) -> EngineRequest:
    """The request for the CPU, without engine, precision and limit, which were for the GPU."""
    return replace(request, engine="auto", precision="auto", device="cpu", max_memory_bytes=None)


def _noted(plan: Plan, bundle: Bundle, engine: EngineInfo) -> Plan:
    """The plan with a warning for every result if the engine drifted over the parity budget.

    Raises:
        ConfigError: It did, and the plan is strict.
    """
    verdict = over_budget(bundle, engine.name, engine.precision)
    if verdict is None:
        return plan
    if plan.rules.strict:
        raise ConfigError(
            f"{verdict}", "leave {} or {} out", Setting("precision"), Setting("strict")
        )
    return replace(plan, notes=(f"{verdict}",))


def _pipeline(engine: Engine, plan: Plan, open_second: Callable[[], Pipeline]) -> Pipeline:
    """Pipeline for an engine: on its device if every step has kernels, otherwise on the host."""
    if not hasattr(engine, "enqueue"):  # it runs on host arrays
        if plan.engine.max_memory_bytes is not None and plan.fallback is None:
            raise ConfigError(
                f"a limit of device memory is for a GPU, and {engine.info.name} runs on the CPU",
                "leave {} out, or give {} to see why no GPU is used",
                Setting("max_memory_bytes"),
                Setting("device", "cuda"),
            )
        return HostPipeline(engine, plan)
    from attnseg.runtime.pipelines.cuda import CudaPipeline, missing_kernel

    on_device: Any = engine
    if on_device.classes is not None:
        check_channels(on_device.classes, plan.task.output_channels)
    missing = missing_kernel(plan)
    pipeline: Pipeline
    if missing is None:
        pipeline = CudaPipeline(on_device, plan)
    elif plan.engine.max_memory_bytes is not None:
        raise ConfigError(
            "a limit of device memory is for volumes that are processed on the GPU, and no kernel "
            f"supports {missing}",
            "leave {} out",
            Setting("max_memory_bytes"),
        )
    else:
        log.info("only the network runs on the GPU, as no kernel supports %s", missing)
        pipeline = HostPipeline(engine, plan)
    if plan.fallback is None:
        return pipeline
    from attnseg.runtime.pipelines.fallback import FallbackPipeline

    return FallbackPipeline(pipeline, open_second)


def open_pipeline(bundle: Bundle, plan: Plan, engine: Engine | None = None) -> Opened:
    """Open a model.

    Args:
        bundle: The model.
        plan: Everything between a volume and its labels.
        engine: Engine that runs the network; None for the one that the plan requests.

    Raises:
        ConfigError: The plan limits the memory of a GPU, and the model runs on the CPU; or it is
            strict, and the requested precision is over the parity budget.
        BundleError: The network's classes are not those of the manifest.
        EngineError: No engine is installed, or the requested one cannot run the model.
    """

    def on_cpu() -> Pipeline:
        selected = select_engine(bundle, _on_cpu(plan.engine))
        return HostPipeline(selected.engine, _noted(plan, bundle, selected.engine.info))

    if engine is not None:
        return Opened(_pipeline(engine, plan, on_cpu))
    try:
        selected = select_engine(bundle, plan.engine)
    except EngineError as error:
        on_gpu = any(c.engine in GPU_ENGINES for c in candidates(bundle, plan.engine))
        if plan.fallback is None or not on_gpu:
            raise
        refused = error.detached()
    else:
        prebuilt = tuple(r for r in selected.refusals if r.prebuilt)
        refusals = () if selected.candidate.prebuilt else prebuilt
        noted = _noted(plan, bundle, selected.engine.info)
        return Opened(_pipeline(selected.engine, noted, on_cpu), refusals)
    return Opened(on_cpu(), (refused,))
