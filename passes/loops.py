"""Replacing a region by a loop: shared by `lm_head`, `mini_sequence` and `query_chunks`.

A loop computes the same nodes on chunks of tokens (or of queries). Values are equal up to rounding: matrix products of
other shapes may sum in another order, and gradients of shared inputs are summed chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

import torch
import torch.fx as fx

from mstc.graph.describe import region_info
from mstc.graph.editor import Editor
from mstc.graph.regions import Region
from mstc.ops.build import Recipe, build
from mstc.ops.loop import LOOP, LOSS_LOOP, is_loop
from mstc.ops.program import Program
from mstc.passes.base import Context
from mstc.passes.seeds import find_seeds, write_seeds
from mstc.plan.calls import Saving
from mstc.plan.chunks import Chunks, choose, drafted, hint_n, planned
from mstc.plan.saves import Levels, levels_of, saving
from mstc.plan.words import counted


@dataclass(frozen=True)
class LoopSite:
    """A region that is to run as a loop.

    chunks: how many; kept: for each output, whether it is kept anyway; recompute: the loop runs
    again in the backward; loss: gradients are computed in the forward; label: for people;
    mixer: the loop runs over the queries of an attention; saves: values inside it that wait for the backward.
    """

    region: Region
    chunks: Chunks
    kept: tuple[bool, ...]
    recompute: bool
    loss: bool
    label: str
    mixer: bool = False
    saves: tuple[fx.Node, ...] = ()


def loop_key(region: Region) -> str:
    """The names of a region's products, by which a plan knows its loop before the loop is there."""
    return ",".join(n.name for n in region.heavy)


def chunks_of(region: Region, asked: int | str, ctx: Context) -> Chunks | None:
    """The plan's number of chunks, a draft's, or None where neither decides.

    A draft has no loop over an axis of length 0, as that of an expert which no token chose.
    """
    if ctx.planning:
        if hint_n(region) == 0:
            return None
        return choose(region, asked) if isinstance(asked, int) else drafted(region)
    chosen = ctx.chosen.get(loop_key(region))
    return None if chosen is None else planned(region, chosen.chunks)


def has_loops(gm: fx.GraphModule) -> bool:
    return any(is_loop(n) for n in gm.graph.nodes)


def read_by_loop(node: fx.Node, regions: list[Region], own: Region, mixers: Container[fx.Node] = ()) -> bool:
    """Whether a value is kept anyway: another region or a loop reads it, or the graph returns it.

    mixers: loops that stand for attention, so that what only they read is computed again.
    """
    others = {n for r in regions if r is not own for n in r.nodes}
    return any(u in others or (is_loop(u) and u not in mixers) or u.op == "output" for u in node.users)


def ends_in_loss(region: Region, training: bool) -> bool:
    """Whether the gradients can be computed along with the values: differentiable sums that meet in one scalar."""
    if not training or any(n.meta.get("needs_grad") for n, _ in region.outputs):
        return False
    return find_seeds(_differentiable(region.sums), region.nodes) is not None


def _differentiable(sums: Sequence[fx.Node]) -> list[fx.Node]:
    return [s for s in sums if s.meta.get("needs_grad")]


def recipe_of(site: LoopSite, ctx: Context) -> Recipe:
    """How the site's region is to run, its saves left out."""
    return Recipe(
        site.chunks.count,
        site.chunks.longest,
        ctx.training,
        site.kept,
        site.loss,
        ctx.options.accumulate,
        f"{ctx.options.lower} {torch.are_deterministic_algorithms_enabled()}"
        + " explained" * ctx.explained
        + " draft" * ctx.planning,
        site.label,
        ctx.options.lower == "inductor",
    )


def savings_of(site: LoopSite, ctx: Context, known: dict[str, Levels]) -> list[Saving]:
    """What the site's loop may save inside it, from little to much; nothing where it runs again as a whole.

    known: what was found for other sites, by the keys of their programs: identical regions save alike.
    """
    if site.loss or site.recompute or not ctx.training:
        return []
    recipe = recipe_of(site, ctx)
    key = build(site.region, recipe, ctx.compile_body).key
    if key not in known:
        known[key] = levels_of(site.region, recipe)
    found = []
    for level in known[key]:
        values = [site.region.nodes[i] for i in level]
        program = build(*saving(site.region, recipe, values), ctx.compile_body).example()
        found.append(Saving(tuple(v.name for v in values), program))
    return found


