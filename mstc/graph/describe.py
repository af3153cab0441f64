"""The report's list of what a graph consists of: loops, regions left whole, and mixers, in order."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.fx as fx

from mstc.graph.attention import attention_in
from mstc.graph.labels import attention_label, is_count, is_grouped, region_label
from mstc.graph.predicates.reader import Known
from mstc.graph.provenance import layer_of, module_of, source_of
from mstc.graph.regions import Region
from mstc.graph.rules.call import operands_of
from mstc.graph.written import find_written
from mstc.graph.written_masks import MaskLabels
from mstc.report import RegionInfo


def describe(
    gm: fx.GraphModule,
    regions: Iterable[Region],
    loops: Mapping[fx.Node, RegionInfo],
    masks: Mapping[fx.Node, Any],
    known: Known,
) -> list[RegionInfo]:
    """One record per loop, per region left whole, per attention and per block of experts, in the order of the graph.

    regions: those left whole; loops: records of the loop nodes; masks: what is known of an attention's mask;
    known: what constants hold.
    """
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    found: list[tuple[int, RegionInfo]] = [
        (order[n], replace(info, nodes=(n.name, *(u.name for u in n.users if u.target is operator.getitem))))
        for n, info in loops.items()
        if n in order
    ]
    found += [
        (order[node], _mixer(attention_label(node, getattr(masks.get(node), "label", "")), [node]))
        for node in attention_in(gm.graph)
    ]
    regions, labels = list(regions), MaskLabels(known)
    claimed = {n for r in regions for n in r.nodes}
    for written in find_written(gm.graph):
        first = (written.scores or written.ends)[0]
        label = f"attention ({labels.of(written)})"
        found.append((order[first], _mixer(label, [first, *(n for n in written.region.nodes if n not in claimed)])))
    found += [(order[nodes[0]], _mixer("experts", nodes)) for nodes in _grouped(gm.graph)]
    found += [(order[r.nodes[0]], region_info(r)) for r in regions]
    return [info for _, info in sorted(found, key=lambda pair: pair[0])]


def _grouped(graph: fx.Graph) -> list[list[fx.Node]]:
    """Products of experts' weights, those of one block together: they read the same groups."""
    blocks: dict[tuple[fx.Node, ...], list[fx.Node]] = {}
    for node in filter(is_grouped, graph.nodes):
        groups = tuple(filter(is_count, operands_of(node)))
        blocks.setdefault(groups, []).append(node)
    return list(blocks.values())


def _mixer(label: str, nodes: Sequence[fx.Node]) -> RegionInfo:
    first, names = nodes[0], tuple(dict.fromkeys(n.name for n in nodes))
    tokens = str(first.meta["val"].shape[-2])
    layer, module, source = layer_of(first), module_of(first), source_of(first)
    return RegionInfo("mixer", label, layer, module, source, tokens, ops=len(names), nodes=names)


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
