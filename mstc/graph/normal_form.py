"""The normal form: one flat graph of functional ATen ops, before autograd, under one grad mode.

What every later step may rely on (held by `mstc.graph.checker`, but for the last):

- nodes are placeholders, ``get_attr`` of constants, calls of ATen (or custom) ops, ``getitem`` and the output;
- nothing is changed in place, except copies back into mutated inputs at the end;
- ``torch.no_grad`` stretches are written as ``detach`` of what they read, so no node switches the grad mode;
- every node carries ``meta["val"]`` (fake) and ``meta["needs_grad"]``, inputs ``meta["held"]`` (by a module);
- sizes are computed from the lengths of the inputs, where these tell them (`mstc.graph.lengths`);
- floats that change from call to call are tensors of no dimension, where an op can read one (`mstc.graph.numbers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from mstc import compat
from mstc.graph import functions
from mstc.graph.detached import with_own_memory
from mstc.graph.editor import passes_gradients
from mstc.graph.hooks import fold_hooks
from mstc.graph.lengths import size_by_inputs
from mstc.graph.masked_rows import read_rows
from mstc.graph.not_normal import NotNormalError as NotNormalError
from mstc.graph.numbers import numbers_as_tensors
from mstc.graph.own_rows import read_own_rows
from mstc.graph.predicates.reader import RULES as READ_IN_MASKS
from mstc.graph.provenance import source_of, title_of
from mstc.graph.results import returned_by
from mstc.graph.rules import rule_of
from mstc.graph.spelling import spell_out
from mstc.graph.twice import compute_once

aten = torch.ops.aten

_CARRIED = ("grapharg", "tensor_dict", "example_value", "steal_arg", "_fake_tensor")
_ASSERTS = (aten._assert_tensor_metadata.default,)


@dataclass(frozen=True)
class NormalForm:
    """A graph in normal form, and whether gradients are recorded when it runs."""

    gm: fx.GraphModule
    training: bool


def normalize(gm: fx.GraphModule, inputs: Sequence[Any]) -> NormalForm:
    """Bring a Dynamo graph to normal form.

    Raises `NotNormalError` where it holds something that the retracing would lose.
    """
    folded = fold_hooks(functions.fold_vmap(gm))
    _refuse_unknown(folded)
    folded, written = with_own_memory(folded)
    if written is not None:
        told = "a detached tensor is changed in place while what it was detached from is read too"
        raise NotNormalError(told, written.name, source_of(written))
    mode = compat.fake_mode_of(inputs)
    placeholders = folded.graph.find_nodes(op="placeholder")
    fakes = compat.fake_inputs(placeholders, inputs, mode)
    grad_mode = torch.is_grad_enabled()
    traced = compat.trace_functional(folded, fakes, mode, functions.call, _is_read_whole)
    if traced.retyped:
        changed = placeholders[traced.retyped[0]]
        raise NotNormalError(f"{title_of(changed)} has its shape or strides changed in place", changed.name)
    graph = traced.gm.graph
    _carry_metadata(gm, placeholders, traced.gm)
    _keep_numbers(graph, fakes)
    _write_back(graph, traced.mutated, fakes)
    _mark_held(traced.gm, inputs)
    _drop_asserts(graph)
    _note_effects(graph)
    spell_out(traced.gm)
    read_own_rows(traced.gm)
    _fold_grad_mode(graph, fakes, grad_mode)
    compute_once(traced.gm, read_rows(traced.gm))
    size_by_inputs(traced.gm)
    numbers_as_tensors(traced.gm)
    graph.eliminate_dead_code()
    graph.lint()
    traced.gm.recompile()
    return NormalForm(traced.gm, any(n.meta.get("needs_grad") for n in graph.nodes))


def _keep_numbers(graph: fx.Graph, fakes: Sequence[Any]) -> None:
    """A fake tensor of no dimension remembers the float that it stands for, which its copies in the graph do not."""
    for node, fake in zip(graph.find_nodes(op="placeholder"), fakes, strict=True):
        if isinstance(fake, torch.Tensor) and fake.dim() == 0:
            node.meta["number"] = fake


def _is_read_whole(target: Any) -> bool:
    """Whether axis rules know the op, or readers of masks."""
    return rule_of(target) is not None or target.overloadpacket in READ_IN_MASKS


def _refuse_unknown(gm: fx.GraphModule) -> None:
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if node.op == "get_attr" and _is_changed(node, module):
                raise NotNormalError(
                    f"{node.target}, which the graph holds itself, is changed in place (an optimizer's step)",
                    node.name,
                    source_of(node),
                )
            if node.target in (torch.Tensor.set_, "set_"):
                raise NotNormalError(
                    "a tensor gets the memory of another inside the function (tensor.data = ..., module.to(...))",
                    node.name,
                    source_of(node),
                    remedy="assign before the compiled function is called",
                )
            if compat.is_transform_switch(node):
                raise NotNormalError("the graph holds a function transform (vmap, grad)", node.name, source_of(node))
            if node.target is compat.autograd_function_apply:
                reason = functions.why_not(node, module)
                if reason is not None:
                    told = f"the graph holds an autograd.Function that stays as it is: {reason}"
                    raise NotNormalError(told, node.name, source_of(node))
            elif isinstance(node.target, compat.HigherOrderOperator) and not compat.is_checkpoint(node.target):
                raise NotNormalError(
                    f"the graph holds the higher-order op {node.target}, which has a graph of its own",
                    node.name,
                    source_of(node),
                )


def _is_changed(node: fx.Node, gm: fx.GraphModule) -> bool:
    """Whether a tensor of the graph's own is written to: by ``add_``, ``_foreach_mul_`` and others of such names."""
    if not isinstance(getattr(gm, str(node.target), None), torch.Tensor):
        return False
    return any(
        name.endswith("_") and not name.endswith("__") and node in compat.tree_leaves(user.args[0])
        for user in node.users
        if user.args and (name := str(getattr(user.target, "__name__", user.target)))
    )