def apply_loop(editor: Editor, site: LoopSite, ctx: Context) -> Program:
    """Put the loop in the region's place."""
    region = _resolve(editor, site.region)
    program = build(*saving(region, recipe_of(site, ctx), site.saves), ctx.compile_body)
    like = (region.heavy or region.nodes)[-1]
    tokens = _cut_off(editor, [n for n, _ in region.tokens], program.token_needs, like)
    shared = _cut_off(editor, region.shared, program.shared_needs, like)
    lengths = [editor.length(symbol, like=like) for symbol in program.lengths]
    if site.loss:
        seeds = _seeds(editor, region)
        call = editor.call(LOSS_LOOP, (tokens, shared, seeds, lengths, program.key), like=like)
        results = list(enumerate([*region.sums, *(n for n, _ in region.outputs)]))
    else:
        call = editor.call(LOOP, (tokens, shared, lengths, program.key), like=like)
        results = list(enumerate(n for n, _ in region.outputs))
        results += list(enumerate(region.sums, start=len(program.outputs)))
    pairs = [(old, _result(editor, call, i, old)) for i, old in results]
    removed = [n.name for n in (*region.nodes, *region.sums)]
    what = f"{site.label}: {counted(len(removed), 'op')} in {counted(site.chunks.count, 'chunk')}"
    editor.replace_many(pairs, removed, what + (", gradients in the forward" if site.loss else ""))
    if not ctx.options.keeps_checkpoints:
        ctx.facts.setdefault("checkpoints", {})[call] = _blocks(site.region)
        for new in (call, *(n for _, n in pairs)):
            editor.keep(new)
    if site.mixer:
        call.meta["mixes_at"] = region.tokens[0][1]
        ctx.facts.setdefault("mixers", {})[call] = program.label
    ctx.keys[call.name] = loop_key(site.region)
    if site.recompute:
        ctx.facts.setdefault("recompute", {})[call] = program.label
    ctx.facts.setdefault("loops", {})[call] = replace(
        region_info(region),
        label=site.label,
        chunks=program.count,
        loop=f"mstc::{program.label}",
        saved=_saved(program),
    )
    return program


def _blocks(region: Region) -> set[int]:
    """The user's checkpointed blocks that the region's products stand in."""
    return {n.meta["ac_graph_id"] for n in region.heavy if n.meta.get("recompute")}


def _cut_off(editor: Editor, inputs: Sequence[fx.Node], needs: Sequence[bool], like: fx.Node) -> list[fx.Node]:
    """The inputs; those that get no gradient of the loop detached, so that no backward is asked for what made them."""
    detach = torch.ops.aten.detach.default
    pairs = zip(inputs, needs, strict=True)
    return [n if need or not n.meta.get("needs_grad") else editor.call(detach, (n,), like=like) for n, need in pairs]


def _result(editor: Editor, call: fx.Node, index: int, old: fx.Node) -> fx.Node:
    """One result of the loop; one that has no gradient is cut off, since the op as a whole has."""
    new = editor.getitem(call, index, like=old)
    if old.meta.get("needs_grad") or not new.meta["needs_grad"]:
        return new
    return editor.call(torch.ops.aten.detach.default, (new,), like=old, before=new.next)


def _saved(program: Program) -> tuple[str, ...]:
    """What the loop keeps for its backward, as ``dtype[shape]``."""
    if program.backward is None:
        return ()
    values = [program.tokens[i] for i in program.backward.tokens] + [program.outputs[i] for i in program.backward.kept]
    return tuple(f"{str(v.dtype).removeprefix('torch.')}{list(v.shape)}" for v in values)


def _resolve(editor: Editor, region: Region) -> Region:
    """The region with inputs as they are after the loops applied before it."""
    tokens = tuple((editor.resolve(n), p) for n, p in region.tokens)
    return replace(region, tokens=tokens, shared=tuple(editor.resolve(n) for n in region.shared))


def _seeds(editor: Editor, region: Region) -> list[fx.Node]:
    """A seed for each sum of a loss; one without a gradient gets a zero that nothing reads."""
    found = find_seeds(_differentiable(region.sums), region.nodes)
    assert found is not None, "a loss whose sums no longer meet"
    seeds = dict(zip(found.sums, write_seeds(editor, found), strict=True))
    return [seeds[s] if s in seeds else _zero(editor, s) for s in region.sums]


def _zero(editor: Editor, like: fx.Node) -> fx.Node:
    options = {"dtype": torch.float32, "device": like.meta["val"].device}
    return editor.call(torch.ops.aten.full.default, ([], 0.0), options, like=like)
