"""``mstc dump``: what it prints and writes, and one clear line on everything that can go wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mstc.cli.main import main
from mstc.dump import files
from mstc.dump.model import FORMAT

SOURCE = """
import torch
from testkit.tiny import Tiny, inputs, mean_loss, step

def build(seq=23):
    return step(Tiny(), mean_loss), *inputs(length=seq)

def needs(seq):
    return build(seq)

def two(a, b):
    return build()

def raises():
    raise RuntimeError("broken\\nsecond line")

def fails_inside():
    def fn(x):
        raise KeyError("inner")
    return fn, torch.ones(2)

def narrow():
    return torch.nn.Linear(3, 4), torch.ones(2, 5)

def wrong():
    return 3

def empty():
    return (lambda: 3),

def made():
    return (lambda x: x.exp().sum()), torch.empty(8, 8)

NUMBER = 3
"""
OPTIONS = '{"mini_sequence": {"chunk_tokens": 12}, "lm_head": {"chunk_tokens": 12}}'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["dump", *map(str, args)], prog_name="mstc")


def test_summary_and_files(file: Path, tmp_path: Path) -> None:
    result = run(f"{file}:build", "--seq", 40, "--options", OPTIONS, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for part in (
        "MLP",
        "chunked",
        "head with loss" if "head with loss" in result.stdout else "loss",
        "predicted peak",
        "page: ",
    ):
        assert part in result.stdout
    assert (tmp_path / "out" / "report.html").is_file()
    data = json.loads((tmp_path / "out" / "dump.json").read_text(encoding="utf-8"))
    assert data["command"].startswith("mstc dump ") and "--seq 40" in data["command"]
    assert "chunk_tokens" in data["command"]


def test_json(file: Path) -> None:
    data = json.loads(run(f"{file}:build", "--json").stdout)
    assert data["format"] == FORMAT and data["graphs"][0]["blocks"]
    assert json.loads(run(f"{file}:empty", "--json").stdout)["graphs"] == []


def test_device(file: Path) -> None:
    result = run(f"{file}:made", "--device", "meta")
    assert result.exit_code == 0, result.output


def test_no_graph_is_said(file: Path) -> None:
    result = run(f"{file}:empty")
    assert result.exit_code == 0 and "No graph was captured" in result.stdout


def test_diff(file: Path, tmp_path: Path) -> None:
    a, b, out = tmp_path / "a", tmp_path / "b", tmp_path / "compared"
    run(f"{file}:build", "--out", a)
    run(f"{file}:build", "--options", OPTIONS, "--out", b)
    result = run("--diff", a, b, "--out", out)
    assert result.exit_code == 0 and "options.mini_sequence" in result.stdout and "lines differ" in result.stdout
    assert '"difference":{' in (out / "report.html").read_text(encoding="utf-8")
    data = json.loads(run("--diff", a, b, "--json").stdout)
    assert data["graphs"][0]["figures"]["blocks loss"] == ["0", "1"]
    assert "say the same" in run("--diff", a, a).stdout


@pytest.mark.parametrize(
    ("target", "args", "says"),
    [
        ("{file}:absent", [], "has no function 'absent'"),
        ("{file}:NUMBER", [], "has no function 'NUMBER'"),
        ("{file}", [], "must be FILE.py:FUNCTION"),
        ("{file}x:build", [], "no file"),
        ("{file}:needs", [], "give --seq"),
        ("{file}:two", [], "needs a, b"),
        ("{file}:raises", [], "raised RuntimeError: broken"),
        ("{file}:raises", ["--seq", "3"], "takes no argument 'seq'"),
        ("{file}:fails_inside", [], "the function raised KeyError: 'inner'"),
        ("{file}:wrong", [], "it returned int"),
        ("{file}:narrow", [], "the function raised RuntimeError: a and b must have same reduction dim"),
        ("{file}:build", ["--options", '{"memory_budget": 1}'], "smallest plan needs"),
        ("{file}:build", ["--options", "{"], "not JSON"),
        ("{file}:build", ["--options", '{"mask": true}'], "did you mean 'masks'"),
        ("{file}:build", ["--seq", "0"], "--seq"),
        ("{file}:build", ["--diff", "a", "b"], "--diff compares two dumps"),
        (None, ["--diff", "nowhere", "nowhere"], "no dump at nowhere"),
        (None, [], "Missing argument"),
    ],
)
def test_bad_input_is_one_line_and_status_2(file: Path, target: str | None, args: list[str], says: str) -> None:
    result = run(*([target.format(file=file)] if target else []), *args)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stderr.startswith("mstc") and result.stderr.count("\n") == 1 and result.stdout == ""


def test_a_file_that_does_not_load(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("def f(:", encoding="utf-8")
    result = run(f"{path}:f")
    assert result.exit_code == 2 and "raised SyntaxError" in result.stderr and result.stderr.count("\n") == 1


MEASURED = """
import torch

def build():
    x, weight = torch.randn(4096, 16), torch.randn(8192, 16, requires_grad=True)
    labels = torch.randint(8192, (4096,))
    return (lambda x: torch.nn.functional.cross_entropy(x @ weight.t(), labels)), x

"""


def test_measured_beside_predicted(tmp_path: Path) -> None:
    path = tmp_path / "head.py"
    path.write_text(MEASURED, encoding="utf-8")
    options = '{"lower": "aot_eager", "lm_head": {"chunk_tokens": 256}}'
    result = run(f"{path}:build", "--options", options, "--measure", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "measured peak of one step above rest" in result.stdout
    found = files.read(tmp_path / "out")
    eager, rewritten = found.measured
    assert (eager.system, rewritten.system) == ("eager", "mstc")
    logits = 4 * 4096 * 8192
    assert eager.peak > 1.9 * logits and rewritten.peak < 0.4 * logits
    assert max(used for _, used in eager.samples) <= eager.peak * 1.05
    (graph,) = found.graphs
    rest = graph.after.parameters[0]
    assert eager.peak == pytest.approx(graph.before.peak - rest, rel=0.25)


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    path = tmp_path / "head.py"
    path.write_text(MEASURED, encoding="utf-8")
    refused = run(f"{path}:build", "--measure", "--device", "meta")
    assert refused.exit_code == 2 and "meta device holds no numbers" in refused.stderr
