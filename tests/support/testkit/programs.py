"""Random programs over tokens, written as Dynamo would write them.

A program starts from activations ``[B, S, D]``, applies random steps (products, norms, activations, views, broadcasts,
reductions over features, reads at indices, mixers over time, writes in place) and returns several values: losses,
token-shaped results, or both. Sizes are small and collide on purpose (S equal to D, to the heads, to the classes).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten


class Program:
    """A graph under construction: its inputs, and the values that later steps may use.

    inputs: in the order of the placeholders; values: nodes of shape [B, S, anything].
    """

    def __init__(self, draw: Callable[..., Any]) -> None:
        self._draw = draw
        self._random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
        self.graph = fx.Graph()
        self.inputs: list[Tensor] = []
        self.names: list[str] = []
        self._at: fx.Node | None = None
        self.B, self.S = self.int(1, 3), self.int(2, 9)
        self.values = [self.leaf("x", self.B, self.S, self.one(2, 3, 4, 6))]

    # -- drawing ---------------------------------------------------------------------------------

    def int(self, low: int, high: int) -> int:
        return int(self._draw(st.integers(low, high)))

    def one(self, *values: Any) -> Any:
        return self._draw(st.sampled_from(values))

    def pick(self) -> fx.Node:
        """One of the values, the newest most often."""
        return self.values[-1] if self.int(0, 2) else self.one(*self.values)

    # -- building --------------------------------------------------------------------------------

    def leaf(self, name: str, *shape: int, scale: float = 1.0, grad: bool = True) -> fx.Node:
        """An input with a gradient (a parameter, mostly); some are frozen."""
        value = torch.randn(shape, dtype=torch.float64, generator=self._random) * scale
        return self._input(name, value.requires_grad_(grad and bool(self.int(0, 9))))

    def integers(self, below: int, *shape: int) -> fx.Node:
        return self._input("i", torch.randint(0, below, shape, generator=self._random))

    def _input(self, name: str, value: Tensor) -> fx.Node:
        last = self.graph.find_nodes(op="placeholder")
        with self.graph.inserting_after(last[-1]) if last else self.graph.inserting_before():
            node = self.graph.placeholder(f"{name}{len(self.inputs)}")
        self.inputs.append(value)
        self.names.append(node.name)
        node.meta["val"] = value
        return node

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a torch function (or of a tensor's method, given by name); its value is computed at once."""
        known = lambda n: n.meta["val"]  # noqa: E731
        values, named = fx.node.map_arg(args, known), fx.node.map_arg(kwargs, known)
        with torch.no_grad():
            if isinstance(function, str):
                value = getattr(values[0], function)(*values[1:], **named)
                node = self.graph.call_method(function, args, kwargs)
            else:
                value = function(*values, **named)
                node = self.graph.call_function(function, args, kwargs)
        node.meta["val"] = value
        return node

    def keep(self, node: fx.Node) -> None:
        self.values.append(node)

    def finish(self, outputs: list[fx.Node]) -> fx.GraphModule:
        self.graph.output(tuple(outputs))
        return fx.GraphModule(torch.nn.Module(), self.graph)


def shape(node: fx.Node) -> torch.Size:
    return node.meta["val"].shape  # type: ignore[no-any-return]


def width(node: fx.Node) -> int:
    return int(shape(node)[-1])


def flat(p: Program, x: fx.Node) -> fx.Node:
    """[B, S, D], with whatever other dimensions there were merged into D."""
    return x if len(shape(x)) == 3 else p.call("reshape", x, p.B, p.S, -1)


# ------------------------------------------------------------------ steps that treat tokens one by one


def linear(p: Program, x: fx.Node, out: int | None = None) -> fx.Node:
    out = out or p.one(2, 3, 4, 6, 9)
    weight = p.leaf("w", out, width(x), scale=width(x) ** -0.5)
    bias = [p.leaf("b", out)] if p.int(0, 1) else []
    return p.call(F.linear, x, weight, *bias)


def step_linear(p: Program) -> None:
    p.keep(linear(p, p.pick()))


