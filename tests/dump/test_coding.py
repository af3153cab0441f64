"""Dumps as JSON and back, files in a folder, and differences."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mstc.dump import files
from mstc.dump.coding import from_json, to_json
from mstc.dump.diff import difference
from mstc.dump.model import Dump
from mstc.errors import DumpError
from testkit.dumps import WHOLE, explain_tiny


def test_round_trip(tiny_dump: Dump) -> None:
    text = to_json(tiny_dump)
    back = from_json(text)
    assert to_json(back) == text
    assert [s.nodes for s in back.graphs[0].stages] == [s.nodes for s in tiny_dump.graphs[0].stages]
    assert back.graphs[0].blocks == tiny_dump.graphs[0].blocks


def test_a_node_is_written_once(tiny_dump: Dump) -> None:
    (graph,) = json.loads(to_json(tiny_dump))["graphs"]
    assert len(graph["nodes"]) < 2 * len(tiny_dump.graphs[0].first)
    changed = [s["name"] for s in graph["stages"] if s["order"] is not None]
    assert changed == ["", "token_losses", "lm_head", "mini_sequence"]


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"format": 99}'])
def test_what_is_no_dump_is_refused(text: str) -> None:
    with pytest.raises(DumpError, match="not a dump"):
        from_json(text)


def test_files(tiny_dump: Dump, tmp_path: Path) -> None:
    files.Drawn(tiny_dump).save(tmp_path / "new")
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"report.html", "graphs.txt", "dump.json"}
    assert files.read(tmp_path / "new").graphs[0].blocks == tiny_dump.graphs[0].blocks
    assert files.read(tmp_path / "new" / "dump.json").title == tiny_dump.title
    with pytest.raises(DumpError, match="no dump at"):
        files.read(tmp_path)


def test_difference(tiny_dump: Dump) -> None:
    assert difference(tiny_dump, tiny_dump, ("a", "b")).same
    other = explain_tiny(WHOLE)
    found = difference(tiny_dump, other, ("chunked", "whole"))
    assert not found.same and "options.mini_sequence" in found.settings
    (graph,) = found.graphs
    assert graph.figures["fidelity"] == ("equal up to rounding", "equal up to rounding")
    assert graph.figures["blocks chunked"][1] == "0" and not graph.only_a and graph.only_b
    assert "-loss_loop" in graph.text


def test_a_graph_more_is_a_difference(tiny_dump: Dump) -> None:
    empty = Dump(tiny_dump.title, tiny_dump.command, tiny_dump.options, tiny_dump.versions)
    found = difference(empty, tiny_dump, ("a", "b"))
    assert not found.same and found.graphs[0].figures["nodes captured"][0] == "0"
