"""Autocast is written out: the same casts as in eager, none left to the state at run time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mstc import compat
from mstc.graph.checker import check
from mstc.graph.normal_form import normalize
from testkit.exactness import Gradients, chunked, compare, gradients_of, loops_of, lowered_graphs
from testkit.hf_models import tokens
from testkit.homegrown import NanoGPT

aten = torch.ops.aten

BF16 = torch.bfloat16


def graph_of(fn: Callable[..., Any], *args: Tensor) -> fx.Graph:
    """The normal form of what Dynamo captures."""
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        found.append(normalize(gm, inputs).gm)
        check(found[-1])
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, fullgraph=True)(*args)
    (gm,) = found
    return gm.graph


def calls(graph: fx.Graph) -> list[Any]:
    return [n.target for n in graph.nodes if n.op == "call_function"]


def dtypes(graph: fx.Graph, target: Any) -> list[torch.dtype]:
    return [n.meta["val"].dtype for n in graph.find_nodes(op="call_function", target=target)]


def test_casts_instead_of_switches() -> None:
    weight = torch.randn(4, 8, requires_grad=True)

    def fn(x: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16):
            y = F.linear(x, weight)
            with torch.autocast("cpu", enabled=False):
                inside = F.linear(x, weight)
            y = F.linear(y, weight.t())
        return y.sum() + inside.sum() + F.linear(x, weight).sum()

    graph = graph_of(fn, torch.randn(3, 8))
    assert not [t for t in calls(graph) if "autocast" in str(t)]
    assert dtypes(graph, aten.linear.default) == [BF16, torch.float32, BF16, torch.float32]


def test_the_state_at_capture_counts() -> None:
    weight = torch.randn(4, 8, requires_grad=True)
    fn = lambda x: F.linear(x, weight).sum()  # noqa: E731
    with torch.autocast("cpu", BF16):
        graph = graph_of(fn, torch.randn(3, 8))
        assert torch.is_autocast_enabled("cpu")
    assert dtypes(graph, aten.linear.default) == [BF16]
    assert dtypes(graph_of(fn, torch.randn(3, 8)), aten.linear.default) == [torch.float32]


def test_large_ops_stay_whole() -> None:
    weight = torch.randn(8, 8)

    def fn(x: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16):
            y = F.layer_norm(F.linear(x, weight), (8,))
            y = F.scaled_dot_product_attention(y, y, y)
            y = F.softmax(y, -1) + F.rms_norm(y, (8,)) + torch.einsum("bsd,de->bse", y, weight)
            return F.cross_entropy(y.flatten(0, 1), torch.zeros(6, dtype=torch.long))

    found = calls(graph_of(fn, torch.randn(2, 3, 8)))
    whole = (aten.layer_norm, aten.scaled_dot_product_attention, aten.rms_norm, aten.linear, aten.cross_entropy_loss)
    assert all(op.default in found for op in whole) and aten.softmax.int in found
    assert aten.einsum.default not in found  # made of products, which autocast casts


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_cuda_has_rules_of_its_own(dtype: torch.dtype) -> None:
    """On fake tensors: what CUDA's autocast runs in float32."""
    module = nn.Module()
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    enter = graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cuda", dtype, True, True))
    y = graph.call_function(F.linear, (x, w))
    y = graph.call_function(F.layer_norm, (y, (8,)))
    y = graph.call_function(F.linear, (y, w))
    y = graph.call_function(F.scaled_dot_product_attention, (y, y, y))
    z = graph.call_function(F.softmax, (y, -1))
    flat = graph.call_method("flatten", (y, 0, 1))
    labels = graph.call_method("argmax", (flat, -1))
    loss = graph.call_function(F.cross_entropy, (flat, labels))
    graph.call_function(torch.amp.autocast_mode._exit_autocast, (enter,))
    graph.output((z, loss))
    with (
        compat.FakeTensorMode(),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
    ):
        inputs = [torch.empty(2, 5, 8, device="cuda"), torch.empty(8, 8, device="cuda")]
        form = normalize(fx.GraphModule(module, graph), inputs).gm.graph
    assert dtypes(form, aten.linear.default) == [dtype, dtype]
    assert dtypes(form, aten.scaled_dot_product_attention.default) == [dtype]
    assert dtypes(form, aten.layer_norm.default) == [torch.float32]
    assert dtypes(form, aten.softmax.int) == [torch.float32]
    assert dtypes(form, aten.cross_entropy_loss.default) == [torch.float32]


