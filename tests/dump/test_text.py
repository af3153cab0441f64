"""Graphs as text, held against golden files: what a pass does must be a readable diff."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mstc.dump.model import Dump
from mstc.dump.text import blocks_text, graph_text, stage_diff, to_text
from testkit.dumps import explain, explain_tiny


def test_graphs_and_diffs_are_golden(tiny_dump: Dump, golden: Any) -> None:
    (graph,) = tiny_dump.graphs
    golden("tiny_blocks.txt", blocks_text(graph.blocks, graph.folds))
    golden("tiny_captured.txt", graph_text(graph.first))
    golden("tiny_rewritten.txt", graph_text(graph.last))
    golden("tiny_passes.diff", "".join(stage_diff(a, b) for a, b in pairwise(graph.stages)))


def test_a_mask_is_golden(golden: Any) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = torch.arange(q.shape[-2])
        mask = positions[None, :] <= positions[:, None]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum()

    q = torch.randn(1, 2, 16, 8).requires_grad_()
    (graph,) = explain(fn, q, q, q, options={"lower": "eager"}).graphs
    golden("causal_mask.diff", "".join(stage_diff(a, b) for a, b in pairwise(graph.stages)))


def test_text_is_the_same_from_run_to_run(tiny_dump: Dump) -> None:
    torch._dynamo.reset()
    assert to_text(explain_tiny()) == to_text(tiny_dump)


def test_text_of_a_dump(tiny_dump: Dump) -> None:
    text = to_text(tiny_dump)
    for part in (
        "command: python explain.py",
        "==== graph 0",
        "---- as captured",
        "---- lm_head: equal up to rounding",
        "+loss_loop",
    ):
        assert part in text
    assert "no graph was captured" in to_text(explain(lambda: 3, options={}))
