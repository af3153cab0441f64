"""Every axis rule, whole against pieces.

For a random call and every factor of every dimension of its result, run the op on pieces of the operands, cut where the
rule's ``back`` says, through the same body that a loop would run: the results must be the pieces of the whole result.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.fx as fx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mstc.graph.axes import Tokenwise
from mstc.graph.places import Flow, Lost, Place
from mstc.graph.regions import Region
from mstc.graph.rules import TABLE, flow_of
from mstc.graph.rules.call import operands_of
from mstc.graph.rules.pointwise import is_pointwise
from mstc.ops.body import LENGTH, cut_of, forward_body
from mstc.ops.pieces import balanced
from testkit.op_cases import CASES
from testkit.pick import Pick

aten = torch.ops.aten

# Their results hold nothing that could be compared.
UNDEFINED = (aten.empty_like.default, aten.new_empty.default)
# Nothing survives these, whatever the arguments.
CARRY_NOTHING = (
    aten.sum.default, aten.mean.default, aten.max.default, aten.min.default, aten.var.default, aten.norm.Scalar,
)  # fmt: skip


def node_of(target: Any, args: Any, kwargs: dict[str, Any]) -> fx.Node | None:
    """One call in a graph of its own, with real values; None where the op refuses these arguments."""
    graph = fx.Graph()

    def operand(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(f"x{len(graph.nodes)}")
        node.meta["val"] = value
        return node

    mapped = torch.utils._pytree.tree_map_only(Tensor, operand, (args, kwargs))
    try:
        value = target(*args, **kwargs)
    except (RuntimeError, IndexError):
        return None
    node = graph.call_function(target, *mapped)
    node.meta["val"] = value
    return node


def results_of(node: fx.Node) -> list[fx.Node]:
    """The node, or the items of a node with several results."""
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return [node]
    items = []
    for i, part in enumerate(value):
        item = node.graph.call_function(operator.getitem, (node, i))
        item.meta["val"] = part
        items.append(item)
    return items


def places_in(shape: torch.Size) -> Iterator[Place]:
    """Every factor n > 1 of every dimension."""
    for dim, extent in enumerate(shape):
        for n in range(2, extent + 1):
            for outer in range(1, extent // n + 1):
                if extent % (n * outer) == 0:
                    yield Place(dim, n, outer, extent // n // outer)


def region_of(node: fx.Node, items: list[fx.Node], place: Place, needs: tuple[Place | None, ...]) -> Region:
    proofs = {node: Tokenwise(place, needs), **{i: Tokenwise(place, (place,)) for i in items if i is not node}}
    operands = operands_of(node)
    tokens = dict.fromkeys((o, need) for o, need in zip(operands, needs, strict=True) if need is not None)
    shared = dict.fromkeys(o for o, need in zip(operands, needs, strict=True) if need is None)
    outputs = tuple((i, place) for i in items)
    return Region(0, place.n, tuple(proofs), (), tuple(tokens), tuple(shared), outputs, proofs)  # type: ignore[arg-type]


def run_in_pieces(region: Region, place: Place, count: int) -> list[Tensor]:
    """The outputs of a region's body, run chunk by chunk and joined."""
    n = int(place.n)
    outputs = [torch.full_like(i.meta["val"], 77) for i, _ in region.outputs]
    for start, length in balanced(n, count):
        pieces = [cut_of(p).read(o.meta["val"], n, start, length).contiguous() for o, p in region.tokens]
        found = forward_body(region, {LENGTH: length})(*pieces, *(s.meta["val"] for s in region.shared))
        for out, piece in zip(outputs, found, strict=True):
            assert piece.shape == cut_of(place).shape(out.shape, length), "a piece has another shape than its place"
            cut_of(place).write(out, n, start, length, piece)
    return outputs


