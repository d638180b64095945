from __future__ import annotations

from typing import Any

import pytest

from attnseg.evaluation.paper import is_papers_task, table_row


@pytest.mark.parametrize(
    ("network", "row"),
    [
        ({"architecture": "attnresunet", "attention": "gap", "multi_scale": True}, "attnresunet"),
        ({"architecture": "attnresunet", "attention": "none", "multi_scale": False}, "resunet"),
        ({"architecture": "unet3d", "attention": "none", "multi_scale": False}, "unet3d"),
        ({"architecture": "deepmedic"}, "deepmedic"),
        ({"architecture": "attnresunet", "attention": "se", "multi_scale": True}, None),
        ({"architecture": "attnresunet", "attention": "gap", "multi_scale": False}, None),
        ({"architecture": "vnet"}, None),
        ({"onnx": "other.onnx"}, None),
    ],
)
def test_the_paper_has_a_row_for_its_own_networks_alone(
    network: dict[str, Any], row: str | None
) -> None:
    assert table_row(network) == row


def test_the_papers_task_has_the_regions_of_its_table() -> None:
    assert is_papers_task(("TC", "WT", "ET"))
    assert not is_papers_task(("WT", "TC"))
    assert not is_papers_task(("spleen",))
