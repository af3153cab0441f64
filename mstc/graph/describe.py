"""The report's list of what a graph consists of: loops, regions left whole, and mixers, in order."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx

from mstc.graph.labels import attention_label, region_label
from mstc.graph.provenance import layer_of, module_of, source_of
from mstc.graph.regions import Region
from mstc.report import RegionInfo

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def describe(
    gm: fx.GraphModule, regions: Iterable[Region], loops: Mapping[fx.Node, RegionInfo], masks: Mapping[fx.Node, Any]
) -> list[RegionInfo]:
    """One record per loop, per region left whole and per attention, in the order of the graph.

    regions: those left whole; loops: records of the loop nodes; masks: what is known of an attention's mask.
    """
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    found: list[tuple[int, RegionInfo]] = [
        (order[n], replace(info, nodes=(n.name, *(u.name for u in n.users if u.target is operator.getitem))))
        for n, info in loops.items()
        if n in order
    ]
    found += [
        (order[node], _mixer(node, attention_label(node, getattr(masks.get(node), "label", ""))))
        for node in gm.graph.find_nodes(op="call_function", target=_ATTENTION)
    ]
    found += [(order[r.nodes[0]], region_info(r)) for r in regions]
    return [info for _, info in sorted(found, key=lambda pair: pair[0])]


def _mixer(node: fx.Node, label: str) -> RegionInfo:
    tokens = str(node.meta["val"].shape[-2])
    layer, module, source = layer_of(node), module_of(node), source_of(node)
    return RegionInfo("mixer", label, layer, module, source, tokens, ops=1, nodes=(node.name,))


def region_info(region: Region) -> RegionInfo:
    """A region that is left whole."""
    heavy = region.heavy or region.nodes[-1:]
    modules = [module_of(n) for n in heavy if module_of(n)]
    return RegionInfo(
        "region",
        region_label(region),
        _layer(heavy),
        " .. ".join(dict.fromkeys(modules[:1] + modules[-1:])),
        source_of(heavy[0]),
        str(region.n),
        ops=len(region.nodes) + len(region.sums),
        nodes=tuple(n.name for n in (*region.nodes, *region.sums)),
    )


def _layer(heavy: tuple[fx.Node, ...]) -> int | None:
    return next((layer for n in heavy if (layer := layer_of(n)) is not None), None)
