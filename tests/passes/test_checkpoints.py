"""The user's checkpointed blocks: nothing runs a third time, and unless they are to be kept the plan decides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import mstc
from mstc.errors import OptionError
from mstc.options import parse_options
from testkit.allocator import measured_peak, predicted_mib
from testkit.exactness import chunked, compare
from testkit.hf_models import FOR_PEAKS, causal, in_training, tokens

LAYERS = 2  # of `causal`
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
MLP = "mstc::output projection + norm + gated MLP"


pytestmark = pytest.mark.usefixtures("one_thread")


def _loss_of(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda ids: model(input_ids=ids, labels=ids).loss


def _model(checkpointed: bool) -> Any:
    model: Any = causal("llama", torch.float32)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _runs(fn: Callable[..., Tensor], *inputs: Tensor) -> tuple[Counter[str], int]:
    """How often each op and loop runs in a step, and the FLOPs of all matrix products."""
    fn(*inputs).backward()
    with profile(activities=[ProfilerActivity.CPU], with_flops=True, record_shapes=True) as run:
        fn(*inputs).backward()
    events = run.key_averages()
    return Counter({e.key: e.count for e in events}), sum(e.flops for e in events)


def _compiled_runs(checkpointed: bool, **options: Any) -> tuple[Counter[str], int]:
    torch._dynamo.reset()
    return _runs(torch.compile(_loss_of(_model(checkpointed)), backend="mstc", options=chunked(**options)), tokens())


def test_nothing_runs_a_third_time() -> None:
    """As without checkpoints. Eager computes each product once, and two of its size for its gradients."""
    found, flops = _compiled_runs(True)
    assert any(e.pass_name == "checkpoints" for e in mstc.reports()[-1].edits)
    assert found[ATTENTION] == found[MLP] == LAYERS
    assert flops == _compiled_runs(False)[1]
    assert flops <= _runs(_loss_of(_model(False)), tokens())[1] * 4 / 3


def test_checkpoints_are_kept_where_that_is_asked_for() -> None:
    found, _ = _compiled_runs(True, recompute={"checkpoints": "keep"})
    assert found[ATTENTION] == 2 * LAYERS
    assert not any(e.pass_name == "checkpoints" for e in mstc.reports()[-1].edits)


def test_without_recompute_checkpoints_stay() -> None:
    found, _ = _compiled_runs(True, recompute=False)
    assert found[ATTENTION] == 2 * LAYERS


def test_blocks_without_loops_stay_as_they_are() -> None:
    """Too short for chunks: the block runs again as in eager, and so does its attention."""
    found, _ = _runs(torch.compile(_loss_of(_model(True)), backend="mstc", options={"lower": "aot_eager"}), tokens())
    assert found["mstc::loop"] == 0 and found[ATTENTION] == 2 * LAYERS


class _Mixed(nn.Module):
    """A convolution, which stays outside of loops, and an MLP in each checkpointed block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv1d(16, 16, 3, padding=1, dtype=torch.float64) for _ in range(3))
        self.ups = nn.ModuleList(nn.Linear(16, 32, dtype=torch.float64) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(32, 16, dtype=torch.float64) for _ in range(3))

    def block(self, x: Tensor, i: int) -> Tensor:
        x = x + self.convs[i](x.transpose(1, 2)).tanh().transpose(1, 2)
        return x + self.downs[i](F.silu(self.ups[i](x)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            x = checkpoint(self.block, x, i, use_reentrant=False)
        return x.square().mean()


def test_what_stands_outside_of_loops_runs_again_once() -> None:
    model, x = _Mixed(), torch.randn(2, 50, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = compare(model, dict(model.named_parameters()), (x,), chunked())
    result.check()
    assert result.loops >= 3
    torch._dynamo.reset()
    found, _ = _runs(torch.compile(model, backend="mstc", options=chunked()), x)
    assert found["aten::convolution"] <= 2 * 3
    assert found["mstc::loop"] + found["mstc::loss_loop"] == result.loops


def test_a_checkpointed_head_computes_its_gradients_once() -> None:
    weight = torch.randn(40, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    x = torch.randn(50, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss_fn(x: Tensor, labels: Tensor) -> Tensor:
        return checkpoint(lambda h: F.cross_entropy(h @ weight.t(), labels), x.tanh(), use_reentrant=False)  # type: ignore[no-any-return]

    labels = torch.arange(50) % 40
    found, _ = _runs(torch.compile(loss_fn, backend="mstc", options=chunked()), x, labels)
    assert found["mstc::loss_loop"] == 1


def test_under_a_budget_the_plan_has_the_checkpointed_blocks() -> None:
    """The peak is the predicted one, at a budget that lets attention be kept and at one that does not."""
    model, loss_fn = in_training("llama", **{**FOR_PEAKS, "num_hidden_layers": 4})
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, 512, (1, 1024), generator=torch.Generator().manual_seed(0))
    again = []
    for budget in ("6MiB", "64MiB"):
        torch._dynamo.reset()
        options = {"lower": "aot_eager", "memory_budget": budget}
        fn = torch.compile(loss_fn, backend="mstc", options=options, dynamic=False)
        found, _ = _runs(fn, ids)
        again.append(found[ATTENTION])
        peak = measured_peak(lambda fn=fn: fn(ids).backward(), model) / 2**20  # type: ignore[misc]
        assert predicted_mib() == pytest.approx(peak, rel=0.05, abs=0.5)
    assert again[1] == 4 < again[0]


def test_a_budget_and_kept_checkpoints_contradict_each_other() -> None:
    with pytest.raises(OptionError, match=r"'recompute.checkpoints' is 'keep', but under a 'memory_budget'"):
        parse_options({"recompute": {"checkpoints": "keep"}, "memory_budget": "1GiB"})
