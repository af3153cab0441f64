"""How many mini-sequences a loop runs in, or why it stays whole."""

from __future__ import annotations

from dataclasses import dataclass

from mstc.graph.costs import UNKNOWN_LENGTH, hint, is_heavy, nbytes, numel
from mstc.graph.live import is_view
from mstc.graph.regions import Region
from mstc.graph.sizes import UnknownSize, evaluate
from mstc.ops.body import dynamic_lengths
from mstc.ops.build import examples_of

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
# A dynamic length is planned as if it had at least so many tokens.
PLANNED_TOKENS = 8192


@dataclass(frozen=True)
class Chunks:
    """The choice: ``count`` chunks (1: stay whole), and why.

    longest: most indices in a chunk of a dynamic length, whose count varies from call to call.
    """

    count: int
    reason: str
    longest: int = 0


def tokens_of(region: Region) -> int:
    """Tokens in the region: rows of its widest matrix product."""
    rows = [numel(n) // max(hint(n.meta["val"].shape[-1]), 1) for n in region.nodes if is_heavy(n)]
    return max(rows, default=hint_n(region))


def hint_n(region: Region) -> int:
    """The length of the axis, of a dynamic one that in the example."""
    if isinstance(region.n, int):
        return region.n
    return int(evaluate(region.n, dict.fromkeys(dynamic_lengths(region), UNKNOWN_LENGTH) | examples_of(region)))


def intermediate_bytes(region: Region) -> int:
    """Bytes of all values that the region makes inside, views left out."""
    return sum(nbytes(n) for n in region.nodes if not is_view(n))


def choose(region: Region, chunk_tokens: int | str) -> Chunks:
    """Chunks for a region: as asked, or where ``"auto"`` by its working set.

    Below ``4 * FEWEST_TOKENS`` tokens or ``WORTH`` bytes of intermediates, chunks cost time and save
    nothing that matters: the region stays whole.
    """
    if not isinstance(region.n, int) or dynamic_lengths(region):
        return _choose_dynamic(region, chunk_tokens)
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
    per_chunk = _tokens_per_chunk(tokens, widest)
    count = _even(n, min(-(-tokens // per_chunk), n))
    return Chunks(count, f"{tokens // count} tokens per chunk")


def _choose_dynamic_queries(region: Region, chunk_tokens: int | str) -> Chunks:
    """Chunks of queries of a dynamic length: planned for ``PLANNED_TOKENS`` queries and keys at least."""
    try:
        n = hint_n(region)
    except UnknownSize as problem:
        return Chunks(1, str(problem))
    longest = chunk_tokens
    if not isinstance(longest, int):
        growth = max(PLANNED_TOKENS / n, 1.0)
        widest = max(nbytes(x) for x in region.nodes) * growth**2
        longest = max(int(n * growth * SCORES / widest), FEWEST_QUERIES)
    return Chunks(max(-(-n // longest), 2), f"{longest} queries per chunk of a dynamic length", longest)


def _tokens_per_chunk(tokens: int, widest: int) -> int:
    """A power of two whose widest value fits into the working set."""
    fitting = int(WORKING_SET * tokens / max(widest, 1))
    per_chunk = max(min(fitting, MOST_TOKENS), FEWEST_TOKENS)
    return 1 << (per_chunk.bit_length() - 1)


def choose_queries(region: Region, chunk_tokens: int | str) -> Chunks:
    """Chunks of queries for attention that is written out: as asked, or where ``"auto"`` by its widest scores."""
    if not isinstance(region.n, int) or dynamic_lengths(region):
        return _choose_dynamic_queries(region, chunk_tokens)
    n = region.n
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


def drafted(region: Region) -> Chunks:
    """Chunks for a draft, which the plan then changes: few enough to trace, of a usual size."""
    n = hint_n(region)
    return Chunks(_even(n, min(max(tokens_of(region) // MOST_TOKENS, 1), n)), "a draft")


def _even(n: int, count: int) -> int:
    """A count near the wanted one that divides n, so that one body serves all chunks; else the wanted one."""
    for more in range(count, min(2 * count, n) + 1):
        if n % more == 0:
            return more
    return count


def _choose_dynamic(region: Region, chunk_tokens: int | str) -> Chunks:
    """Chunks of a dynamic length: planned for the example, or for ``PLANNED_TOKENS`` where that is shorter.

    One graph serves all lengths, and the length at hand may well be the shortest.
    """
    try:
        n, tokens = hint_n(region), tokens_of(region)
    except UnknownSize as problem:
        return Chunks(1, str(problem))
    scale = max(PLANNED_TOKENS / max(tokens, 1), 1.0)
    widest = max((nbytes(x) for x in region.nodes), default=0)
    per_chunk = chunk_tokens if isinstance(chunk_tokens, int) else _tokens_per_chunk(tokens, widest)
    if chunk_tokens == "auto" and intermediate_bytes(region) * scale < WORTH:
        return Chunks(1, f"{PLANNED_TOKENS} tokens would have too few intermediates: chunks would not pay")
    longest = max(per_chunk * n // max(tokens, 1), 1)
    return Chunks(max(-(-n // longest), 2), f"{per_chunk} tokens per chunk of a dynamic length", longest)
