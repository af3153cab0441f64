"""How many mini-sequences a loop runs in, or why it stays whole."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.fx as fx

from mstc.graph.axes import Tokenwise
from mstc.graph.costs import UNKNOWN_LENGTH, hint, is_heavy, matmul_flops, nbytes
from mstc.graph.places import Place
from mstc.graph.regions import Region
from mstc.graph.rules import flow_of
from mstc.graph.sizes import UnknownSize, evaluate, size
from mstc.graph.views import is_view
from mstc.ops.body import dynamic_lengths
from mstc.ops.build import examples_of
from mstc.plan.words import bytes_text, counted

# Working set of one chunk that the automatic choice aims at, and the fewest tokens that keep matrix
# products efficient: measured on the CPU benchmark (docs/benchmarks.md, "Chunk sizes").
WORKING_SET = 128 * 2**20
FEWEST_TOKENS = 512
MOST_TOKENS = 1024
# A loss whose chunk holds so many values of the widest size at once is cut further, down to these tokens.
SEVERAL = 1.25
FEWEST_OF_SEVERAL = 128
# Fewest tokens that are chunked at all (docs/benchmarks.md, "Short"); a loss over 2048 tokens may shift by some.
SHORTEST = 4096
SHORTEST_LOSS = 2048 - 16
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
    """Tokens in the region: rows of its costliest matrix product, the longest of several."""
    products = [(matmul_flops(n), _rows(n, region.proofs[n])) for n in region.heavy]
    return max(products, default=(0.0, hint_n(region)))[1]


def _rows(product: fx.Node, proof: Tokenwise) -> int:
    """How many rows a product has: its result's dimensions that stand in what is cut, a weight's left out.

    Where all factors are cut, as beside weights that each token has of its own (experts), those of the narrower one.
    """
    flow, shape = flow_of(product), product.meta["val"].shape
    assert flow is not None
    rows = [
        math.prod(hint(n) for d, n in enumerate(shape) if flow.back(i, Place(d, size(n))) is not None)
        for i, need in enumerate(proof.needs)
        if need is not None
    ]
    return min(rows)


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

    Below ``SHORTEST`` tokens, chunks that run again in the backward cost time; a region that ends in a loss does
    not run again, and pays sooner. With less than ``WORTH`` bytes of intermediates nothing that matters is saved.
    Then the region stays whole. A dynamic length is taken to be ``PLANNED_TOKENS`` where the example is shorter: one
    graph serves all lengths, and the one at hand may well be the shortest.
    """
    try:
        lengths = _Lengths.of(region, tokens_of(region), "token")
    except UnknownSize as problem:
        return Chunks(1, str(problem))
    if isinstance(chunk_tokens, int):
        return lengths.chunks(chunk_tokens, asked=True)
    total = intermediate_bytes(region) * lengths.growth
    if lengths.rows * lengths.growth < (SHORTEST_LOSS if region.sums else SHORTEST) or total < WORTH:
        return lengths.whole(f"with {bytes_text(total)} of intermediates")
    widest = max((nbytes(x) for x in region.nodes), default=0)
    return lengths.chunks(_tokens_per_chunk(lengths.rows, widest))


def may_hold_several(region: Region) -> bool:
    """Whether a chunk may hold several values of the widest size at once: scores of a teacher, say, beside the own."""
    products = [nbytes(n) for n in region.nodes if is_heavy(n)]
    return sum(2 * size > max(products) for size in products) > 1


def cut_further(chunks: Chunks, region: Region, several: float) -> Chunks:
    """Shorter chunks where one holds ``several`` times the bytes of its widest value at once."""
    if chunks.count == 1 or several <= SEVERAL:
        return chunks
    lengths = _Lengths.of(region, tokens_of(region), "token")
    # A column or two beside two whole values do not ask for a quarter of the tokens.
    per_chunk = max(int(1.1 * lengths.rows / chunks.count / several), FEWEST_OF_SEVERAL)
    finer = lengths.chunks(1 << (per_chunk.bit_length() - 1))
    return finer if finer.count > chunks.count else chunks


