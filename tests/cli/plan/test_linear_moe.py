"""The shipped Linear-MoE models: their sizes, one graph with all products in loops, what a small one really holds."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mstc.cli.main import main
from mstc.cli.plan.draft import capture
from mstc.cli.plan.linear_moe import LinearMoE, Sizes, step
from mstc.cli.plan.models import SHIPPED
from mstc.plan.devices import device
from testkit.allocator import measured_peak, predicted_mib
from testkit.exactness import chunked, compare

_TINY = Sizes(hidden=32, inner=48, layers=2, heads=2, experts=8, top=2, vocabulary=96)


def _sizes(name: str) -> Sizes:
    return Sizes(**{k: v for k, v in SHIPPED[name].items() if k not in ("model_type", "source")})


@pytest.mark.parametrize(("name", "total", "active"), [("linear-moe-a0.3b-2b", 2, 0.3), ("linear-moe-a1b-7b", 7, 1.0)])
def test_the_sizes_are_those_of_their_names(name: str, total: float, active: float) -> None:
    """In billions; the paper names them without embedding and head, rounded down."""
    sizes = _sizes(name)
    with torch.device("meta"):
        model = LinearMoE(sizes)
    layers = sum(p.numel() for p in model.layers.parameters()) / 1e9
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n and "router" not in n) / 1e9
    assert total <= layers < total + 1 or total - 1 < layers < total + 0.5
    assert layers - experts * (1 - sizes.top / sizes.experts) == pytest.approx(active, rel=0.1)


def _model() -> Any:
    torch.manual_seed(0)
    model = LinearMoE(_TINY)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.train()


def _ids(length: int) -> Tensor:
    return torch.randint(0, 96, (1, length), generator=torch.Generator().manual_seed(0))


def test_it_is_captured_whole_and_its_gradients_are_eagers() -> None:
    model = _model().double()
    result = compare(model, dict(model.named_parameters()), (_ids(64),), chunked())
    result.check()
    assert len(result.graphs) == 1 and result.loops >= 6


def test_linear_attention_costs_what_its_formula_says() -> None:
    function, inputs = step(_TINY, 256)
    scans = [c for c in capture(function, inputs, device("a100-80g")).step.calls if c.kind == "scan"]
    with FlopCounterMode(display=False) as counter:
        _model()(_ids(256)).backward()
    counts = counter.get_flop_counts()["Global"]
    assert len(scans) == 2 and not any(c.cheap for c in scans)
    assert sum(c.cost.flops[0] for c in scans) == counts[torch.ops.mstc.scalar_decay]
    assert sum(c.cost.flops[1] for c in scans) == counts[torch.ops.mstc.scalar_decay_backward]


def test_the_peak_of_a_small_one_stays_below_the_predicted_one() -> None:
    """By up to a tenth; the plan tells whole MiB here."""
    model, ids = _model(), _ids(2048)
    torch._dynamo.reset()
    fn = torch.compile(model, backend="mstc", options={"lower": "aot_eager", "memory_budget": "64MiB"}, dynamic=False)
    fn(ids).backward()
    peak = measured_peak(lambda: fn(ids).backward(), model) / 2**20
    predicted = predicted_mib()
    assert peak - 0.5 < predicted < 1.1 * peak


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear-moe-a0.3b-2b", "linear-moe-a1b-7b"])
def test_they_are_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--model", name, "--device", "a100-80g", "--json"])
    assert not ended.value.code
    found = json.loads(capsys.readouterr().out)
    longest = {row["system"]: row["longest"] for row in found["systems"]}
    assert longest["mstc, offloading"] > longest["mstc"] > 16384
    assert found["host_bytes"] > 0
