"""Reads of some rows of a value: ``x[:, a:b]``, ``x.chunk(2)``, ``x[mask]``, ``x[i, j]``, ``x.gather(1, i)``.

Of a gather the rows must be equal along all other dimensions.

A selection replaces the dimensions ``first ... first + count`` of a value by what it took of them, and leaves all
others as they are. So of every f that treats these rows one by one, select(f(x)) = f(select(x)).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from mstc.graph.axes import Axes, Axis
from mstc.graph.costs import is_heavy
from mstc.graph.editor import Editor
from mstc.graph.places import Place
from mstc.graph.reach import ancestors
from mstc.graph.rules.call import Call
from mstc.graph.rules.pointwise import is_pointwise
from mstc.graph.sizes import Size, product, quotient, same, shape_of, size
from mstc.report import Refusal

aten = torch.ops.aten

_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)


@dataclass(frozen=True)
class Selection:
    """``node`` reads rows of ``value``, which stand in ``count`` dimensions from ``first`` on.

    target: the op that reads them so, for a piece of a split a slice; given: its arguments that say which, as values
    that can be compared.
    """

    node: fx.Node
    value: fx.Node
    first: int
    count: int
    target: Any
    given: tuple[Any, ...]

    @property
    def reader(self) -> fx.Node:
        """The node that reads ``value``: of a piece, the split."""
        return self.node.all_input_nodes[0] if self.node.target is operator.getitem else self.node

    @property
    def before(self) -> tuple[Size, ...]:
        """The sizes of the dimensions that are read from."""
        return shape_of(self.value.meta["val"])[self.first : self.first + self.count]

    @property
    def lengths(self) -> tuple[Any, ...]:
        """The lengths of what is taken of them: ints and SymInts."""
        taken = self.node.meta["val"].shape
        return tuple(taken[self.first : len(taken) - self.value.meta["val"].dim() + self.first + self.count])

    @property
    def taken(self) -> tuple[Size, ...]:
        """The same as sizes."""
        return tuple(map(size, self.lengths))

    def alike(self) -> tuple[Any, ...]:
        """Equal for selections that take the same rows of values of the same rows."""
        return (self.target, self.first, self.before, self.given)


def selections_of(reader: fx.Node, value: fx.Node) -> Iterator[Selection]:
    """How the node selects rows of ``value``: once, or piece by piece; nothing where it does anything else."""
    if reader.op != "call_function" or reader.args[0] is not value or reader.all_input_nodes.count(value) != 1:
        return
    if reader.target in _SPLITS:
        yield from _pieces(reader, value)
    elif (found := _selection_of(reader, value)) is not None:
        yield found


def _selection_of(node: fx.Node, value: fx.Node) -> Selection | None:
    if node.target in (aten.slice.Tensor, aten.select.int, aten.index_select.default):
        return Selection(node, value, Call(node).dim(), 1, node.target, _hashable(node.args[2:]))
    if node.target is aten.index.Tensor:
        return _indexed(node, value)
    return _gathered(node, value) if node.target is aten.gather.default else None


def _pieces(split: fx.Node, value: fx.Node) -> Iterator[Selection]:
    """The i-th piece of a split is the slice behind the pieces before it."""
    dim = Call(split).dim()
    lengths = [piece.shape[dim] for piece in split.meta["val"]]
    if not all(isinstance(n, int) for n in lengths):
        return
    for node in split.users:
        piece: Any = node.args[1]
        start = sum(lengths[:piece])
        yield Selection(node, value, dim, 1, aten.slice.Tensor, (start, start + lengths[piece]))


def _indexed(node: fx.Node, value: fx.Node) -> Selection | None:
    """By one mask, or by positions in adjacent dimensions."""
    given: Sequence[Any] = node.args[1]  # type: ignore[assignment]
    used = [i for i, g in enumerate(given) if g is not None]
    masks = [given[i].meta["val"] for i in used if given[i].meta["val"].dtype in (torch.bool, torch.uint8)]
    if not used or used != list(range(used[0], used[-1] + 1)) or (masks and len(used) > 1):
        return None
    count = masks[0].dim() if masks else len(used)
    return Selection(node, value, used[0], count, node.target, _hashable(given)) if count else None


def _gathered(node: fx.Node, value: fx.Node) -> Selection | None:
    """By positions that are the same for whole rows: ``x.gather(1, i[:, :, None].expand(-1, -1, V))``."""
    call = Call(node)
    dim, index = call.dim(), node.args[2]
    shape = call.shape(0)
    assert isinstance(index, fx.Node)
    if len(call.shape(1)) != len(shape):
        return None
    rows = [d for d in range(len(shape)) if d == dim or not _constant_along(index, d)]
    others = [d for d in range(len(shape)) if d != dim]
    if any(not same(shape[d], call.shape(1)[d]) for d in others) or len(rows) == len(shape):
        return None
    if rows != list(range(rows[0], rows[-1] + 1)):
        return None
    return Selection(node, value, rows[0], len(rows), node.target, (dim, index))


def _constant_along(node: fx.Node, dim: int) -> bool:
    """Whether every index of the dimension holds the same values, as far as the graph tells."""
    shape = shape_of(node.meta["val"])
    if same(shape[dim], 1):
        return True
    if node.target is aten.repeat.default:
        source = shape_of(node.args[0].meta["val"])  # type: ignore[union-attr]
        behind = dim - (len(shape) - len(source))
        return behind < 0 or same(source[behind], 1)
    if node.target is not aten.expand.default and not is_pointwise(node.target):
        return False
    for operand in Call(node).operands:
        behind = dim - (len(shape) - len(shape_of(operand.meta["val"])))
        if behind >= 0 and not _constant_along(operand, behind):
            return False
    return True


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value


# -- rows and the axes they are made of ----------------------------------------------------------------


def row_axes(axes: Axes, selection: Selection) -> tuple[Axis, ...] | None:
    """The axes that the selected dimensions are made of, slowest first; None where they are not made of axes alone."""
    value, found = selection.value, []
    shape = shape_of(value.meta["val"])
    for dim in range(selection.first, selection.first + selection.count):
        standing = [(a, p) for a in sorted(axes.of(value)) for p in axes.places(value, a) if p.dim == dim]
        outer: Size = 1
        while not same(outer, shape[dim]):
            following = [(a, p) for a, p in standing if same(p.outer, outer) and not same(p.n, 1)]
            if len(following) != 1 or len(axes.places(value, following[0][0])) != 1:
                return None
            found.append(following[0][0])
            outer = outer * following[0][1].n
    return tuple(found)


@dataclass(frozen=True)
class Rows:
    """Where the rows stand in one value: a place for each of their axes, slowest first, next to each other."""

    shape: tuple[Size, ...]
    places: tuple[Place, ...]

    @property
    def ahead(self) -> Size:
        """How many combinations of slower factors there are."""
        return product(self.shape[: self.places[0].dim]) * self.places[0].outer

    @property
    def stride(self) -> Size:
        """How many elements a row has that stand together."""
        return product(self.shape[self.places[-1].dim + 1 :]) * self.places[-1].inner

    @property
    def adjacent(self) -> bool:
        """Whether the axes' factors follow one another in the value's elements."""
        ahead = [product(self.shape[: p.dim]) * p.outer for p in self.places]
        return all(same(a * p.n, b) for a, p, b in zip(ahead[:-1], self.places[:-1], ahead[1:], strict=True))

    def resized(self, length: Size) -> tuple[Size, ...]:
        """The value's shape with ``length`` rows: along their fastest axis, the others have length 1."""
        shape = list(self.shape)
        for place, n in zip(self.places, [*[1] * (len(self.places) - 1), length], strict=True):
            shape[place.dim] = quotient(shape[place.dim], place.n) * n
        return tuple(shape)