def step_mlp(p: Program) -> None:
    x = flat(p, p.pick())
    gate, up = linear(p, x, 6), linear(p, x, 6)
    inner = p.call(torch.mul, p.call(F.silu, gate), up)
    p.keep(p.call(torch.add, x, linear(p, inner, width(x))))


def step_product(p: Program) -> None:
    """The same product in other words."""
    x = flat(p, p.pick())
    weight = p.leaf("w", width(x), 4, scale=width(x) ** -0.5)
    how = p.int(0, 3)
    if how == 0:
        p.keep(p.call(torch.matmul, x, weight))
    elif how == 1:
        p.keep(p.call(torch.einsum, "bsd,de->bse", x, weight))
    elif how == 2:
        rows = p.call("view", p.call("reshape", x, -1, width(x)), p.B * p.S, width(x))
        p.keep(p.call("view", p.call(torch.addmm, p.leaf("b", 4), rows, weight), p.B, p.S, 4))
    else:
        many = p.call("expand", p.call("unsqueeze", weight, 0), p.B, -1, -1)
        p.keep(p.call(torch.bmm, x, many))


def step_norm(p: Program) -> None:
    x = p.pick()
    how = p.int(0, 2)
    if how == 0:
        p.keep(p.call(F.layer_norm, x, (width(x),), p.leaf("g", width(x)), p.leaf("b", width(x)), 1e-2))
    elif how == 1:
        p.keep(p.call(F.rms_norm, x, (width(x),), p.leaf("g", width(x)), 1e-2))
    else:
        size = p.call(torch.mean, p.call(torch.pow, x, 2), -1, keepdim=True)
        scaled = p.call(torch.mul, x, p.call(torch.rsqrt, p.call(torch.add, size, 1e-2)))
        p.keep(p.call(torch.mul, p.leaf("g", width(x)), scaled))


def step_activation(p: Program) -> None:
    act = p.one(F.silu, F.gelu, F.relu, torch.tanh, torch.sigmoid, torch.square, torch.sin, torch.neg, torch.abs)
    p.keep(p.call(act, p.pick()))


def step_feature_softmax(p: Program) -> None:
    p.keep(p.call(p.one(F.softmax, F.log_softmax), p.pick(), -1))


def step_combine(p: Program) -> None:
    x = p.pick()
    same = [v for v in p.values if shape(v) == shape(x)]
    p.keep(p.call(p.one(torch.add, torch.mul, torch.sub, torch.maximum), x, p.one(*same)))


