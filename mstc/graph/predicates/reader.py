"""Reading one element of a tensor out of a graph, without computing the tensor.

`Reader.value(node, index)` tells what stands in ``node`` at ``index``: sources (arange, full, buffers of
known values) are evaluated at the index, views move it, elementwise ops are carried out on what stands at
it. Where no rule applies the answer is a *leaf*: a symbol for "``node`` at ``index``", the same symbol
whenever the same element is meant. Two elementwise ops without a rule on equal operands are equal leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx as fx

from mstc.graph.predicates import pointwise, sources, views
from mstc.graph.predicates.bounds import Box
from mstc.graph.predicates.call import Call, Unread, call_of, dtype_of, is_tensor, shape_of, size
from mstc.graph.predicates.constants import Bands, Ramp
from mstc.graph.predicates.runs import Run, run_of
from mstc.graph.predicates.terms import Expr, Holds, Value, choose, number

aten = torch.ops.aten

DEEPEST = 48  # nodes between a mask and its sources; the masks of known models have at most 25
Index = tuple[Expr, ...]


@dataclass(frozen=True)
class Leaf:
    """What a leaf's symbol stands for: ``node`` at ``index``."""

    node: fx.Node
    index: Index


class Reader:
    """Reads elements of one graph.

    known: the description of a buffer's values for a placeholder or constant, None if there is none.
    After reading, `used` holds the nodes whose described values were read.
    """

    def __init__(self, known: Callable[[fx.Node], Ramp | Bands | None] = lambda node: None) -> None:
        self.box = Box()
        self.leaves: dict[Expr, Leaf] = {}
        self.runs: dict[Expr, Run] = {}
        self.used: set[fx.Node] = set()
        self._known = known
        self._symbols: dict[object, Expr] = {}
        self._values: dict[tuple[fx.Node, Index], Value] = {}
        self._depth = 0

    def value(self, node: fx.Node, index: Index) -> Value:
        """What stands in ``node`` at ``index``."""
        key = (node, index)
        if key not in self._values:
            self._depth += 1
            try:
                self._values[key] = self._read(node, index)
            except Unread:
                self._values[key] = self.leaf(node, index)
            finally:
                self._depth -= 1
        return self._values[key]

    def leaf(self, node: fx.Node, index: Index, key: object = None) -> Value:
        """The symbol for ``node`` at ``index``, or for ``key`` where that says the same of several nodes."""
        symbol = self._symbols.setdefault(key or (node, index), sympy.Dummy(node.name, integer=True))
        self.leaves.setdefault(symbol, Leaf(node, index))
        return Holds(symbol) if dtype_of(node) is torch.bool else symbol

    def operand(self, arg: object, index: Index) -> tuple[Value, torch.dtype | None]:
        """What an elementwise op reads from one argument for the element at ``index``, and its dtype (None: a scalar)."""
        if is_tensor(arg):
            assert isinstance(arg, fx.Node)
            return self.value(arg, views.broadcast(shape_of(arg), index)), dtype_of(arg)
        if isinstance(arg, bool | int | float):
            return number(arg), None
        return size(arg), None

    # ------------------------------------------------------------------ one node

    def _read(self, node: fx.Node, index: Index) -> Value:
        if self._depth > DEEPEST:
            raise Unread("too far from the sources")
        described = self._known(node)
        if described is not None:
            self.used.add(node)
            return sources.described(described, index, dtype_of(node), self.box)
        call = call_of(node)
        if call is None:
            raise Unread("no operator")
        moved = views.pull_back(call, self.box, index)
        if moved is not None:
            return self.value(*moved)
        rule = RULES.get(call.op)
        if rule is not None:
            try:
                return rule(self, call, index)
            except Unread:
                return self._structural(call, index)
        return self._structural(call, index)

    def _structural(self, call: Call, index: Index) -> Value:
        """A leaf that equals every other application of the same elementwise op to the same operands."""
        target: Any = call.node.target
        tags = target.tags
        if torch.Tag.pointwise not in tags or torch.Tag.nondeterministic_seeded in tags:
            raise Unread("not elementwise")
        if dtype_of(call.node).is_floating_point:
            raise Unread("floating-point values that are only known at run time")
        key: list[object] = [target, dtype_of(call.node)]
        for arg in call.args:
            if is_tensor(arg) or isinstance(arg, fx.Node):
                key.append(self.operand(arg, index))
            elif isinstance(arg, bool | int | float | str | None):
                key.append((type(arg), arg))
            else:
                key.append(str(arg))
        return self.leaf(call.node, index, tuple(key))


