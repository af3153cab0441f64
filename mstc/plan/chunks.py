"""How many mini-sequences a loop runs in, or why it stays whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mstc.graph.costs import hint, is_heavy, nbytes, numel
from mstc.graph.regions import Region

# Working set of one chunk that the automatic choice aims at, and the fewest tokens that keep matrix
# products efficient: measured on the CPU benchmark (docs/benchmarks.md, "Chunk sizes").
WORKING_SET = 128 * 2**20
FEWEST_TOKENS = 512
MOST_TOKENS = 1024
# Scores of one chunk of queries where attention is written out, in bytes: what the C library's heap gives again
# without asking the system for fresh pages. Fewer queries than these make their products slow.
SCORES = 16 * 2**20
FEWEST_QUERIES = 64
# Whole intermediates below this are not worth a loop.
WORTH = 96 * 2**20


@dataclass(frozen=True)
class Chunks:
    """The choice: ``count`` chunks (1: stay whole), and why."""

    count: int
    reason: str


def tokens_of(region: Region) -> int:
    """Tokens in the region: rows of its widest matrix product."""
    rows = [numel(n) // max(hint(n.meta["val"].shape[-1]), 1) for n in region.nodes if is_heavy(n)]
    return max(rows, default=hint_n(region))


def hint_n(region: Region) -> int:
    return int(region.n) if isinstance(region.n, int) else 4096


def intermediate_bytes(region: Region) -> int:
    """Bytes of all values that the region makes inside, views left out."""
    return sum(nbytes(n) for n in region.nodes if not is_view(n))


def is_view(node: object) -> bool:
    target = getattr(node, "target", None)
    schema = getattr(target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def choose(region: Region, chunk_tokens: int | str) -> Chunks:
    """Chunks for a region: as asked, or where ``"auto"`` by its working set.

    Below ``2 * FEWEST_TOKENS`` tokens or ``WORTH`` bytes of intermediates, chunks cost time and save
    nothing that matters: the region stays whole.
    """
    if not is_static(region):
        return Chunks(1, "the length is dynamic (a symbol), and loops over dynamic lengths are not built yet")
    n, tokens = hint_n(region), tokens_of(region)
    if isinstance(chunk_tokens, int):
        count = min(-(-tokens // chunk_tokens), n)
        if count == 1:
            return Chunks(1, f"its {tokens} tokens fit into one chunk of {chunk_tokens}")
        return Chunks(count, f"{chunk_tokens} tokens per chunk as asked")
    total = intermediate_bytes(region)
    if tokens < 4 * FEWEST_TOKENS or total < WORTH:
        return Chunks(1, f"{tokens} tokens with {total / 2**20:.0f} MiB of intermediates: chunks would not pay")
    widest = max((nbytes(x) for x in region.nodes), default=0)
    fitting = int(WORKING_SET * tokens / max(widest, 1))
    per_chunk = max(min(fitting, MOST_TOKENS), FEWEST_TOKENS)
    per_chunk = 1 << (per_chunk.bit_length() - 1)
    count = _even(n, min(-(-tokens // per_chunk), n))
    return Chunks(count, f"{tokens // count} tokens per chunk")


def choose_queries(region: Region, chunk_tokens: int | str) -> Chunks:
    """Chunks of queries for attention that is written out: as asked, or where ``"auto"`` by its widest scores."""
    if not is_static(region):
        return Chunks(1, "the length is dynamic (a symbol), and loops over dynamic lengths are not built yet")
    n = hint_n(region)
    if isinstance(chunk_tokens, int):
        count = min(-(-n // chunk_tokens), n)
        return Chunks(count, f"{chunk_tokens} queries per chunk as asked" if count > 1 else f"{n} queries fit into one")
    total = intermediate_bytes(region)
    widest = max(nbytes(x) for x in region.nodes)
    if total < WORTH or widest <= SCORES:
        return Chunks(1, f"{n} queries with {total / 2**20:.0f} MiB of scores and weights: chunks would not pay")
    per_chunk = max(n * SCORES // widest, FEWEST_QUERIES)
    if per_chunk >= n:
        return Chunks(1, f"its {n} queries fit into one chunk")
    count = _even(n, -(-n // per_chunk))
    return Chunks(count, f"{n // count} queries per chunk")


def _even(n: int, count: int) -> int:
    """A count near the wanted one that divides n, so that one body serves all chunks; else the wanted one."""
    for more in range(count, min(2 * count, n) + 1):
        if n % more == 0:
            return more
    return count


def is_static(region: Region) -> bool:
    """Whether every size in the region is a number."""
    values = [n.meta.get("val") for n in (*region.nodes, *region.sums, *region.shared, *(t for t, _ in region.tokens))]
    return isinstance(region.n, int) and not any(
        isinstance(s, torch.SymInt) for v in values if isinstance(v, torch.Tensor) for s in (*v.shape, *v.stride())
    )
