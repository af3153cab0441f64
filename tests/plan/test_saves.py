"""What is worth saving inside a region: minimum cuts, and the loops that read what they saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mstc.graph.regions import Region
from mstc.ops.build import Recipe, build
from mstc.ops.program import Program
from mstc.plan.saves import levels_of, saving
from testkit.capture import node, randn, regions_of

aten = torch.ops.aten
TOKENS, WIDTH, INNER = 8, 6, 20
GATE, UP, DOWN = randn(INNER, WIDTH), randn(INNER, WIDTH), randn(WIDTH, INNER)
PRODUCT = 2.0 * 2 * TOKENS * WIDTH * INNER  # FLOPs


def _recipe(region: Region) -> Recipe:
    return Recipe(2, 0, True, tuple(True for _ in region.outputs), False, "float32", "draft", "test")


def _no_compiler(gm: Any, inputs: Any) -> Any:
    return None


def _program(region: Region, level: tuple[int, ...] = ()) -> Program:
    values = [region.nodes[i] for i in level]
    return build(*saving(region, _recipe(region), values), _no_compiler)


def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    x = x + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    return F.scaled_dot_product_attention(x, x, x)


def _gated() -> tuple[Any, Region]:
    graph, _, (region,) = regions_of(gated, randn(2, TOKENS, WIDTH), GATE, UP, DOWN)
    return graph, region


def test_a_gated_mlp_saves_both_products_and_nothing_that_follows_from_them() -> None:
    graph, region = _gated()
    (level,) = levels_of(region, _recipe(region))
    saved = {region.nodes[i] for i in level}
    assert saved == {node(graph, aten.linear.default, 0), node(graph, aten.linear.default, 1)}


def test_the_backward_repeats_no_product_that_was_saved() -> None:
    _, region = _gated()
    (level,) = levels_of(region, _recipe(region))

    without, with_saved = _program(region), _program(region, level)
    assert without.flops() == (3 * PRODUCT, (2 + 6) * PRODUCT)
    assert with_saved.flops() == (3 * PRODUCT, 6 * PRODUCT)
    assert with_saved.backward is not None and len(with_saved.backward.kept) == len(level)


def test_halves_of_one_product_are_saved_as_one_value() -> None:
    def fused(x: Tensor, both: Tensor, down: Tensor) -> Tensor:
        gate, up = F.linear(x, both).chunk(2, dim=-1)
        x = x + F.linear(F.gelu(gate) * up, down)
        return F.scaled_dot_product_attention(x, x, x)

    _, _, (region,) = regions_of(fused, randn(2, TOKENS, WIDTH), randn(2 * INNER, WIDTH), DOWN)
    (level,) = levels_of(region, _recipe(region))
    program = _program(region, level)
    assert sum(v.nbytes for v in program.outputs[-len(level) :]) == GATE.itemsize * 2 * TOKENS * 2 * INNER
    assert program.flops()[1] == 6 * PRODUCT


def test_what_costs_fewest_bytes_for_its_flops_is_saved_first() -> None:
    def narrow_first(x: Tensor, a: Tensor, b: Tensor, down: Tensor) -> Tensor:
        y = F.silu(F.linear(x, a))  # many FLOPs for few bytes
        x = x[..., :WIDTH] + F.linear(F.silu(F.linear(y, b)), down)
        return F.scaled_dot_product_attention(x, x, x)

    wide = 50
    graph, _, (region,) = regions_of(
        narrow_first, randn(2, TOKENS, wide), randn(4, wide), randn(INNER, 4), randn(WIDTH, INNER)
    )
    few, more = levels_of(region, _recipe(region))
    assert [region.nodes[i] for i in few] == [node(graph, aten.linear.default, 0)]
    assert set(few) < set(more) and len(more) == 2
    spent = [_program(region, level).flops()[1] for level in ((), few, more)]
    assert spent[0] > spent[1] > spent[2]


def test_nothing_is_saved_where_the_backward_repeats_no_product() -> None:
    _, _, (region,) = regions_of(
        lambda x, w: F.scaled_dot_product_attention(*[F.linear(x, w)] * 3), randn(2, TOKENS, WIDTH), randn(WIDTH, WIDTH)
    )
    assert levels_of(region, _recipe(region)) == ()
