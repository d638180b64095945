from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attnseg import Bundle, Segmenter, SegmentOptions, Volume
from attnseg.doctor import examine
from attnseg.inspect import inspect_bundle
from attnseg.runtime.engines import cpu
from attnseg.runtime.engines.base import EngineInfo
from attnseg.runtime.errors import BundleError, ConfigError
from attnseg.runtime.model.bundle import file_entry
from attnseg.runtime.model.verdict import over_budget, read_verdicts
from attnseg.synthetic import SyntheticCase
from tests.bundles import write_bundle

BUDGET = {"dice": 0.002, "volume_percent": 0.5}
OVER = (
    "bf16 on openvino is over the parity budget: ET of a drifts by 0.0098 Dice and 0.10 % volume "
    "(budget 0.002 and 0.5 %)"
)


def measured(precision: str, dice: float) -> dict[str, Any]:
    drifts = [
        {"case": "a", "region": "WT", "dice": 0.001, "hd95_mm": 0, "volume_percent": 0.4},
        {"case": "a", "region": "ET", "dice": dice, "hd95_mm": 0, "volume_percent": 0.1},
    ]
    return {
        "precision": precision,
        "engine": "openvino 2026.4.1",
        "gated": precision == "fp32",
        "drifts": drifts,
        "within_budget": dice <= BUDGET["dice"],
    }


def bundle_with(folder: Path, parity: bytes) -> Bundle:
    """The shipped bundle with another parity report."""
    shipped = Bundle.default()
    contents = {n: (shipped.folder / n).read_bytes() for n in shipped.manifest.files}
    contents["parity.json"] = parity
    files = {**shipped.manifest.files, "parity.json": file_entry("parity", parity)}
    return write_bundle(folder / "model", replace(shipped.manifest, files=files), contents)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle whose model drifts over the budget in bf16."""
    entries = [measured("fp32", 0.0), measured("bf16", 0.0098)]
    return bundle_with(tmp_path, json.dumps({"budget": BUDGET, "measured": entries}).encode())


class AsOpenVino:
    """OpenVINO on a processor with bf16 instructions, whatever this one has."""

    def __init__(self, model: Path, precision: str, threads: int) -> None:
        chosen = "bf16" if precision == "auto" else precision
        self.info = EngineInfo("openvino", "2026.4.1", chosen, "cpu")

    def infer(self, batch: np.ndarray) -> np.ndarray:
        return np.zeros((len(batch), 4, *batch.shape[2:]), np.float32)


@pytest.fixture(autouse=True)
def with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cpu._OPEN, "openvino", AsOpenVino)


def options(**given: Any) -> SegmentOptions:
    return SegmentOptions(engine="openvino", device="cpu", **given)


def test_each_engine_and_precision_has_a_verdict(bundle: Bundle) -> None:
    assert [str(v) for v in read_verdicts(bundle)] == [
        "fp32 on openvino is within the parity budget: WT of a drifts by 0.0010 Dice and 0.40 % "
        "volume (budget 0.002 and 0.5 %)",
        OVER,
    ]
    assert over_budget(bundle, "openvino", "fp32") is None
    assert over_budget(bundle, "onnxruntime") is None


def test_auto_takes_no_precision_over_the_budget(bundle: Bundle) -> None:
    assert Segmenter(bundle, options()).engine.precision == "fp32"
    assert Segmenter(Bundle.default(), options()).engine.precision == "bf16"


def test_a_precision_over_the_budget_that_was_asked_for_is_warned_of(
    bundle: Bundle, small_synthetic: SyntheticCase
) -> None:
    volume = Volume(small_synthetic.images, small_synthetic.affine)
    segmenter = Segmenter(bundle, options(precision="bf16"))
    assert segmenter.engine.precision == "bf16"
    assert segmenter.segment(volume).warnings == (OVER,)
    assert Segmenter(bundle, options()).segment(volume).warnings == ()
    with pytest.raises(ConfigError, match=r"over the parity budget.*; leave precision or strict"):
        Segmenter(bundle, options(precision="bf16", strict=True))


def test_doctor_and_inspect_show_the_verdict(bundle: Bundle) -> None:
    found = {finding.subject: finding for finding in examine(bundle.folder)}
    assert "runs the model in fp32, as bf16 on openvino is over" in str(
        found["engine openvino"].state
    )
    assert OVER in inspect_bundle(bundle).verdicts


@pytest.mark.parametrize("parity", [b"{}", b"no JSON", b'{"measured": [1], "budget": {}}', b"[]"])
def test_an_unreadable_report_is_refused(tmp_path: Path, parity: bytes) -> None:
    bundle = bundle_with(tmp_path, parity)
    with pytest.raises(BundleError, match=r"parity\.json: is not a parity report"):
        read_verdicts(bundle)
    with pytest.raises(BundleError, match=r"parity\.json: is not a parity report"):
        Segmenter(bundle, options())


@pytest.mark.parametrize("change", [{"dice": None}, {"volume_percent": "much"}])
@pytest.mark.parametrize("budget", [BUDGET, {"dice": 0, "volume_percent": 0}, None])
def test_a_verdict_counts_without_its_numbers(
    tmp_path: Path, change: dict[str, Any], budget: Any
) -> None:
    entry = measured("bf16", 0.0098)
    entry["drifts"][0] |= change
    report = json.dumps({"budget": budget, "measured": [entry]}).encode()
    (verdict,) = read_verdicts(bundle_with(tmp_path, report))
    assert not verdict.within_budget
    assert str(verdict) == "bf16 on openvino is over the parity budget"
