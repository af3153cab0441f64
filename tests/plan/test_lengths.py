"""A step at another length, evaluated, against the same step captured there; and the expressions behind it."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from mstc.cli.plan.draft import Planned, plan_for
from mstc.cli.plan.models import Target
from mstc.cli.plan.optimizers import OPTIMIZERS
from mstc.cli.plan.setting import Setting
from mstc.plan.devices import device
from mstc.plan.expressions import B, C, S, costs_of
from mstc.plan.lengths import at_length
from mstc.plan.memory import simulate
from testkit.hf_models import config_of

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 96,
}


@cache
def _planned(tokens: int) -> Planned:
    config = config_of("llama", **_SIZES, num_key_value_heads=2, max_position_embeddings=1 << 20)
    target = Target("tiny", config)
    return plan_for(target, Setting(device("a100-80g"), 1, torch.bfloat16, OPTIMIZERS["adamw-bf16"]), tokens)


def test_another_length_is_evaluated_as_if_captured_there() -> None:
    near, far = _planned(2048), _planned(6144)
    evaluated = at_length(near.draft.step, 2048, 6144)
    assert simulate(evaluated).peak.total == pytest.approx(simulate(far.draft.step).peak.total, rel=0.01)
    for a, b in zip(evaluated.calls, far.draft.step.calls, strict=True):
        assert a.cost.flops == pytest.approx(b.cost.flops, rel=1e-6)


def test_the_expressions_give_the_figures_back() -> None:
    step = _planned(2048).draft.step
    for call in step.calls:
        costs = costs_of(call, step, 1, 2048)
        at = {B: 1, S: 2048, C: call.cost.rows or 2048}
        assert [float(e.subs(at)) for e in costs.flops] == pytest.approx(call.cost.flops, abs=1)
        assert [float(e.subs(at)) for e in costs.moved] == pytest.approx(call.cost.moved, rel=1e-3, abs=16)


def test_attention_grows_with_the_square_of_the_length_and_loops_linearly() -> None:
    step = _planned(2048).draft.step
    for call in step.calls:
        ratio = costs_of(call, step, 1, 2048).flops[0]
        if call.cost.flops[0]:
            assert ratio.subs({B: 1, S: 4096}) / ratio.subs({B: 1, S: 2048}) == (4 if call.kind == "mixer" else 2)


def test_layers_that_were_not_captured_are_filled_in() -> None:
    planned = _planned(2048)
    deep = Planned(**{**vars(planned), "layers": 80})
    assert len(deep.stages(2048)) == len(planned.stages(2048)) + 76
    assert deep.least(4096).peak > planned.least(4096).peak


def test_a_longer_sequence_never_needs_less() -> None:
    planned = _planned(2048)
    peaks = [planned.least(n).peak for n in (1024, 2048, 4096, 8192)]
    assert peaks == sorted(peaks)
    limit = planned.least(4096).peak + planned.gradients
    longest = planned.longest(limit, grain=512)
    assert planned.fastest(longest, limit) is not None
    assert planned.fastest(longest + 512, limit) is None
