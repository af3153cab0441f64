"""Attention: batch and heads go along, queries do where no causal mask ties them to keys, keys are mixed."""

from __future__ import annotations

from mstc.graph.attention import SDPA, WINDOW_ATTENTION
from mstc.graph.places import Flow, Lost
from mstc.graph.rules.call import Call, Map, Rule
from mstc.graph.sizes import Size, same

MIXED = Lost.MIXED


def attention(call: Call) -> Flow | None:
    """o[b, h, s, e] = sum_t softmax_t(q[b, h, s, :] k[b, h, t, :] + mask[b, h, s, t]) v[b, h, t, e]"""
    rank = len(call.shape(0))
    if rank < 3 or call.arg("dropout_p") or any(len(s) != rank for s in call.shapes[:3]):
        return None
    query, key = call.shape(0), call.shape(1)
    batch = tuple(d if same(query[d], key[d]) else MIXED for d in range(rank - 2))
    row: int | Lost = MIXED if call.arg("is_causal") else rank - 2
    maps: list[Map] = [(*_leading(query, key), row, MIXED), (*batch, MIXED, MIXED), (*batch, MIXED, rank - 1)]
    for mask in call.shapes[3:]:
        offset = rank - len(mask)
        maps.append(tuple(d + offset if d + offset < rank - 1 else MIXED for d in range(len(mask))))
    return call.flow(*maps)


def _leading(query: tuple[Size, ...], key: tuple[Size, ...]) -> tuple[int | Lost, ...]:
    """Batch and heads of the queries; which of several shared heads a query's head reads is told by all of them."""
    pairs = enumerate(zip(query[:-2], key[:-2], strict=True))
    return tuple(d if same(q, k) or same(k, 1) else MIXED for d, (q, k) in pairs)


def window_attention(call: Call) -> Flow | None:
    """The same over keys s - window < t, of the query's document, not hidden: where a query stands tells which keys it
    sees."""
    query, key = call.shape(0), call.shape(1)
    batch = tuple(d if same(query[d], key[d]) else MIXED for d in range(2))
    vectors: list[Map] = [(0 if same(shape[0], query[0]) else MIXED, MIXED) for shape in call.shapes[3:]]
    return call.flow((*_leading(query, key), MIXED, MIXED), (*batch, MIXED, MIXED), (*batch, MIXED, 3), *vectors)


ATTENTION_RULES: dict[object, Rule] = {SDPA: attention, WINDOW_ATTENTION: window_attention}