def select(editor: Editor, selection: Selection, x: fx.Node, rows: Rows) -> fx.Node:
    """The selected rows of ``x``, in which they stand as ``rows`` tells; as `Rows.resized` shapes them."""
    cut = selection.node
    first = rows.places[0].dim
    whole = rows.shape[first : first + selection.count]
    # Where the dimensions that are read from stand as such in x too, they are read there; else x is viewed so.
    stand = len(whole) == selection.count and all(map(same, whole, selection.before))
    if not (stand and same(product(rows.shape[:first]), rows.ahead)):
        x = reshape(editor, x, (rows.ahead, *selection.before, rows.stride), cut)
        first = 1
    taken = _read(editor, selection, x, first)
    return reshape(editor, taken, rows.resized(product(selection.taken)), cut)


def _read(editor: Editor, selection: Selection, x: fx.Node, first: int) -> fx.Node:
    """The same read from the dimensions ``first ...`` of x."""
    cut = selection.node
    if selection.target is aten.index.Tensor:
        used = [g for g in cut.args[1] if g is not None]  # type: ignore[union-attr]
        behind = x.meta["val"].shape[first + selection.count :]
        shape = (*x.meta["val"].shape[:first], *selection.lengths, *behind)
        return editor.call(selection.target, (x, [*[None] * first, *used]), like=cut, shape=shape)
    if selection.target is not aten.gather.default:
        return editor.call(selection.target, (x, first, *selection.given), like=cut)
    dim = Call(cut).dim() - selection.first + first
    return editor.call(selection.target, (x, dim, _positions(editor, selection, x, first)), like=cut)


def _positions(editor: Editor, selection: Selection, x: fx.Node, first: int) -> fx.Node:
    """The positions of a gather, for dimensions ``first ...`` of x: one for each row, repeated along all else."""
    cut = selection.node
    index = cut.args[2]
    assert isinstance(index, fx.Node)
    for d in range(index.meta["val"].dim()):
        if not selection.first <= d < selection.first + selection.count:
            index = editor.call(aten.slice.Tensor, (index, d, 0, 1), like=cut)
    shape = shape_of(x.meta["val"])
    ahead, behind = shape[:first], shape[first + selection.count :]
    index = reshape(editor, index, [*[1] * len(ahead), *selection.taken, *[1] * len(behind)], cut)
    repeated = [editor.number(n, like=cut) for n in (*ahead, *selection.taken, *behind)]
    return editor.call(aten.expand.default, (index, repeated), like=cut)


def reshape(editor: Editor, x: fx.Node, shape: Sequence[Size], like: fx.Node) -> fx.Node:
    """``x`` in another shape; itself where it has that."""
    held = shape_of(x.meta["val"])
    if len(held) == len(shape) and all(map(same, held, shape)):
        return x
    return editor.call(aten.reshape.default, (x, [editor.number(s, like=like) for s in shape]), like=like)


def about_logits(graph: fx.Graph, refusals: Sequence[Refusal]) -> list[Refusal]:
    """The refusals that matter: what a matrix product is made of later on is a slice in the trunk, of no logits."""
    if not refusals:
        return []
    trunk = {n.name for n in ancestors(filter(is_heavy, graph.nodes))}
    return [r for r in refusals if r.node not in trunk]
