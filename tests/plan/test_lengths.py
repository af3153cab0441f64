"""A step at another length, evaluated, against the same step captured there; and the expressions behind it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mstc.cli.plan.building import build, loss_of
from mstc.cli.plan.draft import Planned, capture, plan_for
from mstc.cli.plan.layers import Layers, shortened
from mstc.cli.plan.models import Target
from mstc.cli.plan.optimizers import OPTIMIZERS
from mstc.cli.plan.setting import Setting
from mstc.errors import PlanError
from mstc.plan.calls import Step
from mstc.plan.devices import device
from mstc.plan.expressions import B, C, R, S, costs_of, kinds_of
from mstc.plan.lengths import Growing, readings
from mstc.plan.memory import simulate
from testkit.hf_models import config_of

A100 = device("a100-80g")
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
_MORE = {"num_key_value_heads": 2, "max_position_embeddings": 1 << 20}


@cache
def _planned(tokens: int, batch: int = 1) -> Planned:
    config = config_of("llama", **_SIZES, **_MORE)
    setting = Setting(A100, batch, torch.bfloat16, OPTIMIZERS["adamw-bf16"])
    return plan_for(Target("tiny", config), setting, tokens)


def _captured(tokens: int) -> Step:
    model = build(config_of("llama", **_SIZES, **_MORE), torch.bfloat16)
    shortened(model, model.config.get_text_config())
    return capture(loss_of(model), [torch.zeros(1, tokens, dtype=torch.long, device="meta")], A100).step


class Biased(nn.Module):
    """Attention with a learned bias for each distance, written out, over a table of positions of fixed length: values
    that grow with the square of the length, and values that do not grow."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.bias = nn.Parameter(torch.zeros(64))
        self.table = nn.Parameter(torch.zeros(128, 32))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        at = torch.arange(x.shape[1], device=x.device)
        distance = (at[:, None] - at[None, :]).clamp(0, 63)
        mixed = F.softmax(q @ k.mT + self.bias[distance], -1) @ v
        looked_up = x @ F.normalize(self.table, dim=-1).mT @ self.table
        return (x + self.out(mixed) + looked_up).square().mean()


@cache
def _steps_of(build: Callable[[], nn.Module], *lengths: int) -> tuple[Step, ...]:
    with torch.device("meta"):
        module = build()
        inputs = [torch.zeros(1, n, 32) for n in lengths]
    return tuple(capture(module, [x], A100).step for x in inputs)


def test_another_length_is_evaluated_as_if_captured_there() -> None:
    evaluated, captured = _planned(2048).growing.at(6144), _captured(6144)
    assert evaluated.sizes == captured.sizes
    assert simulate(evaluated).peak.total == pytest.approx(simulate(captured).peak.total, rel=0.01)
    for a, b in zip(evaluated.calls, captured.calls, strict=True):
        assert a.cost.flops == pytest.approx(b.cost.flops, rel=1e-6)


def test_what_grows_with_the_square_and_what_does_not_grow() -> None:
    *read, captured = _steps_of(Biased, *readings(4096), 12288)
    evaluated = Growing(readings(4096), read).at(12288)
    assert evaluated.sizes == captured.sizes
    assert any(size == 128 * 32 * 4 for size in captured.sizes.values())
    for a, b in zip(evaluated.calls, captured.calls, strict=True):
        assert a.cost.flops == pytest.approx(b.cost.flops, rel=1e-6)
        assert a.cost.moved == pytest.approx(b.cost.moved, rel=0.15)
        if b.kind == "queries":  # a chunk of queries: its length halves, and its keys grow, in steps
            assert b.cost.work[0] / 4.1 <= a.cost.work[0] <= 4.1 * b.cost.work[0]
        else:
            assert a.cost.work == b.cost.work