def _write_back(graph: fx.Graph, mutated: Sequence[int], fakes: Sequence[Any]) -> None:
    """Turn the new values of mutated inputs into explicit copies at the end of the graph.

    Everything else reads a clone: what is saved for the backward must not be written.
    """
    output = graph.output_node()
    values = returned_by(graph)
    kept = len(values) - len(mutated)
    placeholders = graph.find_nodes(op="placeholder")
    for index, value in zip(mutated, values[kept:], strict=True):
        target = placeholders[index]
        if torch.is_grad_enabled():
            _read_clone(graph, target, placeholders[-1], fakes[index])
        with graph.inserting_before(output):
            if fakes[index].requires_grad:
                raise NotNormalError(
                    f"{title_of(target)}, which needs a gradient, is changed in place",
                    target.name,
                    remedy="change it outside the compiled function, or call requires_grad_(False) on it (an average)",
                )
            copy = graph.call_function(aten.copy_.default, (target, value))
            copy.meta["val"] = fakes[index]
    output.args = (tuple(values[:kept]),)
    output.meta["val"] = tuple(v.meta["val"] if isinstance(v, fx.Node) else v for v in values[:kept])


def _read_clone(graph: fx.Graph, target: fx.Node, last: fx.Node, value: torch.Tensor) -> None:
    with graph.inserting_after(last):
        clone = graph.call_function(aten.clone.default, (target,))
    clone.meta["val"] = value
    target.replace_all_uses_with(clone, delete_user_cb=lambda user: user is not clone, propagate_meta=False)


def _carry_metadata(old: fx.GraphModule, placeholders: Sequence[fx.Node], new: fx.GraphModule) -> None:
    """Keep what the lowering reads off Dynamo's graph: sources of inputs, names of parameters, compile ids."""
    new.meta.update(old.meta)
    compat.copy_sources(old, new)
    for before, after in zip(placeholders, new.graph.find_nodes(op="placeholder"), strict=True):
        after.meta.update({k: before.meta[k] for k in _CARRIED if k in before.meta})
        after.meta["user_name"] = before.name
        compat.copy_source(before, after)
        if before.meta.get("stack_trace"):
            after.meta["stack_trace"] = before.meta["stack_trace"]


def _mark_held(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Note which inputs modules hold: parameters, and what Dynamo tells to lie at one address (buffers)."""
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        told = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
        node.meta["held"] = isinstance(value, torch.nn.Parameter) or told == "unguarded"


def _drop_asserts(graph: fx.Graph) -> None:
    """Retracing checked them; they would only keep their inputs alive."""
    for node in list(graph.nodes):
        if node.target in _ASSERTS and not node.users:
            graph.erase_node(node)


def _note_effects(graph: fx.Graph) -> None:
    """Checks of sizes that data decide return nothing: None is their value."""
    for node in graph.nodes:
        if isinstance(node.target, compat.OpOverload) and not node.target._schema.returns:
            node.meta.setdefault("val", None)


def _fold_grad_mode(graph: fx.Graph, fakes: Sequence[Any], grad_mode: bool) -> None:
    """Write grad-mode switches as ``detach`` and note which values need gradients."""
    recording = grad_mode
    detached: dict[fx.Node, fx.Node] = {}
    arguments = iter(fakes)
    for node in list(graph.nodes):
        if node.op == "placeholder":
            value = next(arguments)
            node.meta["needs_grad"] = grad_mode and isinstance(value, torch.Tensor) and value.requires_grad
        elif compat.is_grad_mode_switch(node):
            recording = bool(node.args[0])
            if recording and not grad_mode:
                raise NotNormalError("gradients are switched on inside a graph that runs without", node.name)
            graph.erase_node(node)
        elif node.op == "call_function":
            if not recording:
                _detach_inputs(graph, node, detached)
            node.meta["needs_grad"] = recording and passes_gradients(node)
        elif node.op == "get_attr":
            node.meta["needs_grad"] = False


def _detach_inputs(graph: fx.Graph, node: fx.Node, detached: dict[fx.Node, fx.Node]) -> None:
    for source in node.all_input_nodes:
        if not source.meta.get("needs_grad"):
            continue
        if source not in detached:
            with graph.inserting_before(node):
                cut = graph.call_function(aten.detach.default, (source,))
            cut.meta = {**source.meta, "needs_grad": False}
            detached[source] = cut
        node.replace_input_with(source, detached[source])