def choose_queries(region: Region, chunk_tokens: int | str) -> Chunks:
    """Chunks of queries for attention that is written out: as asked, or where ``"auto"`` by its widest scores."""
    try:
        lengths = _Lengths.of(region, hint_n(region), "query")
    except UnknownSize as problem:
        return Chunks(1, str(problem))
    if isinstance(chunk_tokens, int):
        return lengths.chunks(chunk_tokens, asked=True)
    pairs = lengths.growth**2  # queries and keys grow together
    total, widest = intermediate_bytes(region) * pairs, max(nbytes(x) for x in region.nodes) * pairs
    if total < WORTH or widest <= SCORES:
        return lengths.whole(f"with {bytes_text(total)} of scores and weights")
    return lengths.chunks(max(int(lengths.rows * lengths.growth * SCORES / widest), FEWEST_QUERIES))


@dataclass(frozen=True)
class _Lengths:
    """A region's axis of ``n`` indices, and the ``rows`` that it makes: more in a batch.

    what: a row is, "token" or "query"; dynamic: these are those of an example; growth: how much longer the length is
    taken to be.
    """

    n: int
    rows: int
    what: str
    dynamic: bool
    growth: float

    @staticmethod
    def of(region: Region, rows: int, what: str) -> _Lengths:
        dynamic = not isinstance(region.n, int) or bool(dynamic_lengths(region))
        growth = max(PLANNED_TOKENS / max(rows, 1), 1.0) if dynamic else 1.0
        return _Lengths(hint_n(region), rows, what, dynamic, growth)

    def whole(self, of_what: str) -> Chunks:
        return Chunks(1, f"{counted(int(self.rows * self.growth), self.what)} {of_what}: chunks would not pay")

    def chunks(self, per_chunk: int, asked: bool = False) -> Chunks:
        """Chunks of at most so many tokens or queries; of a dynamic length always several."""
        if self.dynamic:
            longest = max(per_chunk * self.n // max(self.rows, 1), 1)
            count = max(-(-self.n // longest), 2)
            return Chunks(count, f"{counted(per_chunk, self.what)} per chunk of a dynamic length", longest)
        count = min(-(-self.rows // per_chunk), self.n)
        if count <= 1:
            return Chunks(1, f"its {counted(self.rows, self.what)} fit into one chunk of {per_chunk}")
        if asked:
            return Chunks(count, f"{counted(per_chunk, self.what)} per chunk as asked")
        count = _even(self.n, count)
        return Chunks(count, f"{counted(self.rows // count, self.what)} per chunk")


def _tokens_per_chunk(tokens: int, widest: int) -> int:
    """A power of two whose widest value fits into the working set."""
    fitting = int(WORKING_SET * tokens / max(widest, 1))
    per_chunk = max(min(fitting, MOST_TOKENS), FEWEST_TOKENS)
    return 1 << (per_chunk.bit_length() - 1)


def drafted(region: Region) -> Chunks:
    """Chunks for a draft, which the plan then changes: few enough to trace, of a usual size."""
    n = hint_n(region)
    return _at_most(n, _even(n, min(max(tokens_of(region) // MOST_TOKENS, 1), n)), "a draft")


def planned(region: Region, count: int) -> Chunks:
    """Chunks as a plan says; of a dynamic length as long as they are at the length that it was planned for."""
    return _at_most(hint_n(region), count, "as planned under the memory budget")


def _at_most(n: int, count: int, reason: str) -> Chunks:
    return Chunks(count, reason, -(-n // count))


def _even(n: int, count: int) -> int:
    """A count near the wanted one that divides n, so that one body serves all chunks; else the wanted one."""
    for more in range(count, min(2 * count, n) + 1):
        if n % more == 0:
            return more
    return count
