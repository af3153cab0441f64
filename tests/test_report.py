"""Reports: written as text and JSON, and kept for the process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import mstc
from mstc.options import Options
from mstc.report import Edit, Fidelity, Refusal, RegionInfo, Report, clear_reports, record, reports


@pytest.fixture(autouse=True)
def _no_reports() -> Iterator[None]:
    kept = reports()
    clear_reports()
    yield
    clear_reports()
    for report in kept:
        record(report)


def example() -> Report:
    return Report(
        graph="graph 0 (forward and backward)",
        options=Options().to_dict(),
        versions={"torch": "2.13.0"},
        regions=[
            RegionInfo("region", "gated MLP", 0, "model.layers.0.mlp", "model.py:12", "s0", 8, 14, "mlp", ("gate",)),
            RegionInfo("mixer", "attention (causal)", None, "", "model.py:30", note="left whole"),
        ],
        refusals=[Refusal("masks", "where_1", "model.py:7", "not a comparison of positions", "use is_causal")],
        edits=[Edit("mini_sequence", "one loop for 14 nodes", ("loop",), ("linear", "silu"))],
        plan=["chunks of 1024 tokens"],
        timings={"axes": 0.25},
        fidelity=Fidelity.ROUNDING,
    )


def test_text_tells_everything_and_is_stable() -> None:
    text = example().to_text()
    assert text == example().to_text()
    for part in (
        "graph 0 (forward and backward)",
        "fidelity: equal up to rounding",
        "gated MLP",
        "model.py:12",
        "saves gate",
        "attention (causal)",
        "masks: where_1 at model.py:7: not a comparison of positions (use is_causal)",
        "mini_sequence: one loop for 14 nodes (+1 -2 nodes)",
        "chunks of 1024 tokens",
        "axes: 0.250",
        "torch: 2.13.0",
    ):
        assert part in text


@pytest.mark.parametrize(("name", "title"), [("graph 0/0", "graph 0/0"), ("loss_fn", "graph loss_fn"), ("", "graph")])
def test_the_title_says_graph_once(name: str, title: str) -> None:
    assert Report(graph=name).to_text().splitlines()[0] == title


def test_a_refusal_of_no_node() -> None:
    report = Report(refusals=[Refusal("offload", "", "", "nothing to do", "give a budget")])
    assert "  offload: nothing to do (give a budget)" in report.to_text()


def test_json_round_trip() -> None:
    assert Report.from_json(example().to_json()) == example()
    assert Report.from_json(Report().to_json()) == Report()
    assert json.loads(example().to_json())["fidelity"] == "rounding"


def test_save(tmp_path: Path) -> None:
    folder = example().save(tmp_path / "new" / "folder")
    assert (folder / "report.txt").read_text(encoding="utf-8") == example().to_text()
    assert Report.from_json((folder / "report.json").read_text(encoding="utf-8")) == example()


def test_store_keeps_the_newest_in_order() -> None:
    for i in range(300):
        record(Report(graph=str(i)))
    assert [r.graph for r in mstc.reports()] == [str(i) for i in range(300 - 256, 300)]
    mstc.clear_reports()
    assert mstc.reports() == []


def test_the_returned_list_is_the_callers_own() -> None:
    record(Report())
    reports().clear()
    assert len(reports()) == 1


def test_store_takes_reports_from_many_threads() -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: record(Report(graph=str(i))), range(200)))
    assert sorted(int(r.graph) for r in reports()) == list(range(200))
