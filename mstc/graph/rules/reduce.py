"""Reductions, norms, softmax and losses: the dimensions they run over are mixed, or summed."""

from __future__ import annotations

import torch

from mstc.graph.places import Flow, Lost
from mstc.graph.rules.call import Call, Map, Rule, without
from mstc.graph.rules.shape import one_dim_mixed

aten = torch.ops.aten
MIXED, SUMMED = Lost.MIXED, Lost.SUMMED


def _dims(call: Call) -> list[int]:
    rank = len(call.shape())
    given = call.arg("dim")
    if given is None or given == []:
        return list(range(rank))
    if isinstance(given, int):
        given = [given]
    return [int(d) % max(rank, 1) for d in given]


def _reduce(call: Call, how: Lost) -> Flow | None:
    rank = len(call.shape())
    lost = dict.fromkeys(_dims(call), how)
    return call.flow(without(rank, lost, removed=not call.arg("keepdim", False)))


def sum_(call: Call) -> Flow | None:
    """Partial sums over pieces of the axis add up to the sum."""
    return _reduce(call, SUMMED)


def reduce_(call: Call) -> Flow | None:
    """Means, extrema, norms, variances: whole along the reduced dimensions."""
    return _reduce(call, MIXED)


def layer_norm(call: Call) -> Flow | None:
    """Normalized dimensions are mixed; the weights, which stand along them, are needed whole with them."""
    rank = len(call.shape())
    normalized = len(call.arg("normalized_shape"))
    kept = rank - normalized
    first: Map = tuple(d if d < kept else MIXED for d in range(rank))
    return call.flow(first, *((MIXED,) * normalized for _ in call.operands[1:]))


def group_norm(call: Call) -> Flow | None:
    """Statistics over channels of a group and all positions: only the batch dimension is free."""
    rank = len(call.shape())
    first: Map = (0, *(MIXED for _ in range(rank - 1)))
    return call.flow(first, *((MIXED,) for _ in call.operands[1:]))


def cross_entropy(call: Call) -> Flow | None:
    """Per-token losses (reduction none): classes stand in dim 1, or in dim 0 of a single token."""
    if call.arg("reduction") != 0:
        return _all_mixed(call)
    rank = len(call.shape(0))
    if rank < 2:
        return None
    logits: Map = tuple(0 if d == 0 else MIXED if d == 1 else d - 1 for d in range(rank))
    target = logits if len(call.shape(1)) == rank else tuple(range(rank - 1))
    return call.flow(logits, target, *((MIXED,) for _ in call.operands[2:]))


def nll_loss(call: Call) -> Flow | None:
    if call.arg("reduction") != 0:
        return _all_mixed(call)
    if len(call.shape(0)) != 2:
        return None
    return call.flow((0, MIXED), (0,), *((MIXED,) for _ in call.operands[2:]))


def _all_mixed(call: Call) -> Flow:
    """A loss that reduces over everything; `mstc.passes.token_losses` writes it as a sum."""
    return call.flow(*(tuple(MIXED for _ in s) for s in call.shapes))


def pair_loss(call: Call) -> Flow | None:
    """Losses of one element each (reduction none): pointwise."""
    if call.arg("reduction") != 0:
        return _all_mixed(call)
    rank = len(call.result)
    return call.flow(*(tuple(d + rank - len(s) for d in range(len(s))) for s in call.shapes))


REDUCE_RULES: dict[object, Rule] = {
    **dict.fromkeys((aten.sum.default, aten.sum.dim_IntList), sum_),
    **dict.fromkeys(
        (
            aten.mean.default,
            aten.mean.dim,
            aten.amax.default,
            aten.amin.default,
            aten.max.default,
            aten.max.dim,
            aten.min.default,
            aten.min.dim,
            aten.argmax.default,
            aten.argmin.default,
            aten.logsumexp.default,
            aten.var.default,
            aten.var.dim,
            aten.var.correction,
            aten.std.dim,
            aten.std.correction,
            aten.std_mean.correction,
            aten.var_mean.correction,
            aten.prod.dim_int,
            aten.all.dim,
            aten.any.dim,
            aten.linalg_vector_norm.default,
            aten.norm.ScalarOpt_dim,
            aten.norm.Scalar,
        ),
        reduce_,
    ),
    **dict.fromkeys(
        (
            aten.softmax.int,
            aten._softmax.default,
            aten.log_softmax.int,
            aten._log_softmax.default,
            aten.cumsum.default,
            aten.cumprod.default,
            aten.logcumsumexp.default,
            aten.sort.default,
            aten.topk.default,
            aten.argsort.default,
            aten.glu.default,
        ),
        one_dim_mixed,
    ),
    aten.layer_norm.default: layer_norm,
    aten.rms_norm.default: layer_norm,
    aten.group_norm.default: group_norm,
    aten.cross_entropy_loss.default: cross_entropy,
    aten.multi_margin_loss.default: nll_loss,
    aten.nll_loss.default: nll_loss,
    aten.nll_loss_nd.default: nll_loss,
    **dict.fromkeys(
        (
            aten.mse_loss.default,
            aten.l1_loss.default,
            aten.smooth_l1_loss.default,
            aten.huber_loss.default,
            aten.binary_cross_entropy.default,
            aten.binary_cross_entropy_with_logits.default,
            aten.soft_margin_loss.default,
            aten.kl_div.default,
        ),
        pair_loss,
    ),
}
