"""Random calls of every op in the table of axis rules.

A case draws the arguments of one call; tensors in them become the call's operands. `CASES` must name every op of
`mstc.graph.rules.TABLE` (held by a test).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mstc.ops import keep as keep  # defines mstc::keep
from testkit.pick import Pick

aten = torch.ops.aten
Args = tuple[Any, ...]
Case = Callable[[Pick], "Args | tuple[Args, dict[str, Any]]"]

NONE, MEAN = 0, 1


# ------------------------------------------------------------------ pointwise


def _one(*more: Any) -> Case:
    return lambda p: (p.tensor(p.shape()), *more)


def _two(dtype: torch.dtype = torch.float64) -> Case:
    def case(p: Pick) -> Args:
        shape = p.shape()
        small = p.smaller(shape)
        return (
            (p.tensor(shape, dtype), p.tensor(small, dtype))
            if p.flag()
            else (p.tensor(small, dtype), p.tensor(shape, dtype))
        )

    return case


def _with_integer(p: Pick) -> Args:
    return p.tensor(p.shape(), torch.long), 1


def _copy(p: Pick) -> Args:
    shape = p.shape()
    return p.tensor(shape), p.tensor(p.smaller(shape))


def _keep(p: Pick) -> Args:
    shape, n = p.shape(), p.size()
    dim, outer, inner = p.int(0, len(shape) - 1), p.size(), p.size()
    shape[dim] = outer * n * inner
    return p.indices([n], 2**62), shape, dim, outer, inner, 0.7


def _masked(other: bool) -> Case:
    def case(p: Pick) -> Args:
        shape = p.shape()
        mask, value = p.tensor(shape, torch.bool), p.tensor(p.smaller(shape))
        return (mask, value, 2.0) if other else (mask, 2.0, value)

    return case


# ------------------------------------------------------------------ shapes


def _view(p: Pick) -> Args:
    shape = p.shape(1, 4)
    return p.tensor(shape), p.regroup(shape)


def _flatten(p: Pick) -> Args:
    shape = p.shape(2, 4)
    first = p.int(0, len(shape) - 1)
    return p.tensor(shape), first, p.int(first, len(shape) - 1) - p.one(0, len(shape))


def _unflatten(p: Pick) -> Args:
    shape = p.shape()
    dim = p.dim(shape)
    parts = p.regroup([shape[dim]])
    if p.flag() and 0 not in parts:
        parts[p.int(0, len(parts) - 1)] = -1
    return p.tensor(shape), dim, parts


def _squeeze_dims(p: Pick) -> Args:
    shape = p.shape()
    return p.tensor(shape), p.dims(shape)


def _permute(p: Pick) -> Args:
    shape = p.shape()
    return p.tensor(shape), [d - len(shape) if p.flag() else d for d in p.order(len(shape))]


def _expand(p: Pick) -> Args:
    shape = p.shape()
    small = p.smaller(shape)
    return p.tensor(small), [
        -1 if d >= len(shape) - len(small) and p.flag() and small[d - len(shape)] == n else n
        for d, n in enumerate(shape)
    ]


def _slice(p: Pick) -> Args:
    shape = p.shape()
    dim = p.dim(shape)
    start = p.one(None, 0, p.int(-shape[dim], shape[dim]))
    return p.tensor(shape), dim, start, p.one(None, shape[dim], 2**62, p.int(-1, shape[dim])), p.one(1, 2)


def _select(p: Pick) -> Args:
    shape = p.shape()
    dim = p.dim(shape)
    return p.tensor(shape), dim, p.int(-shape[dim], shape[dim] - 1)


def _select_scatter(p: Pick) -> Args:
    x, dim, index = _select(p)
    return x, p.tensor(list(x.select(dim, index).shape)), dim, index


def _slice_scatter(p: Pick) -> Args:
    x, dim, *stretch = _slice(p)
    part = torch.ops.aten.slice.Tensor(x, dim, *stretch)
    return x, p.tensor(list(part.shape)), dim, *stretch


def _cat(p: Pick) -> Args:
    shape = p.shape()
    dim = p.dim(shape)
    parts = []
    for _ in range(p.int(1, 3)):
        part = list(shape)
        part[dim] = p.size()
        parts.append(p.tensor(part))
    return parts, dim


def _stack(p: Pick) -> Args:
    shape = p.shape(0, 3)
    return [p.tensor(shape) for _ in range(p.int(1, 3))], p.int(-len(shape) - 1, len(shape))


def _pad(p: Pick) -> Args:
    shape = p.shape()
    return p.tensor(shape), [p.int(0, 2) for _ in range(2 * p.int(1, len(shape)))]


def _repeat(p: Pick) -> Args:
    shape = p.shape()
    return p.tensor(shape), [p.int(1, 2) for _ in range(len(shape) + p.int(0, 1))]


def _roll(p: Pick) -> Args:
    shape = p.shape()
    dims = [d for d in range(len(shape)) if p.flag()]
    return p.tensor(shape), [p.int(-3, 3) for _ in dims] or [p.int(-3, 3)], dims


def _flip(p: Pick) -> Args:
    shape = p.shape()
    return p.tensor(shape), p.dims(shape)


def _split_sizes(p: Pick) -> Args:
    shape = p.shape()
    dim = p.dim(shape)
    first = p.int(1, shape[dim])
    return p.tensor(shape), [first, shape[dim] - first], dim


def _narrow(p: Pick) -> Args:
    shape = p.shape()
    dim = p.dim(shape)
    start = p.int(0, shape[dim] - 1)
    return p.tensor(shape), dim, start, p.int(1, shape[dim] - start)


def _along(*before: Any, dtype: torch.dtype = torch.float64, least: int = 1) -> Case:
    """x, then ``before``, then a dimension."""

    def case(p: Pick) -> Args:
        shape = p.shape(least)
        return p.tensor(shape, dtype), *before, p.dim(shape)

    return case


def _new(*more: Any) -> Case:
    return lambda p: (p.tensor(p.shape(0, 2)), p.shape(), *more)


# ------------------------------------------------------------------ products


def _linear(p: Pick) -> Args:
    shape, out = p.shape(), p.size()
    bias = [p.tensor([out])] if p.flag() else []
    return p.tensor(shape), p.tensor([out, shape[-1]]), *bias


def _addmm(p: Pick) -> tuple[Args, dict[str, Any]]:
    m, k, n = p.size(), p.size(), p.size()
    bias = p.smaller([m, n])
    return (p.tensor(bias), p.tensor([m, k]), p.tensor([k, n])), {"beta": p.one(1, 2), "alpha": p.one(1, 3)}


def _baddbmm(p: Pick) -> Args:
    b, m, k, n = p.size(), p.size(), p.size(), p.size()
    return p.tensor(p.smaller([b, m, n])), p.tensor([b, m, k]), p.tensor([b, k, n])


def _bmm(p: Pick) -> Args:
    return _baddbmm(p)[1:]


def _matmul(p: Pick) -> Args:
    k, batch = p.size(), p.shape(0, 2)
    left = [k] if p.flag() else [*p.smaller(batch), p.size(), k]
    right = [k] if p.flag() else [*p.smaller(batch), k, p.size()]
    return p.tensor(left), p.tensor(right)


def _convolution(p: Pick) -> Args:
    groups, space = p.int(1, 2), p.shape(1, 3)
    inner, outer = groups * p.size(), groups * p.size()
    weight, bias = p.tensor([outer, inner // groups, *[1] * len(space)]), p.tensor([outer])
    still = [1] * len(space), [0] * len(space), [1] * len(space), False, [0] * len(space)
    return p.tensor([p.size(), inner, *space]), weight, bias if p.flag() else None, *still, groups


def _distance(*more: Any) -> Case:
    def case(p: Pick) -> Args:
        batch, k = p.shape(0, 2), p.size()
        left, right = ([*batch, p.size(), k] for _ in range(2))
        return p.tensor(left), p.tensor(right), *more

    return case


def _einsum(p: Pick) -> Args:
    sizes = {c: p.size() for c in "bhijd"}
    equation = p.one("bhid,bhjd->bhij", "bhij, bhjd -> bihd", "bid,jd->bij", "ij,ji", "bhi->ib", "bi,bi,i->b", *_DOTS)
    terms = equation.replace(" ", "").split("->")[0].split(",")
    batch = p.shape(0, 2)
    # What an ellipsis stands for is broadcast from the right.
    given = [p.smaller(batch) if i else batch for i in range(len(terms))]
    return equation, [p.tensor(_sizes(term, sizes, given[i])) for i, term in enumerate(terms)]


_DOTS = ("...id,jd->...ij", "...id,...jd->...ij", "i...d,di->...", "i...,...j", "b...j,j->...b")


def _sizes(term: str, sizes: dict[str, int], dots: list[int]) -> list[int]:
    left, found, right = term.partition("...")
    return [*(sizes[c] for c in left), *(dots if found else ()), *(sizes[c] for c in right)]


# ------------------------------------------------------------------ reductions, norms, losses


def _dims_keep(kwargs: dict[str, Any] | None = None, empty: bool = True) -> Case:
    def case(p: Pick) -> tuple[Args, dict[str, Any]]:
        shape = p.shape()
        dims = [] if empty and p.int(0, 5) == 0 else p.dims(shape)
        return (p.tensor(shape), dims), {"keepdim": p.flag(), **(kwargs or {})}

    return case


def _dim_keep(dtype: torch.dtype = torch.float64, none: bool = False) -> Case:
    def case(p: Pick) -> Args:
        shape = p.shape()
        return p.tensor(shape, dtype), None if none and p.int(0, 4) == 0 else p.dim(shape), p.flag()

    return case


def _vector_norm(p: Pick) -> Args:
    shape = p.shape()
    return p.tensor(shape), p.one(1, 2), p.one(None, p.dims(shape)), p.flag()


def _norm_dims(p: Pick) -> Args:
    shape = p.shape()
    return p.tensor(shape), p.one(1, 2, 3), p.dims(shape), p.flag()


def _layer_norm(bias: bool) -> Case:
    def case(p: Pick) -> Args:
        shape = p.shape()
        over = shape[p.int(0, len(shape) - 1) :]
        weight = p.one(None, p.tensor(over))
        return p.tensor(shape), over, weight, *([p.one(None, p.tensor(over))] if bias else [])

    return case


def _group_norm(p: Pick) -> Args:
    groups = p.int(1, 3)
    channels = groups * p.int(1, 3)
    shape = [p.size(), channels, *p.shape(0, 2)]
    weights = [p.tensor([channels]), p.tensor([channels])] if p.flag() else []
    return p.tensor(shape), groups, *weights


def _cross_entropy(p: Pick) -> Args:
    rows, classes, more = p.size(), p.int(2, 6), p.shape(0, 2)
    logits = p.tensor([rows, classes, *more])
    weight = p.one(None, p.tensor([classes]).abs())
    if p.flag():
        return logits, p.tensor([rows, classes, *more]).softmax(1), weight, NONE, -100, p.one(0.0, 0.1)
    return logits, p.indices([rows, *more], classes), weight, NONE, p.one(-100, 1), p.one(0.0, 0.1)


def _nll(p: Pick) -> Args:
    rows, classes = p.size(), p.int(2, 6)
    weight = p.one(None, p.tensor([classes]).abs())
    return p.tensor([rows, classes]), p.indices([rows], classes), weight, NONE, p.one(-100, 1)


def _multi_margin(p: Pick) -> Args:
    scores, labels, weight, *_ = _nll(p)
    return scores, labels, p.one(1, 2), 0.5, weight, NONE


def _pair(p: Pick) -> Args:
    shape = p.shape()
    return p.tensor(shape), p.tensor(shape), NONE


def _bce_of_shares(p: Pick) -> Args:
    shape = p.shape()
    weight = p.one(None, p.tensor(p.smaller(shape)).abs())
    return p.tensor(shape).sigmoid(), p.tensor(shape).sigmoid(), weight, NONE


def _bce(p: Pick) -> Args:
    shape = p.shape()
    weights = [p.one(None, p.tensor(p.smaller(shape)).abs()) for _ in range(2)]
    return p.tensor(shape), p.tensor(shape).sigmoid(), *weights, NONE


# ------------------------------------------------------------------ indices


def _embedding(p: Pick) -> Args:
    rows = p.size()
    return p.tensor([rows, p.size()]), p.indices(p.shape(0, 3), rows)


def _gather(p: Pick) -> Args:
    shape = p.shape()
    dim = p.dim(shape)
    read = list(shape)
    read[dim] = p.size()
    if p.int(0, 3) == 0:
        read = [p.int(1, n) for n in read[: len(shape)]]
    return p.tensor(shape), dim, p.indices(read, shape[dim])


def _scatter(src: bool) -> Case:
    def case(p: Pick) -> Args:
        source, dim, index = _gather(p)
        return source, dim, index, p.tensor(list(index.shape)) if src else 1.5

    return case


def _index_select(p: Pick) -> Args:
    shape = p.shape()
    dim = p.dim(shape)
    return p.tensor(shape), dim, p.indices([p.size()], shape[dim])


def _index(p: Pick) -> Args:
    shape, rank = p.shape(), p.shape(0, 2)
    if p.flag():
        first = p.one(*range(len(shape)))
        masked = shape[first : first + p.one(1, 2)]
        return p.tensor(shape), [None] * first + [p.indices(masked, 2).bool()]
    given = [p.indices(p.smaller(rank), n) if p.flag() else None for n in shape]
    if not any(g is not None for g in given):
        given[0] = p.indices(rank, shape[0])
    return p.tensor(shape), given


def _one_hot(p: Pick) -> Args:
    return p.indices(p.shape(0, 3), 3), p.one(-1, 3, 5)


def _attention(p: Pick) -> Args | tuple[Args, dict[str, Any]]:
    batch, s, t, k, v = p.shape(1, 2), p.size(), p.size(), p.size(), p.size()
    query, key, value = p.tensor([*batch, s, k]), p.tensor([*batch, t, k]), p.tensor([*batch, t, v])
    if p.flag():
        return (query, key, value), {"is_causal": p.flag()}
    if len(batch) == 2 and p.flag():
        grouped = query.repeat_interleave(2, 1)
        return (grouped, key, value), {"enable_gqa": True}
    mask = p.tensor([*p.smaller(batch), p.one(1, s), p.one(1, t)])
    return query, key, value, mask


def _window_attention(p: Pick) -> Args:
    batch, shared, s, k, v = p.size(), p.size(), p.size(), p.size(), p.size()
    query = p.tensor([batch, shared * p.one(1, 2), s, k])
    return query, p.tensor([batch, shared, s, k]), p.tensor([batch, shared, s, v]), p.one(1, 2, 9), p.flag()


CASES: dict[Any, Case] = {
    # Draws that leave no choice: pieces draw other numbers than the whole.
    aten.bernoulli.p: lambda p: (p.tensor(p.shape()), p.one(0.0, 1.0)),
    torch.ops.mstc.keep.default: _keep,
    aten.dropout.default: lambda p: (p.tensor(p.shape()), *p.one((0.5, False), (0.0, True))),
    **dict.fromkeys((aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor), _two(torch.bool)),
    **dict.fromkeys((aten.__and__.Scalar, aten.__or__.Scalar, aten.__xor__.Scalar), _with_integer),
    aten._to_copy.default: lambda p: ((p.tensor(p.shape()),), {"dtype": torch.float32}),
    aten.to.dtype: _one(torch.float32),
    **dict.fromkeys(
        (
            aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default,
            aten.lift_fresh_copy.default, aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default,
            aten.leaky_relu.default, aten.relu6.default, aten.hardswish.default, aten.selu.default, aten.celu.default,
            aten.log_sigmoid.default, aten.square.default,
        ),
        _one(),
    ),
    aten.broadcast_tensors.default: lambda p: ([p.tensor(s := p.shape()), p.tensor(p.smaller(s))],),
    aten.copy.default: _copy,
    **dict.fromkeys((aten.floor_divide.default, aten.true_divide.Tensor, aten.type_as.default), _two()),
    aten.type_as.default: _copy,
    aten.floor_divide.Scalar: _one(2.0),
    aten.masked_fill.Tensor: lambda p: (p.tensor(s := p.shape()), p.tensor(p.smaller(s), torch.bool), p.tensor([])),
    aten.where.ScalarOther: _masked(True),
    aten.where.ScalarSelf: _masked(False),
    aten.where.Scalar: lambda p: (p.tensor(p.shape(), torch.bool), 1.0, 2.0),
    aten.full_like.default: _one(3.0),
    aten.clip.default: _one(-0.5, 0.5),
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten._unsafe_view.default), _view),
    aten.flatten.using_ints: _flatten,
    aten.unflatten.int: _unflatten,
    aten.squeeze.dim: _along(),
    aten.squeeze.default: _one(),
    aten.squeeze.dims: _squeeze_dims,
    aten.transpose.int: lambda p: (p.tensor(s := p.shape()), p.dim(s), p.dim(s)),
    aten.t.default: lambda p: (p.tensor(p.shape(1, 2)),),
    aten.permute.default: _permute,
    aten.unsqueeze.default: lambda p: (p.tensor(s := p.shape()), p.int(-len(s) - 1, len(s))),
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.select_scatter.default: _select_scatter,
    aten.slice_scatter.default: _slice_scatter,
    aten.unbind.int: _along(),
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), _pad),
    aten.flip.default: _flip,
    aten.repeat.default: _repeat,
    aten.roll.default: _roll,
    **dict.fromkeys((aten.tril.default, aten.triu.default), lambda p: (p.tensor(p.shape(2)), p.int(-1, 1))),
    aten.split.Tensor: lambda p: (p.tensor(s := p.shape()), p.int(1, 4), p.dim(s)),
    aten.split_with_sizes.default: _split_sizes,
    aten.chunk.default: lambda p: (p.tensor(s := p.shape()), p.int(1, 3), p.dim(s)),
    aten.narrow.default: _narrow,
    aten.repeat_interleave.self_int: lambda p: (p.tensor(s := p.shape()), p.int(1, 3), p.one(None, p.dim(s))),
    **dict.fromkeys((aten.new_zeros.default, aten.new_ones.default, aten.new_empty.default), _new()),
    aten.new_full.default: _new(2.5),
    **dict.fromkeys((aten.zeros.default, aten.ones.default), lambda p: ((p.shape(),), {"dtype": torch.float64})),
    aten.fill.Scalar: _one(2.5),
    aten.fill.Tensor: lambda p: (p.tensor(p.shape()), p.tensor([])),
    aten.full.default: lambda p: ((p.shape(), 2.5), {"dtype": torch.float64}),
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    aten.mm.default: lambda p: (p.tensor([p.size(), k := p.size()]), p.tensor([k, p.size()])),
    aten.bmm.default: _bmm,
    aten.baddbmm.default: _baddbmm,
    aten.matmul.default: _matmul,
    aten._euclidean_dist.default: _distance(),
    aten._cdist_forward.default: _distance(1.0, None),
    aten.einsum.default: _einsum,
    aten.convolution.default: _convolution,
    **dict.fromkeys(
        (aten.sum.default, aten.mean.default, aten.max.default, aten.min.default, aten.var.default), _one()
    ),
    aten.norm.Scalar: _one(3),
    **dict.fromkeys(
        (
            aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.logsumexp.default,
            aten.var.dim, aten.std.dim,
        ),
        _dims_keep(),
    ),
    **dict.fromkeys(
        (aten.var.correction, aten.std.correction, aten.var_mean.correction, aten.std_mean.correction),
        _dims_keep({"correction": 0}),
    ),
    aten.linalg_vector_norm.default: _vector_norm,
    aten.norm.ScalarOpt_dim: _norm_dims,
    **dict.fromkeys((aten.max.dim, aten.min.dim, aten.prod.dim_int), _dim_keep()),
    **dict.fromkeys((aten.all.dim, aten.any.dim), _dim_keep(torch.bool)),
    **dict.fromkeys((aten.argmax.default, aten.argmin.default), _dim_keep(none=True)),
    **dict.fromkeys(
        (
            aten.softmax.int, aten.log_softmax.int, aten.cumsum.default, aten.cumprod.default,
            aten.logcumsumexp.default, aten.sort.default, aten.argsort.default,
        ),
        _along(),
    ),
    **dict.fromkeys((aten._softmax.default, aten._log_softmax.default), lambda p: (*_along()(p), False)),
    aten.topk.default: lambda p: (p.tensor(s := p.shape()), p.int(1, s[d := p.dim(s)]), d),
    aten.glu.default: lambda p: (p.tensor(s := [2 * n for n in p.shape()]), p.dim(s)),
    aten.layer_norm.default: _layer_norm(bias=True),
    aten.rms_norm.default: _layer_norm(bias=False),
    aten.group_norm.default: _group_norm,
    aten.cross_entropy_loss.default: _cross_entropy,
    **dict.fromkeys((aten.nll_loss.default, aten.nll_loss_nd.default), _nll),
    aten.multi_margin_loss.default: _multi_margin,
    **dict.fromkeys(
        (
            aten.mse_loss.default, aten.l1_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default,
            aten.kl_div.default, aten.soft_margin_loss.default,
        ),
        _pair,
    ),
    aten.binary_cross_entropy.default: _bce_of_shares,
    aten.binary_cross_entropy_with_logits.default: _bce,
    aten.embedding.default: _embedding,
    aten.gather.default: _gather,
    aten.scatter.value: _scatter(src=False),
    **dict.fromkeys((aten.scatter.src, aten.scatter_add.default), _scatter(src=True)),
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.one_hot.default: _one_hot,
    aten.scaled_dot_product_attention.default: _attention,
    torch.ops.mstc.window_attention.default: _window_attention,
}  # fmt: skip