class Branching(nn.Module):
    """Another step beyond 700 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu().cumsum(1)
        return (x if x.shape[1] < 700 else self.other(x.sin())).square().sum()


def test_a_step_that_depends_on_the_length_is_refused() -> None:
    with pytest.raises(PlanError, match="another one at other lengths .* read at 512, 768, 1024 tokens"):
        Growing(readings(512), _steps_of(Branching, *readings(512)))


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_expressions_give_the_figures_back(batch: int) -> None:
    growing = _planned(2048, batch).growing
    for i, step in enumerate(growing.steps):
        for at, call in enumerate(step.calls):
            costs = costs_of(growing, at, batch)
            here = {B: batch, S: growing.tokens[i], C: call.cost.rows or 2048, R: 1}
            assert [float(e.subs(here)) for e in costs.flops] == pytest.approx(call.cost.flops, abs=1)
            assert [float(e.subs(here)) for e in costs.moved] == pytest.approx(call.cost.moved, rel=1e-3, abs=16)
            assert [float(e.subs(here)) for e in costs.sent] == [0, 0]


def test_attention_grows_with_the_square_of_the_length_and_loops_linearly() -> None:
    growing = _planned(2048).growing
    for at, call in enumerate(growing.steps[0].calls):
        flops = costs_of(growing, at, 1).flops[0].subs({B: 1, R: 1})
        if call.cost.flops[0]:
            assert flops.subs(S, 4096) / flops.subs(S, 2048) == (4 if call.kind == "mixer" else 2)


def test_what_ranks_send() -> None:
    """On two ranks: once the gradients of the weights; half of k and v forward, and as much and its gradient back."""
    planned = _planned(2048)
    costs, step = kinds_of(planned.growing, 1), planned.growing.steps[0]
    here = {B: 1, S: 2048, R: 2}
    loop = next(c for c in step.calls if c.kind == "loop")
    weights = sum(step.sizes[m] for m in loop.grads if m in step.parameters)
    assert [e.subs(here) for e in costs[loop.label].sent] == [0, weights]
    keys_and_values = 2 * 2048 * 32 * 2
    assert [e.subs(here) for e in costs["attention"].sent] == [keys_and_values // 2, keys_and_values]


def test_scans_send_their_state() -> None:
    from mstc.kernels import linear_attention

    class Scan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p.unflatten(-1, (2, 16)) for p in self.qkv(x).chunk(3, -1))
            return linear_attention(q, k, v).square().mean()

    costs = kinds_of(Growing(readings(512), _steps_of(Scan, *readings(512))), 1)
    state = 2 * 16 * 16 * 4
    assert [e.subs({B: 1, S: 999, R: 3}) for e in costs["scalar decay"].sent] == [2 * state, 2 * state]


def test_layers_that_were_not_captured_are_filled_in() -> None:
    planned = _planned(2048)
    deep = Planned(**{**vars(planned), "layers": Layers(80, 4, 1)})
    assert len(deep.stages(2048)) == len(planned.stages(2048)) + 76
    assert deep.least(4096).peak > planned.least(4096).peak


@pytest.mark.slow
def test_layers_filled_in_are_those_of_the_whole_model() -> None:
    """Every third layer of this one attends to a window only."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 4
    sizes = {**_SIZES, "num_hidden_layers": 12, "num_key_value_heads": 2, "head_dim": 8}
    config = config_of("gemma3_text", **sizes, layer_types=kinds, sliding_window=256, max_position_embeddings=1 << 20)
    setting = Setting(A100, 1, torch.bfloat16, OPTIMIZERS["adamw-bf16"])
    planned = plan_for(Target("tiny", config), setting, 2048)
    assert planned.layers == Layers(12, 6, 3)

    ids = torch.zeros(1, 2048, dtype=torch.long, device="meta")
    whole = capture(loss_of(build(config, torch.bfloat16)), [ids], A100)
    stages = whole.stages()
    filled = planned.stages(2048)
    assert [s.options for s in filled] == [s.options for s in stages]
    assert [s.gradients for s in filled] == [s.gradients for s in stages]


def test_a_longer_sequence_never_needs_less() -> None:
    planned = _planned(2048)
    peaks = [planned.least(n).peak for n in (1024, 2048, 4096, 8192)]
    assert peaks == sorted(peaks)
    limit = planned.least(4096).peak + planned.gradients
    longest = planned.longest(limit, grain=512)
    assert planned.fastest(longest, limit) is not None
    assert planned.fastest(longest + 512, limit) is None