def step_heads(p: Program) -> None:
    """Heads split off, moved, treated, and put back."""
    x = flat(p, p.pick())
    heads = p.one(*(h for h in (1, 2, 3) if width(x) % h == 0))
    split = p.call("view", p.call("contiguous", x), p.B, p.S, heads, width(x) // heads)
    moved = p.call(p.one("transpose", "swapaxes"), split, 1, 2)
    scaled = p.call(torch.mul, moved, p.leaf("g", heads, 1, width(x) // heads))
    back = p.call("permute", p.call(torch.tanh, scaled), 0, 2, 1, 3)
    p.keep(back if p.int(0, 1) else p.call("reshape", back, p.B, p.S, -1))


def step_rows(p: Program) -> None:
    """Tokens as rows of a matrix, and back; perhaps with the batch inside."""
    x = flat(p, p.pick())
    if p.int(0, 1):
        x = p.call("transpose", x, 0, 1)
        rows = p.call("reshape", x, p.B * p.S, width(x))
        back = p.call("view", p.call(F.gelu, linear(p, rows, 4)), p.S, p.B, 4)
        p.keep(p.call("transpose", back, 0, 1))
    else:
        rows = p.call("flatten", x, 0, 1)
        p.keep(p.call("unflatten", p.call(torch.sin, linear(p, rows, 4)), 0, (p.B, p.S)))


def step_broadcast(p: Program) -> None:
    x = flat(p, p.pick())
    other = p.one((width(x),), (p.S, width(x)), (1, p.S, 1), (p.B, 1, width(x)), (p.S, 1), (1, 1, 1), (p.B, p.S, 1), ())
    p.keep(p.call(p.one(torch.add, torch.mul), x, p.leaf("p", *other)))


def step_expand(p: Program) -> None:
    """Repeated keys, as grouped attention writes them."""
    x = flat(p, p.pick())
    wide = p.call("expand", p.call("unsqueeze", x, 2), p.B, p.S, 2, width(x))
    p.keep(p.call("reshape", wide, p.B, p.S, 2 * width(x)))


def step_reduce_features(p: Program) -> None:
    x = p.pick()
    how = p.one("mean", "sum", "amax", "var", "logsumexp")
    p.keep(p.call(torch.mul, x, p.call(how, x, dim=-1, keepdim=True)))


def step_gated(p: Program) -> None:
    x = p.pick()
    if width(x) % 2:
        return
    parts = p.call(p.one("chunk", "tensor_split"), x, 2, -1)
    a, b = p.call(_item, parts, 0), p.call(_item, parts, 1)
    p.keep(p.call(torch.mul, p.call(torch.sigmoid, a), b))


def _item(values: Any, i: int) -> Any:
    return values[i]


def step_join_features(p: Program) -> None:
    x = p.pick()
    p.keep(p.call(torch.cat, [x, p.call(torch.cos, x)], -1))


def step_slice_features(p: Program) -> None:
    """Half of the features turned, as rotary embeddings do."""
    x = p.pick()
    half = width(x) // 2
    if half:
        first, second = p.call("narrow", x, -1, 0, half), p.call("narrow", x, -1, half, width(x) - half)
        p.keep(p.call(torch.cat, [p.call(torch.neg, second), first], dim=-1))


def step_gather_features(p: Program) -> None:
    x = flat(p, p.pick())
    if p.int(0, 1):
        p.keep(p.call(torch.gather, x, -1, p.integers(width(x), p.B, p.S, 3)))
    else:
        p.keep(p.call(torch.index_select, x, 2, p.integers(width(x), 4)))


def step_top(p: Program) -> None:
    """A router: the largest features, normalized."""
    x = p.pick()
    found = p.call(torch.topk, x, min(2, width(x)), -1)
    p.keep(p.call(F.softmax, p.call(_item, found, 0), -1))


def step_embedding(p: Program) -> None:
    p.keep(p.call(F.embedding, p.integers(5, p.B, p.S), p.leaf("table", 5, p.one(3, 4, 6))))


def step_mask_tokens(p: Program) -> None:
    x = flat(p, p.pick())
    mask = p.call(torch.eq, p.integers(3, p.B, p.S, 1), 0)
    p.keep(p.call("masked_fill", x, mask, 0.5) if p.int(0, 1) else p.call(torch.where, mask, x, 0.0))


def step_detach(p: Program) -> None:
    x = p.pick()
    p.keep(p.call(torch.mul, p.call("detach", x), x))


def step_in_place(p: Program) -> None:
    x = p.call("clone", p.pick())
    if p.int(0, 1):
        p.keep(p.call("mul_", x, 1.5))
    else:
        p.call("mul_", p.call("select", x, 1, 0), 2.0)
        p.keep(p.call(torch.tanh, x))


# ------------------------------------------------------------------ mixers


def step_attention(p: Program) -> None:
    x = flat(p, p.pick())
    q, k, v = (p.call("transpose", p.call("view", linear(p, x, 4), p.B, p.S, 2, 2), 1, 2) for _ in range(3))
    how = p.int(0, 2)
    if how == 2:
        scores = p.call(torch.matmul, q, p.call("transpose", k, 2, 3))
        out = p.call(torch.matmul, p.call(F.softmax, scores, -1), v)
    else:
        out = p.call(F.scaled_dot_product_attention, q, k, v, is_causal=bool(how))
    joined = p.call("reshape", p.call("transpose", out, 1, 2), p.B, p.S, 4)
    p.keep(p.call(torch.add, x, linear(p, joined, width(x))))


def step_scan(p: Program) -> None:
    x = p.pick()
    p.keep(p.call(p.one(torch.cumsum, torch.logcumsumexp, F.softmax), x, 1))


def step_center(p: Program) -> None:
    """Subtract a mean over time, or over everything."""
    x = p.pick()
    over = p.one(1, (0, 1), 0)
    p.keep(p.call(torch.sub, x, p.call("mean", x, dim=over, keepdim=True)))


def step_shift(p: Program) -> None:
    x = flat(p, p.pick())
    how = p.int(0, 3)
    if how == 0:
        p.keep(p.call(F.pad, p.call("narrow", x, 1, 0, p.S - 1), (0, 0, 1, 0)))
    elif how == 1:
        p.keep(p.call(torch.flip, x, [1]))
    elif how == 2:
        p.keep(p.call(torch.roll, x, 1, 1))
    else:
        kernel = p.leaf("k", width(x), 1, 3)
        moved = p.call(F.conv1d, p.call("transpose", x, 1, 2), kernel, padding=2, groups=width(x))
        p.keep(p.call("transpose", p.call("narrow", moved, 2, 0, p.S), 1, 2))


def step_other_order(p: Program) -> None:
    """A view that does not keep tokens apart."""
    x = flat(p, p.pick())
    p.keep(p.call("view", p.call("contiguous", p.call("transpose", x, 1, 2)), p.B, p.S, width(x)))


STEPS: tuple[Callable[[Program], None], ...] = (
    step_linear, step_linear, step_mlp, step_mlp, step_product, step_norm, step_norm, step_activation,
    step_feature_softmax, step_combine, step_combine, step_heads, step_rows, step_broadcast, step_expand,
    step_reduce_features, step_gated, step_join_features, step_slice_features, step_gather_features, step_top,
    step_embedding, step_mask_tokens, step_detach, step_in_place, step_attention, step_attention, step_scan,
    step_center, step_shift, step_other_order,
)  # fmt: skip


# ------------------------------------------------------------------ ends


def end_cross_entropy(p: Program) -> fx.Node:
    x = flat(p, p.pick())
    classes = p.one(3, 5, p.S + 1)
    logits = linear(p, x, classes)
    if p.int(0, 3) == 0:
        logits = p.call(torch.mul, p.call(torch.tanh, p.call(torch.div, logits, 3.0)), 3.0)
    target = p.integers(classes, p.B, p.S)
    if p.int(0, 2) == 0:
        logits = p.call(_until_last, logits)
        target = p.call(_from_second, target)
    rows = p.call("reshape", logits, -1, classes)
    options = {
        "reduction": p.one("mean", "sum"),
        "ignore_index": p.one(-100, 0),
        "label_smoothing": p.one(0.0, 0.1),
    }
    if p.int(0, 3) == 0:
        options["weight"] = p.call(torch.exp, p.leaf("c", classes, grad=False))
    return p.call(F.cross_entropy, rows, p.call("reshape", target, -1), **options)


def _until_last(x: Tensor) -> Tensor:
    return x[:, :-1]


def _from_second(x: Tensor) -> Tensor:
    return x[:, 1:]


def end_distance(p: Program) -> fx.Node:
    x = linear(p, flat(p, p.pick()))
    other = p.leaf("y", *shape(x), grad=False)
    return p.call(p.one(F.mse_loss, F.l1_loss, F.smooth_l1_loss), x, other, reduction=p.one("mean", "sum"))


def end_sum(p: Program) -> fx.Node:
    return p.call(p.one(torch.sum, torch.mean), p.call(torch.tanh, p.pick()))


def end_over_time(p: Program) -> fx.Node:
    """Sums that leave the batch or the features."""
    return p.call(p.one("sum", "mean", "amax"), p.pick(), dim=p.one(1, (0, 1), (1, 2)))


def end_value(p: Program) -> fx.Node:
    return p.pick()


ENDS = (end_cross_entropy, end_cross_entropy, end_distance, end_sum, end_over_time, end_value)


def random_program(draw: Callable[..., Any]) -> tuple[fx.GraphModule, Program]:
    """A program of up to 9 steps with up to 3 results."""
    p = Program(draw)
    for _ in range(p.int(1, 9)):
        p.one(*STEPS)(p)
    outputs = [p.one(*ENDS)(p) for _ in range(p.one(1, 1, 1, 2, 3))]
    return p.finish(outputs), p
