"""The gradient that a loop's sums will receive, as far as the graph itself tells it.

Sums S_1 ... S_k that are combined linearly into one scalar E, which all their gradients pass,

    E = sum_k <s_k, S_k> + rest,     dL/dS_k = s_k dL/dE

need one set of gradients between them: the loop computes them for the *seeds* s_k and multiplies them by
dL/dE in the backward, which is exactly 1 for ``E.backward()``: nothing is rounded twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from mstc.graph.editor import Editor
from mstc.graph.precision import at_least_float32
from mstc.graph.reach import descendants
from mstc.graph.rules.call import Call

aten = torch.ops.aten

_PASS_ON = (aten.add.Tensor, aten.sub.Tensor)
_SCALE = (aten.mul.Tensor, aten.div.Tensor)
_RESHAPE = (
    aten.view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten._to_copy.default,
)
_REDUCE = (aten.sum.default, aten.mean.default)


@dataclass(frozen=True)
class Seeds:
    """chains: for each sum the linear ops from it to the scalar where all of them have met, both included."""

    chains: tuple[tuple[fx.Node, ...], ...]

    @property
    def sums(self) -> tuple[fx.Node, ...]:
        return tuple(c[0] for c in self.chains)


def find_seeds(sums: Sequence[fx.Node], nodes: Sequence[fx.Node]) -> Seeds | None:
    """How these sums meet in one scalar; None where they do not.

    nodes: of the loop; what depends on them cannot be a factor of a seed, which the loop needs beforehand.
    """
    later = descendants((*nodes, *sums))
    chains = [_chain(s, later) for s in sums]
    if not chains:
        return None
    common = [n for n in chains[0] if n.meta["val"].dim() == 0 and all(n in c for c in chains)]
    if not common:
        return None
    return Seeds(tuple(tuple(c[: c.index(common[-1]) + 1]) for c in chains))


def write_seeds(editor: Editor, seeds: Seeds) -> list[fx.Node]:
    """The seed of each sum, as nodes before the loop."""
    end = seeds.chains[0][-1]
    value = end.meta["val"]
    dtype = at_least_float32(value.dtype)
    one = editor.call(aten.full.default, ([], 1.0), {"dtype": dtype, "device": value.device}, like=end)
    known = {end: one}
    for chain in seeds.chains:
        for source, user in zip(chain[-2::-1], chain[:0:-1], strict=True):
            if source not in known:
                known[source] = _pull(editor, source, user, known[user])
    return [known[s] for s in seeds.sums]


def _chain(node: fx.Node, later: set[fx.Node]) -> list[fx.Node]:
    """The node and the linear ops behind it, while all of its gradient comes from one place."""
    chain = [node]
    while True:
        users = [u for u in node.users if u.op == "output" or u.meta.get("needs_grad")]
        if len(users) != 1 or not _linear(users[0], node, later):
            return chain
        node = users[0]
        chain.append(node)


def _linear(user: fx.Node, source: fx.Node, later: set[fx.Node]) -> bool:
    """Whether ``user`` is linear in ``source``, with factors that are known before the loop."""
    if [a for a in (*user.args, *user.kwargs.values()) if a is source] != [source]:
        return False
    if not isinstance(user.meta.get("val"), torch.Tensor):
        return False  # pieces of a split
    if user.target in _RESHAPE or user.target in _REDUCE:
        return all(isinstance(n, int) for n in source.meta["val"].shape)  # the seed has that shape, written as numbers
    same_shape: bool = user.meta["val"].shape == source.meta["val"].shape
    if user.target is aten.neg.default:
        return True
    if user.target in _PASS_ON:
        return same_shape
    if user.target is aten.masked_fill.Scalar:
        return same_shape and user.args[0] is source and _known(user.args[1], later)
    if user.target in _SCALE:
        factor = _factor(user, source)
        divides = user.target is aten.div.Tensor and user.args[0] is not source
        return same_shape and not divides and _known(factor, later)
    return False


def _factor(user: fx.Node, source: fx.Node) -> Any:
    return user.args[1] if user.args[0] is source else user.args[0]


def _known(factor: Any, later: set[fx.Node]) -> bool:
    return not isinstance(factor, fx.Node) or (not factor.meta.get("needs_grad") and factor not in later)


def _pull(editor: Editor, source: fx.Node, user: fx.Node, seed: fx.Node) -> fx.Node:
    """The gradient of ``source`` where that of ``user`` is ``seed``."""

    def call(target: Any, *args: Any) -> fx.Node:
        return editor.call(target, args, like=user, before=seed.next)

    shape, target = list(source.meta["val"].shape), user.target
    if target is aten.neg.default or (target is aten.sub.Tensor and user.args[1] is source):
        seed = call(aten.neg.default, seed)
    if target in _PASS_ON and user.args[1] is source and (alpha := Call(user).arg("alpha", 1)) != 1:
        return call(aten.mul.Tensor, seed, alpha)
    if target in _SCALE:
        return call(target, seed, _factor(user, source))
    if target is aten.masked_fill.Scalar:
        return call(target, seed, user.args[1], 0)
    if target in _REDUCE:
        if target is aten.mean.default:
            seed = call(aten.div.Tensor, seed, max(source.meta["val"].numel(), 1))
        return call(aten.expand.default, seed, shape)
    if target in _RESHAPE and target is not aten._to_copy.default:
        return call(aten.reshape.default, seed, shape)
    return seed
