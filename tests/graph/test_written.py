"""What is found of attention that is written out: where it begins, what it cuts and what its queries share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mstc.graph.places import Place
from mstc.graph.written import Written, find_written
from testkit.capture import labels_of, normal_graph, randn

aten = torch.ops.aten
B, H, Q, K, D = 2, 3, 12, 10, 4


def found(fn: object, *inputs: Tensor) -> list[Written]:
    return list(find_written(normal_graph(fn, *inputs)))  # type: ignore[arg-type]


def operands() -> tuple[Tensor, Tensor, Tensor]:
    return randn(B, H, Q, D), randn(B, H, K, D), randn(B, H, K, D)


def test_queries_are_cut_and_keys_and_values_shared() -> None:
    (written,) = found(lambda q, k, v: F.softmax(q @ k.mT / 2, -1) @ v, *operands())
    assert [n.target for n in written.scores] == [aten.matmul.default]
    assert written.region.n == Q
    assert [(n.name, p) for n, p in written.region.tokens] == [("arg0_1", Place(2, Q))]
    assert labels_of(written.region.shared)[-1] == "arg2_1" and len(written.region.shared) == 2
    assert written.keys[written.scores[0]] == Place(3, K)
    assert (written.readers, written.draws) == ((), ())


def test_a_bias_is_made_inside_from_what_has_one_length_only() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor, i: Tensor, j: Tensor) -> Tensor:
        far = (i[:, None] - j[None, :]).abs().clamp(max=7)
        return F.softmax(q @ k.mT + F.embedding(far, table).permute(2, 0, 1), -1) @ v

    (written,) = found(attend, *operands(), randn(8, H), torch.arange(Q), torch.arange(K))
    inside = {n.target for n in written.region.nodes}
    assert {aten.embedding.default, aten.sub.Tensor, aten.clamp.default} <= inside
    sizes = [n.meta["val"].numel() for n in (*written.region.shared, *(t for t, _ in written.region.tokens))]
    assert max(sizes) == B * H * Q * D


def test_the_longest_dimension_that_values_do_not_have_is_that_of_the_queries() -> None:
    """Grouped heads [B, G, R, Q, K] x [B, G, 1, K, D]: R and Q are both free."""
    q, k, v = randn(B, 2, 3, Q, D), randn(B, 2, 1, K, D), randn(B, 2, 1, K, D)
    (written,) = found(lambda q, k, v: F.softmax(q @ k.mT, -1) @ v, q, k, v)
    assert written.region.outputs == ((written.ends[0], Place(3, Q)),)


def test_keys_before_values() -> None:
    """v^T w^T instead of w v."""
    (written,) = found(lambda q, k, v: v.mT @ F.softmax(k @ q.mT, -2), *operands())
    assert written.region.outputs == ((written.ends[0], Place(3, Q)),)


def test_readers_and_draws_are_told() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        w = torch.nn.functional.dropout(F.softmax(q @ k.mT, -1), 0.5)
        return w @ v, w.sum()

    (written,) = found(attend, *operands())
    assert [n.target for n in written.draws] == [aten.dropout.default]
    assert [n.target for n in written.readers] == [aten.sum.default]


def test_two_products_with_values_end_one_stretch() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = F.softmax(q @ k.mT, -1)
        return w @ v + w @ v.sin()

    (written,) = found(attend, *operands())
    assert len(written.ends) == len(written.region.outputs) == 2


def test_a_product_that_is_made_of_another_begins_a_stretch_of_its_own() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = F.softmax(q @ k.mT, -1)
        return w @ (w @ v)

    first, second = found(attend, randn(B, H, Q, D), randn(B, H, Q, D), randn(B, H, Q, D))
    assert first.scores == second.scores and second.ends != first.ends


def test_values_of_all_pairs_without_a_product_are_found_and_feature_states_are_not() -> None:
    def differ(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.exp(-(q[..., :, None, :] - k[..., None, :, :]).square().sum(-1)) @ v

    def state(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q[..., None] * (k[..., :, None] * v[..., None, :]).cumsum(2)).sum(-2)

    (written,) = found(differ, *operands())
    assert [n.target for n in written.scores] == [aten.sub.Tensor]
    assert not found(state, randn(B, H, Q, D), randn(B, H, Q, D), randn(B, H, Q, D))


def test_positions_alone_are_no_scores() -> None:
    def count(x: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return x + (i[:, None] - j[None, :]).float().exp().sum(-1)

    assert not found(count, randn(Q), torch.arange(Q), torch.arange(K))


def test_a_stretch_does_not_end_where_some_keys_are_picked() -> None:
    """Steps of a scan read one token each: their "keys"."""

    def steps(weight: Tensor, x: Tensor) -> Tensor:
        y = torch.bmm(weight, x.transpose(1, 2))
        return y[:, :, 0] + y[:, :, 1]

    assert not found(steps, randn(H, D, D), randn(H, K, D))
