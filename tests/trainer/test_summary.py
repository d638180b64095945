from __future__ import annotations

from attnseg.trainer.summary import network_costs, summary_rows


def test_only_networks_of_the_papers_size_stand_beside_the_papers_costs() -> None:
    rows = {row[0]: row[1:] for row in summary_rows(network_costs())}
    assert rows["ablation: baseline"][1::2] == ("3.4", "12.8")
    assert rows["ablation: both"][1::2] == ("3.6", "13.1")
    wide = {row[0]: row[1:] for row in summary_rows(network_costs("wide16"))}
    assert wide["ablation: both"][0] == "5.875"
    assert {cell for row in wide.values() for cell in row[1::2]} == {"-"}