# -- the same numbers ----------------------------------------------------------------------------


def inside(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def fn(ids: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16):
            return model(ids)  # type: ignore[no-any-return]

    return fn


def measured(model: nn.Module, fn: Callable[..., Any]) -> Gradients:
    return gradients_of(fn, dict(model.named_parameters()), (tokens(),))[1]


def model_of(seed: int) -> NanoGPT:
    model = NanoGPT(fused=True).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + torch.randn(p.shape, generator=generator) * 0.1)
    return model


def squared_distance(got: Gradients, reference: Gradients) -> float:
    """Sum over gradients of |g - r|^2 / |r|^2, the zero ones (keys' biases) left out."""
    total = 0.0
    for name, r in reference.items():
        g = got[name]
        assert g is not None and r is not None
        if r.norm() > 1e-6:
            total += float((g.double() - r.double()).square().sum() / r.double().square().sum())
    return total


def test_as_close_to_float64_as_eager() -> None:
    eager = mine = 0.0
    for seed in range(5):
        model = model_of(seed)
        exact = model_of(seed).double()
        exact.load_state_dict(model.state_dict())
        reference = measured(exact, exact)
        torch._dynamo.reset()
        compiled = torch.compile(inside(model), backend="mstc", options=chunked(lower="eager"), fullgraph=True)
        eager += squared_distance(measured(model, inside(model)), reference)
        with lowered_graphs() as graphs:
            mine += squared_distance(measured(model, compiled), reference)
        assert len(loops_of(graphs[0])) == 5
    print(f"RMS distance from float64: mstc {mine**0.5:.4g}, eager {eager**0.5:.4g}")
    assert mine**0.5 <= 1.05 * eager**0.5


def test_weights_are_cast_outside_the_loops() -> None:
    model = model_of(0)
    torch._dynamo.reset()
    compiled = torch.compile(inside(model), backend="mstc", options=chunked(lower="eager"), fullgraph=True)
    with lowered_graphs() as graphs:
        compiled(tokens())
    loops = loops_of(graphs[0])
    weights = [n for loop in loops for n in loop.args[1] if n.meta["val"].dim() == 2]  # type: ignore[union-attr]
    assert len(weights) >= 9 and all(w.target is aten._to_copy.default for w in weights)


@pytest.mark.parametrize("lower", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_nothing_is_cast_twice(lower: str) -> None:
    """Forward and backward under autocast of a function that switches it off: float32 all through."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    x = torch.randn(2, 20, 16)
    leaves = dict(model.named_parameters())

    def compute(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return model(x).square().mean()  # type: ignore[no-any-return]

    loss, expected = gradients_of(compute, leaves, (x,))
    torch._dynamo.reset()
    compiled = torch.compile(compute, backend="mstc", options=chunked(8, 8, lower), fullgraph=True)
    with lowered_graphs() as graphs, torch.autocast("cpu", BF16):
        got_loss, got = gradients_of(compiled, leaves, (x,))
    assert loops_of(graphs[0])
    torch.testing.assert_close(got_loss, loss)
    for name, r in expected.items():
        torch.testing.assert_close(got[name], r, rtol=1e-4, atol=1e-7, msg=name)


def test_checkpointed_blocks_under_autocast() -> None:
    model = NanoGPT(fused=True, checkpointed=True).float()
    result = compare(inside(model), dict(model.named_parameters()), (tokens(),), {"lower": "aot_eager"})
    assert not result.missing and not [r for x in result.reports for r in x.refusals if r.pass_name == "normal_form"]
    assert result.worst < 1e-2, result.worst


def test_an_error_inside_leaves_autocast_as_it_was() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", BF16, True, True))
    graph.output((graph.call_function(torch.mm, (x, x)),))
    with pytest.raises(RuntimeError):
        normalize(fx.GraphModule(nn.Module(), graph), [torch.randn(2, 3)])
    assert not torch.is_autocast_enabled("cpu")


def test_checkpoint_of_a_function_with_its_own_autocast() -> None:
    weight = torch.randn(8, 8, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16):
            return F.linear(x, weight).float()

    def fn(x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False).sum()  # type: ignore[no-any-return]

    graph = graph_of(fn, torch.randn(3, 8))
    assert dtypes(graph, aten.linear.default) == [BF16]
    casts = graph.find_nodes(op="call_function", target=aten._to_copy.default)
    assert casts and all("recompute" in n.meta for n in casts)
