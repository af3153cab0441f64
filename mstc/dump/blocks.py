"""The rewritten graph as blocks in order, and which stretches of them are the same layer again.

A loop, a region left whole and a mixer are blocks of their own; what lies between them is
gathered into blocks of kind "rest". What happened to a block is its status:

    chunked      runs a few tokens at a time
    loss         ("head with loss") the same, and its gradients are computed along with the loss
    recomputed   chunked, and run again in the backward instead of being kept
    rewritten    another pass changed it
    refused      a candidate that was left as it was (the refusal tells why)
    kept         ("as written") nothing was to be done
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from mstc.dump.model import Block, Fold, Node, Stage
from mstc.dump.nodes import short
from mstc.report import Refusal, RegionInfo

CHUNKING = ("lm_head", "mini_sequence", "query_chunks")  # passes that put loops in the place of regions
WORDS = {"loss": "head with loss", "kept": "as written"}  # what people read, where it is not the status itself
_LEFT_OUT = ("parameter", "buffer", "output")


@dataclass(frozen=True)
class _Draft:
    """A block to be: the report's record where there is one, and its nodes."""

    info: RegionInfo | None
    nodes: tuple[Node, ...]


def make_blocks(stages: Sequence[Stage], regions: Sequence[RegionInfo], refusals: Sequence[Refusal]) -> list[Block]:
    """The blocks of the last stage, in an order in which each comes after what it reads."""
    nodes = [n for n in stages[-1].nodes if n.kind not in _LEFT_OUT]
    drafts = _in_order(_drafts(nodes, regions))
    where = {n.name: i for i, draft in enumerate(drafts) for n in draft.nodes}
    history = _History(stages, refusals)
    return [_block(draft, where, history) for draft in drafts]


class _History:
    """What happened to which nodes, and every node that ever was."""

    def __init__(self, stages: Sequence[Stage], refusals: Sequence[Refusal]) -> None:
        self.records: dict[str, Node] = {}
        for stage in reversed(stages):
            self.records.update({n.name: n for n in stage.nodes})
        self.refused = {r.node for r in refusals}
        self.loops: dict[str, tuple[str, ...]] = {}
        self.again: set[str] = set()
        self.changed: set[str] = set()
        self._read(stages)

    def _read(self, stages: Sequence[Stage]) -> None:
        for stage in stages:
            for edit in stage.edits:
                if edit.pass_name in CHUNKING:
                    self.loops.update(dict.fromkeys(edit.added, edit.removed))
                elif edit.pass_name == "recompute":
                    self.again.update(edit.added)
                else:
                    self.changed.update(edit.added)
            if stage.name not in ("", *CHUNKING, "recompute"):
                self.changed |= _rewired(stages, stage)


def _rewired(stages: Sequence[Stage], stage: Stage) -> set[str]:
    """Mixers that a pass gave other arguments, as the masks pass does."""
    before = {n.name: n for n in stages[stages.index(stage) - 1].nodes}
    return {n.name for n in stage.nodes if n.name in before and n.op != before[n.name].op}


def _drafts(nodes: Sequence[Node], regions: Sequence[RegionInfo]) -> list[_Draft]:
    members = {name: i for i, info in enumerate(regions) for name in info.nodes}
    groups: dict[tuple[str, int], list[Node]] = {}
    for node, group in zip(nodes, _rest(nodes, members), strict=True):
        key = ("rest", group) if node.name not in members else ("region", members[node.name])
        groups.setdefault(key, []).append(node)
    return [_Draft(regions[i] if kind == "region" else None, tuple(found)) for (kind, i), found in groups.items()]


