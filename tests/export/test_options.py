"""Export settings as a user specifies them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attnseg.export import options as options_module
from attnseg.export.engines import tensorrt as builder
from attnseg.export.engines.tensorrt import BuildOptions
from attnseg.export.gate.budget import make_budget
from attnseg.export.options import ExportChoices
from attnseg.runtime.cuda.gpu import Gpu
from attnseg.runtime.errors import ConfigError, EngineError
from attnseg.runtime.model.manifest import Budget


def no_gpu() -> Gpu:
    raise EngineError("no NVIDIA driver on this machine")


def engines(**choices: Any) -> list[BuildOptions]:
    return list(ExportChoices(**choices).resolve().engines)


def test_nothing_chosen_is_an_fp32_graph_alone() -> None:
    options = ExportChoices().resolve()
    assert (options.fp16, options.engines, options.budget) == (False, (), Budget())


def test_fp16_brings_an_engine_for_the_rtx_3090() -> None:
    (engine,) = engines(fp16=True, workspace_bytes=5_000_000, batch=4)
    assert (engine.builder, engine.target, engine.batch) == ("tensorrt-rtx", "sm86", 4)
    assert engine.workspace_bytes == 5_000_000
    assert engines(fp16=True, builder="none") == []


def test_each_target_is_built_for_once() -> None:
    found = engines(target=("rtx3090", "sm86", "sm89"))
    assert [engine.target for engine in found] == ["sm86", "sm89"]
    (portable,) = engines(compatibility="ampere+")
    assert (portable.target, portable.compatibility) == ("sm80", "ampere+")


def test_words_that_are_empty_leave_those_of_the_model() -> None:
    options = ExportChoices(intended_use="research", description="").resolve()
    assert options.words == {"intended_use": "research"}


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"builder": "none", "target": ("sm86",)},
            "nothing is built; leave target or builder='none' out",
        ),
        (
            {"timing_cache": Path("t.cache")},
            "none is built; leave timing_cache out, or add fp16=True",
        ),
        ({"int8": True}, "give int8=True and calibration='FOLDER' together"),
        ({"calibration": Path("scans")}, "give int8=True and calibration='FOLDER' together"),
        ({"target": ("gtx1080",)}, "target gtx1080 is not known to tensorrt-rtx; choose"),
    ],
    ids=str,
)
def test_choices_that_contradict_each_other_are_refused(
    choices: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ExportChoices(**choices).resolve()


def test_tensorrt_builds_for_the_gpu_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = ExportChoices(fp16=True, builder="tensorrt")
    monkeypatch.setattr(builder, "_load_builder", lambda _: None)
    for module in (options_module, builder):
        monkeypatch.setattr(module, "find_gpu", no_gpu)
    with pytest.raises(ConfigError, match="needs the GPU that it builds for: no NVIDIA driver"):
        choices.resolve()
    with pytest.raises(ConfigError, match=r"no NVIDIA driver.* or with builder='tensorrt-rtx'"):
        replace(choices, target=("sm86",)).resolve()
    for module in (options_module, builder):
        monkeypatch.setattr(module, "find_gpu", lambda: Gpu("H200", "sm90", 1, "13.0"))
    (engine,) = replace(choices, timing_cache=Path("t.cache")).resolve().engines
    assert (engine.target, engine.timing_cache) == ("sm90", "t.cache")
    with pytest.raises(ConfigError, match=r"runs on, sm90 \(H200\), not for sm86"):
        replace(choices, target=("sm86",)).resolve()


@pytest.mark.parametrize(
    "values", [(0, None), (-1, None), (2, None), (None, 0), (None, 101)], ids=str
)
def test_budgets_that_nothing_could_keep_are_refused(values: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match=r"budget\.(dice|volume_percent) must be above 0"):
        make_budget(*values)


def test_a_budget_of_a_bundle_holds_unless_another_is_given() -> None:
    own = Budget(dice=0.01, volume_percent=2)
    assert make_budget(None, None, own) == own
    assert make_budget(0.5, None, own) == Budget(0.5, 2)
    assert make_budget(None, None) == Budget()
    with pytest.raises(ConfigError, match=r"budget\.dice"):
        make_budget(0, None, own)