def check_results(node: fx.Node, flow: Flow, count: int) -> int:
    """Run every place of the results that the rule carries in pieces; how many those are."""
    items, carried = results_of(node), 0
    for place in places_in(items[0].meta["val"].shape):
        needs = tuple(flow.back(i, place) for i in range(len(operands_of(node))))
        if not any(needs) and not flow.repeats:
            continue  # `Axes.tokenwise` refuses these
        fitting = [i for i in items if i.meta["val"].shape == items[0].meta["val"].shape]
        found = run_in_pieces(region_of(node, fitting, place, needs), place, min(count, int(place.n)))
        carried += 1
        if node.target not in UNDEFINED:
            for item, got in zip(fitting, found, strict=True):
                torch.testing.assert_close(
                    got, item.meta["val"], rtol=1e-12, atol=1e-12, equal_nan=True, msg=str(place)
                )
    return carried


def check_operands(node: fx.Node, flow: Flow) -> None:
    """``carry`` and ``back`` agree, and a sum over an axis is the sum of its pieces' sums."""
    for i, operand in enumerate(operands_of(node)):
        for place in places_in(operand.meta["val"].shape):
            carried = flow.carry(i, place)
            if isinstance(carried, Place):
                assert flow.back(i, carried) in (place, None)
            elif carried is Lost.SUMMED:
                assert len(operands_of(node)) == 1
                n, value = int(place.n), operand.meta["val"]
                parts = [cut_of(place).read(value, n, *chunk) for chunk in balanced(n, 2)]
                total = sum(node.target(part, *node.args[1:], **node.kwargs) for part in parts)  # type: ignore[operator]
                torch.testing.assert_close(total, node.meta["val"], rtol=1e-12, atol=1e-12)


def test_every_op_of_the_table_has_cases() -> None:
    assert set(CASES) == set(TABLE)


@pytest.mark.parametrize("target", list(TABLE), ids=str)
def test_whole_against_pieces(target: Any) -> None:
    carried = []

    @settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data: st.DataObject) -> None:
        drawn = CASES[target](Pick(data.draw))
        args, kwargs = drawn if len(drawn) == 2 and isinstance(drawn[1], dict) else (drawn, {})
        node = node_of(target, args, kwargs)
        if node is None:
            return
        flow = flow_of(node)
        if flow is not None:
            check_operands(node, flow)
            carried.append(check_results(node, flow, data.draw(st.integers(2, 6))))

    check()
    assert bool(sum(carried)) == (target not in CARRY_NOTHING), "no example was carried, so nothing was tested"


def _simple_arguments(target: Any, generator: torch.Generator) -> list[Any] | None:
    """Tensors and numbers for an op that takes nothing else, else None."""
    args: list[Any] = []
    rank = 0
    for declared in target._schema.arguments:
        kind = str(declared.type)
        if kind == "Tensor":
            shape = [(4, 6), (6,), (4, 1)][rank % 3]
            args.append(torch.rand(shape, dtype=torch.float64, generator=generator) + 0.25)
            rank += 1
        elif declared.has_default_value():
            break
        elif kind in ("number", "float"):
            args.append(2.0)
        elif kind == "int":
            args.append(2)
        else:
            return None
    return args


def _tagged() -> list[Any]:
    found = []
    for name in dir(aten):
        packet = getattr(aten, name)
        if not hasattr(packet, "overloads"):
            continue
        ops = [getattr(packet, overload) for overload in packet.overloads()]
        found += [op for op in ops if is_pointwise(op) and op not in TABLE]
    return found


def test_ops_that_pytorch_tags_pointwise_are() -> None:
    generator = torch.Generator().manual_seed(0)
    tested = 0
    for target in _tagged():
        args = _simple_arguments(target, generator)
        node = node_of(target, tuple(args), {}) if args is not None else None
        if node is None or not isinstance(node.meta["val"], Tensor):
            continue
        flow = flow_of(node)
        if flow is not None:
            tested += bool(check_results(node, flow, 3))
    assert tested > 120
