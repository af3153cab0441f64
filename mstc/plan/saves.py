"""Which values inside a region are worth saving for its backward, which otherwise computes them again.

On the joint graph of a body and its vector-Jacobian product, for a price of lambda bytes per FLOP, a minimum cut finds

    minimize over sets V of values   sum_{v in V} bytes(v) + lambda * sum FLOPs of the products computed again,

where a product is computed again if the backward reads anything made of it that does not follow from V and the
inputs. As lambda grows the cuts save more and repeat less: these are the levels that a plan chooses from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import networkx as nx
import torch
import torch.fx as fx

from mstc.graph.costs import matmul_flops, nbytes
from mstc.graph.reach import descendants
from mstc.graph.regions import Region
from mstc.ops.build import Recipe, joint_of
from mstc.ops.joint import Joint

Levels = tuple[tuple[int, ...], ...]

MOST_LEVELS = 3


def saving(region: Region, recipe: Recipe, values: Sequence[fx.Node]) -> tuple[Region, Recipe]:
    """The region with these of its values as further outputs, which only the backward reads."""
    outputs = (*region.outputs, *((n, region.proofs[n].place) for n in values))
    kept = (*recipe.kept, *(True for _ in values))
    return replace(region, outputs=outputs), replace(recipe, kept=kept, saves=len(values))


def levels_of(region: Region, recipe: Recipe) -> Levels:
    """Sets of values to save, by their positions in ``region.nodes``, from few bytes to no product computed again."""
    returned = {n for n, _ in region.outputs}
    inner = [n for n in region.nodes if n not in returned and isinstance(n.meta.get("val"), torch.Tensor)]
    joint = joint_of(*saving(region, recipe, inner))
    if joint is None:
        return ()
    kept = {n for (n, _), keep in zip(region.outputs, recipe.kept, strict=True) if keep}
    images: dict[fx.Node, fx.Node] = {}
    names = [*(n for n, _ in region.outputs), *inner]
    for node, image in zip(names, joint.results, strict=False):
        if node in kept or node not in returned:
            images.setdefault(image, node)
    free = {image for image, node in images.items() if node in kept}
    positions = {n: i for i, n in enumerate(region.nodes)}
    found: dict[tuple[int, ...], None] = {}
    for price in _prices(joint):
        chosen = _cut(joint, set(images), free, price) - free
        found[tuple(sorted(positions[images[c]] for c in chosen))] = None
    return tuple(level for level in found if level)[-MOST_LEVELS:]


def _prices(joint: Joint) -> Iterator[float]:
    """Bytes per FLOP at which one more product is worth its own bytes, from low to high; then at any price."""
    products = [n for n in joint.gm.graph.nodes if matmul_flops(n)]
    worth = sorted({nbytes(n) / matmul_flops(n) for n in products})
    yield from (w * 1.001 for w in worth)
    if worth:
        yield worth[-1] * 1e3


def _cut(joint: Joint, savable: set[fx.Node], free: set[fx.Node], price: float) -> set[fx.Node]:
    """The values to save at a price: those through which products reach the backward."""
    later = _after(joint)
    graph = nx.DiGraph()
    for node in joint.gm.graph.nodes:
        if node in later or node.op != "call_function":
            continue
        if node in savable:
            graph.add_edge((node, 0), (node, 1), capacity=0.0 if node in free else float(nbytes(node)))
        else:
            graph.add_edge((node, 0), (node, 1))
        for i in node.all_input_nodes:
            graph.add_edge((i, 1), (node, 0))
        if matmul_flops(node):
            graph.add_edge("products", (node, 0), capacity=price * matmul_flops(node))
        if any(u in later for u in node.users) or _is_factor(node, joint):
            graph.add_edge((node, 1), "backward")
    if "products" not in graph or "backward" not in graph:
        return set()
    _, (before, after) = nx.minimum_cut(graph, "products", "backward")
    return {n for n in savable if (n, 0) in before and (n, 1) in after}


def _after(joint: Joint) -> set[fx.Node]:
    """What depends on a gradient of the results: it can run in the backward only."""
    gradients = joint.cotangents.values()
    return descendants(gradients, {*gradients, *(n for n in joint.gm.graph.nodes if n.op == "call_function")})


def _is_factor(node: fx.Node, joint: Joint) -> bool:
    return any(p.x is node and p.dy is not None for p in joint.products)
