"""Predicted live bytes, against counts by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mstc.dump.memory import predict
from testkit import hf_models
from testkit.capture import normal_module
from testkit.dumps import explain, explain_tiny


def f32(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta").requires_grad_()


def test_a_layer_and_its_activation_by_hand() -> None:
    def fn(x, w):  # type: ignore[no-untyped-def]
        return torch.ops.aten.sum.default(torch.ops.aten.silu.default(torch.ops.aten.linear.default(x, w)))

    gm = normal_module(fn, f32(100, 8), f32(16, 8))
    memory = predict(gm, training=True, fused=False)
    inputs, hidden = 4 * (800 + 128), 4 * 1600
    assert memory.steps == ("linear", "silu", "sum", "sum", "silu", "linear") and memory.backward == 3
    assert memory.parameters == (inputs,) * 6 and memory.gradients == (0,) * 5 + (inputs,)
    assert memory.saved == (hidden,) * 5 + (0,)  # silu keeps the product
    # silu's result, the sum; then its gradient, that of silu's result, that of the product.
    assert memory.temporary == (0, hidden, hidden + 4, 4 + 4 + hidden, 4 + 2 * hidden, 4 + hidden)
    assert predict(gm, training=True, fused=True).peak <= memory.peak


def test_inference_keeps_nothing() -> None:
    def fn(x):  # type: ignore[no-untyped-def]
        y = torch.ops.aten.neg.default(torch.ops.aten.view.default(x, [-1]))
        return torch.ops.aten.sum.default(torch.ops.aten.neg.default(torch.ops.aten.view.default(y, [10, 10])))

    memory = predict(normal_module(fn, torch.empty(100, device="meta")), training=False, fused=False)
    assert memory.steps == ("neg", "neg", "sum") and memory.backward == 3
    assert memory.temporary == (400, 800, 404) and memory.saved == memory.gradients == (0,) * 3


def test_all_is_released_at_the_end() -> None:
    (graph,) = explain_tiny().graphs
    for memory in (graph.before, graph.after):
        assert memory.saved[-1] == 0 and min(memory.temporary) >= 0 and min(memory.saved) >= 0
        assert memory.gradients[-1] == sum(n.nbytes for n in graph.first if n.kind == "parameter")
        assert sorted(memory.gradients) == list(memory.gradients), "gradients of parameters only grow"


def test_the_rewritten_head_never_holds_all_logits() -> None:
    def fn(x, w, labels):  # type: ignore[no-untyped-def]
        return F.cross_entropy(F.linear(x, w), labels)

    x, w = f32(4096, 16), f32(8192, 16)
    labels = torch.zeros(4096, dtype=torch.long, device="meta")
    (graph,) = explain(fn, x, w, labels, options={"lower": "eager"}).graphs
    logits = 4 * 4096 * 8192
    assert graph.before.peak > 2 * logits
    assert graph.after.peak < logits


def test_what_a_tagged_loop_makes_is_not_kept() -> None:
    model = hf_models.causal("llama", torch.float32)
    ids = hf_models.tokens(1, 64)
    chunks = {"mini_sequence": {"chunk_tokens": 16}, "lm_head": {"chunk_tokens": 16}, "lower": "eager"}

    def saved(**more: object) -> int:
        torch._dynamo.reset()
        fn = lambda ids: model(input_ids=ids, labels=ids).loss  # noqa: E731
        (graph,) = explain(fn, ids, options={**chunks, **more}).graphs
        return max(graph.after.saved)

    q_k_v = 4 * 64 * (4 + 4 + 4) * 8  # keys and values are repeated for all heads
    assert saved(recompute=False) - saved() >= 2 * q_k_v
