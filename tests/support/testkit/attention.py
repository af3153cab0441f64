"""Attention as people write it out: operands, and what is left of all pairs of queries and keys in a graph."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from testkit.exactness import Comparison, chunked

B, H, Q, K, D = 2, 4, 37, 29, 6


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def qkv(queries: int = Q, keys: int = Q) -> dict[str, Tensor]:
    return {"q": randn(B, H, queries, D), "k": randn(B, H, keys, D, seed=1), "v": randn(B, H, keys, D, seed=2)}


def distance(queries: int = Q, keys: int = Q) -> Tensor:
    return torch.arange(keys)[None, :] - torch.arange(queries)[:, None]


def end(y: Tensor) -> Tensor:
    return (y.transpose(1, 2).reshape(B, -1).sin() * 3).square().mean()


def options(chunk: int = 10, **more: Any) -> dict[str, Any]:
    return chunked(query_chunks={"chunk_tokens": chunk}, **more)


def wide(gm: fx.GraphModule, inputs: bool = False) -> list[str]:
    """Values with a dimension of queries and one of keys that the graph makes."""
    return [shown for shown, _ in wide_values(gm, inputs)]


def wide_values(gm: fx.GraphModule, inputs: bool = False) -> list[tuple[str, torch.dtype]]:
    """Those values, with their dtypes."""
    found = []
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or (node.op == "placeholder" and not inputs):
            continue
        long = [n for n in value.shape if n >= K]
        found += [(f"{node.name} {tuple(value.shape)}", value.dtype)] if len(long) > 1 else []
    return found


def attention_loops(result: Comparison) -> int:
    return sum("attention by queries" in e.what for r in result.reports for e in r.edits)


def refusals(result: Comparison) -> list[str]:
    return [x.reason for r in result.reports for x in r.refusals if x.pass_name == "query_chunks"]