# ------------------------------------------------------------------ rules: (reader, call, index) -> value


def _converted(reader: Reader, arg: object, index: Index, dtype: torch.dtype) -> Value:
    """An operand in the dtype in which the op computes. A scalar has no dtype of its own."""
    value, own = reader.operand(arg, index)
    if own is not None:
        return pointwise.cast(value, own, dtype, reader.box)
    known = pointwise.constant(value)
    if known is not None:
        return number(torch.tensor(known, dtype=torch.float64 if isinstance(known, float) else None).to(dtype).item())
    if not reader.box.fits(value, dtype):
        raise Unread("a size does not fit the dtype")
    return value


def _arithmetic(reader: Reader, call: Call, index: Index) -> Value:
    op, dtype = call.op, dtype_of(call.node)
    alpha = number(call.get("alpha")) if call.get("alpha") is not None else sympy.Integer(1)
    a, b = (_converted(reader, call.args[n], index, dtype) for n in (0, 1))

    def one(x: Value, y: Value) -> Value:
        if pointwise.constant(x) is not None and pointwise.constant(y) is not None:
            return _fold_converted(call, x, y, dtype)
        return pointwise.arithmetic(op, x, y, alpha, dtype, reader.box)

    return pointwise.each(one, a, b)


def _fold_converted(call: Call, x: Value, y: Value, dtype: torch.dtype) -> Value:
    """Run a binary op on constants that are already in the dtype in which it computes."""
    operands = [torch.tensor(pointwise.constant(v), dtype=dtype) for v in (x, y)]
    scaled = {"alpha": call.get("alpha")} if call.get("alpha") not in (None, 1) else {}
    op: Any = {aten.add: torch.add, aten.sub: torch.sub, aten.rsub: torch.rsub, aten.mul: torch.mul}[call.op]
    return number(op(*operands, **scaled).item())


def _compare(reader: Reader, call: Call, index: Index) -> Value:
    (a, first), (b, second) = (reader.operand(call.args[n], index) for n in (0, 1))
    common = torch.result_type(*(_sample(call.args[n]) for n in (0, 1)))
    if first is None or second is None:
        a, b = (_converted(reader, call.args[n], index, common) for n in (0, 1))
        first = second = common
    return pointwise.compare(call.op, (a, b), (first, second), common, reader.box)


def _sample(arg: object) -> Any:
    """Something that promotes as ``arg`` does: an empty tensor of its dtype, 0-dimensional where it is, or the scalar."""
    if is_tensor(arg):
        assert isinstance(arg, fx.Node)
        return torch.empty([0] if arg.meta["val"].dim() else [], dtype=dtype_of(arg), device="cpu")
    return arg if isinstance(arg, bool | int | float) else 1


def _logic(reader: Reader, call: Call, index: Index) -> Value:
    values = []
    for arg in call.args:
        value, dtype = reader.operand(arg, index)
        if dtype is not torch.bool and (dtype is None or "logical" not in str(call.op)):
            raise Unread("bits of integers")
        values.append(pointwise.cast(value, dtype, torch.bool, reader.box))
    return pointwise.logic(call.op, values)


def _where(reader: Reader, call: Call, index: Index) -> Value:
    condition, kind = reader.operand(call.args[0], index)
    assert kind is not None
    holds = pointwise.formula(pointwise.cast(condition, kind, torch.bool, reader.box))
    dtype = dtype_of(call.node)
    return choose(holds, *(_converted(reader, call.args[n], index, dtype) for n in (1, 2)))


