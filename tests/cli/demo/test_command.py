"""`mstc demo` from end to end on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mstc.cli.main import main

SMALL = ["--model", "llama-tiny", "--seq", "64", "--steps", "3"]
EAGERLY = ["--options", '{"lower": "eager", "mini_sequence": {"chunk_tokens": 16}}']


def test_demo_ends_with_tables_and_a_plot(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = CliRunner().invoke(main, ["demo", *SMALL, *EAGERLY, "--systems", "eager,mstc", "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    for part in ("eager: step 3", "mstc: step 3", "peak MB above rest", "tokens/s", "compile s", "mstc over"):
        assert part in result.stdout
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    losses = json.loads((out / "demo.json").read_text(encoding="utf-8"))["losses"]
    assert len(losses["eager"]) == 3
    assert losses["mstc"] == pytest.approx(losses["eager"], rel=1e-4)


def test_demo_as_json(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["demo", *SMALL, "--systems", "eager", "--json", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["rows"][0]["system"] == "eager" and data["versions"]["torch"]


def test_where_nothing_can_be_written_nothing_is_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "file" / "demo")])
    assert result.exit_code == 2 and "cannot be made" in result.stderr and result.stderr.count("\n") == 1