def _rest(nodes: Sequence[Node], members: Mapping[str, int]) -> list[int]:
    """For each node a number, equal for connected nodes outside all regions that no path through a region parts."""
    stage: dict[str, int] = {}
    group: dict[str, int] = {}
    parent: list[int] = []

    def find(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, node in enumerate(nodes):
        parent.append(i)
        own = members.get(node.name)
        known = [p for p in node.inputs if p in stage]
        stage[node.name] = max((stage[p] + (members.get(p) != own) for p in known), default=0)
        group[node.name] = i
        for p in known:
            if own is None and p not in members and stage[p] == stage[node.name]:
                parent[find(i)] = find(group[p])
    return [find(i) for i in range(len(nodes))]


def _in_order(drafts: Sequence[_Draft]) -> list[_Draft]:
    """Stable topological order; where blocks need each other (two may interleave), the order of the graph."""
    where = {n.name: i for i, draft in enumerate(drafts) for n in draft.nodes}
    needs = [{where[p] for n in d.nodes for p in n.inputs if p in where} - {i} for i, d in enumerate(drafts)]
    done: list[int] = []
    placed: set[int] = set()
    waiting = list(range(len(drafts)))
    while waiting:
        chosen = next((i for i in waiting if needs[i] <= placed), waiting[0])
        waiting.remove(chosen)
        placed.add(chosen)
        done.append(chosen)
    return [drafts[i] for i in done]


def _block(draft: _Draft, where: Mapping[str, int], history: _History) -> Block:
    info, nodes = draft.info, draft.nodes
    own = where[nodes[0].name]
    inputs = tuple(sorted({where[p] for n in nodes for p in n.inputs if p in where} - {own}))
    inside = next((history.loops[n.name] for n in nodes if n.name in history.loops), ()) if info else ()
    ran = [history.records[name] for name in inside if name in history.records] or list(nodes)
    flops, nbytes = sum(n.flops for n in ran), sum(n.nbytes for n in ran if not is_view(n))
    names = tuple(n.name for n in nodes)
    status = _status(info, names, inside, history)
    if info is None:
        label, module = _rest_label(nodes), nodes[0].module
        return Block(
            "rest", status, label, None, module, nodes[0].source, names, (), inputs, flops=flops, nbytes=nbytes,
            held=nbytes,
        )  # fmt: skip
    return Block(
        info.kind, status, info.label, info.layer, short(info.module), short(info.source), names, inside, inputs,
        info.tokens, info.chunks, flops, nbytes, nbytes // max(info.chunks, 1), info.saved, info.note,
    )  # fmt: skip


def _status(info: RegionInfo | None, names: Sequence[str], inside: Sequence[str], history: _History) -> str:
    if info is not None and info.loop:
        if any(n in history.again for n in names):
            return "recomputed"
        return "loss" if any(history.records[n].op == "mstc.loss_loop" for n in names) else "chunked"
    if any(n in history.changed for n in names):
        return "rewritten"
    return "refused" if any(n in history.refused for n in (*names, *inside)) else "kept"


_VIEWS = ("view", "reshape", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select", "t", "detach")


def is_view(node: Node) -> bool:
    """Whether the op's result shares its operand's memory, told by the op's name."""
    name = node.op.removeprefix("aten.").split(".")[0]
    return name in (*_VIEWS, "flatten", "unflatten", "alias", "split", "chunk", "unbind", "_unsafe_view")


def _rest_label(nodes: Iterable[Node]) -> str:
    """Named after its most telling op."""
    ops = [n.op.removeprefix("aten.").split(".")[0] for n in nodes if n.kind == "op"]
    if not ops:
        return "inputs"
    if "embedding" in ops:
        return "embedding"
    for names, label in (
        (("cos", "sin"), "rotary angles"),
        (("cross_entropy_loss", "nll_loss", "nll_loss_nd"), "loss"),
        (("cumsum", "cumprod", "logcumsumexp"), "scan"),
        (("le", "lt", "ge", "gt", "tril", "triu"), "mask and positions"),
        (("arange",), "positions"),
    ):
        if any(n in ops for n in names):
            return label
    telling = [o for o in dict.fromkeys(ops) if o not in (*_VIEWS, "getitem", "_to_copy", "clone")]
    return ", ".join(telling[:3]) + (", ..." if len(telling) > 3 else "") if telling else ", ".join(dict.fromkeys(ops))


# ------------------------------------------------------------------ identical layers


def fold(blocks: Sequence[Block]) -> list[Fold]:
    """Repeated stretches of blocks that look alike, found left to right, the longest first."""
    looks = [_looks(b) for b in blocks]
    folds: list[Fold] = []
    start = 0
    while start < len(looks):
        best = max(_repeats(looks, start), key=lambda f: (f.period * f.count, -f.period), default=None)
        if best is None:
            start += 1
        else:
            folds.append(best)
            start += best.period * best.count
    return folds


_LONGEST_PERIOD = 64  # blocks; a model whose layers repeat in a longer pattern is drawn unfolded


def _repeats(looks: Sequence[object], start: int) -> Iterable[Fold]:
    for period in range(1, min(_LONGEST_PERIOD, (len(looks) - start) // 2) + 1):
        count = 1
        while looks[start : start + period] == looks[start + count * period : start + (count + 1) * period]:
            count += 1
        if count > 1:
            yield Fold(start, period, count)


def _looks(block: Block) -> object:
    """Everything of a block but where it stands."""
    own = ("layer", "module", "source", "nodes", "inside", "inputs")
    values = {f.name: getattr(block, f.name) for f in fields(block) if f.name not in own}
    return values, len(block.nodes), len(block.inside)