def _masked_fill(reader: Reader, call: Call, index: Index) -> Value:
    holds = pointwise.formula(reader.operand(call.args[1], index)[0])
    dtype = dtype_of(call.node)
    kept, filled = (_converted(reader, call.args[n], index, dtype) for n in (0, 2))
    return choose(holds, filled, kept)


def _convert(reader: Reader, call: Call, index: Index) -> Value:
    value, dtype = reader.operand(call.args[0], index)
    assert dtype is not None
    return pointwise.cast(value, dtype, dtype_of(call.node), reader.box)


def _copy(reader: Reader, call: Call, index: Index) -> Value:
    return _converted(reader, call.args[1], index, dtype_of(call.node))


def _fold(reader: Reader, call: Call, index: Index) -> Value:
    names = [name for name, arg in zip(call.names, call.args, strict=True) if is_tensor(arg)]
    operands = [reader.operand(call.get(name), index)[0] for name in names]
    return pointwise.each(lambda *values: pointwise.fold(call, dict(zip(names, values, strict=True))), *operands)


def _negative(reader: Reader, call: Call, index: Index) -> Value:
    """``-x``, and ``|x|``, of a closed integer in its own dtype."""
    try:
        return _fold(reader, call, index)
    except Unread:
        dtype = dtype_of(call.node)
        value = _converted(reader, call.args[0], index, dtype)
        zero = sympy.Integer(0)

        def minus(v: Value) -> Value:
            return pointwise.arithmetic(aten.sub, zero, v, sympy.Integer(1), dtype, reader.box)

        if call.op is aten.neg:
            return pointwise.each(minus, value)
        return pointwise.each(lambda v: pointwise.extremum(True, v, minus(v), reader.box), value)


def _extremum(reader: Reader, call: Call, index: Index) -> Value:
    try:
        return _fold(reader, call, index)
    except Unread:
        a, b = (_converted(reader, call.args[n], index, dtype_of(call.node)) for n in (0, 1))
        largest = pointwise.EXTREMA[call.op]
        return pointwise.each(lambda x, y: pointwise.extremum(largest, x, y, reader.box), a, b)


def _cumsum(reader: Reader, call: Call, index: Index) -> Value:
    """``sum over t <= k of x[t]``: (k + 1) x for a constant; a leaf that numbers runs, see `runs`."""
    source = call.node_arg(0)
    dim, dtype = call.args[1] % len(index), dtype_of(call.node)
    at = reader.box.position("t", shape_of(source)[dim])
    summand = reader.value(source, (*index[:dim], at, *index[dim + 1 :]))
    kind = dtype_of(source)
    try:
        each_one = pointwise.cast(summand, kind, dtype, reader.box)
        known = pointwise.constant(each_one)
        if known is not None and known == int(known):
            total = sympy.expand(int(known) * (index[dim] + 1))
            if reader.box.fits(total, dtype):
                return total
    except (Unread, OverflowError, ValueError):
        pass
    leaf = reader.leaf(call.node, index)
    if kind is torch.bool and not isinstance(leaf, Holds):
        run = run_of(summand, at, index[dim], reader)
        if run is not None:
            reader.runs[leaf] = run
    return leaf


RULES: Mapping[Any, Callable[[Reader, Call, Index], Value]] = {
    **dict.fromkeys(pointwise.FOLDED, _fold),
    **dict.fromkeys(pointwise.ARITHMETIC, _arithmetic),
    **dict.fromkeys(pointwise.EXTREMA, _extremum),
    **dict.fromkeys(pointwise.COMPARISONS, _compare),
    **dict.fromkeys(pointwise.LOGIC, _logic),
    aten.neg: _negative,
    aten.abs: _negative,
    aten.where: _where,
    aten.masked_fill: _masked_fill,
    aten._to_copy: _convert,
    aten.to: _convert,
    aten.type_as: _convert,
    aten.copy: _copy,
    aten.cumsum: _cumsum,
    **sources.RULES,
}
