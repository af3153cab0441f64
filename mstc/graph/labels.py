"""What a region or mixer is, in people's words, told by its structure alone."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
import torch.fx as fx

from mstc.graph.attention import WINDOW_ATTENTION, is_attention, is_causal, vectors_of, window_of
from mstc.graph.costs import factors_of, is_heavy
from mstc.graph.predicates.facts import MaskFact
from mstc.graph.reach import descendants
from mstc.graph.regions import Region
from mstc.graph.rules import rule_of
from mstc.graph.rules.call import operands_of
from mstc.graph.weights import source_of_views, stack_of

aten = torch.ops.aten

_LOSSES = {
    aten.cross_entropy_loss.default: "cross-entropy",
    aten.nll_loss.default: "negative log-likelihood",
    aten.nll_loss_nd.default: "negative log-likelihood",
    aten.mse_loss.default: "squared error",
    aten.l1_loss.default: "absolute error",
    aten.kl_div.default: "KL divergence",
    aten.binary_cross_entropy.default: "binary cross-entropy",
    aten.binary_cross_entropy_with_logits.default: "binary cross-entropy",
}
_ACTIVATIONS = (
    aten.silu.default,
    aten.gelu.default,
    aten.relu.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.mish.default,
    aten.hardswish.default,
    aten.leaky_relu.default,
    aten.elu.default,
    aten.pow.Tensor_Scalar,
)
_SELECTS = (aten.topk.default,)


def region_label(region: Region) -> str:
    """For example ``output projection + norms + gated MLP`` or ``LM head + cross-entropy``."""
    parts = list(dict.fromkeys(_parts(region)))
    return " + ".join(parts) if parts else "projection"


def _parts(region: Region) -> Iterator[str]:
    within = set(region.nodes)
    loss = next((_LOSSES[n.target] for n in region.nodes if n.target in _LOSSES), None)
    roles = {h: _role(h, within) for h in region.heavy}
    if "output projection" in roles.values():
        yield "output projection"
    yield from _norms(region)
    if any(is_attention(n) for n in region.nodes):
        yield "attention over few keys"
    heads = {h for h in region.heavy if _is_last(h, within)} if region.sums else set()
    for role in ("experts", "gated MLP", "MLP", "router", "q/k/v projection", "projection"):
        if any(found == role for h, found in roles.items() if h not in heads):
            yield role
    if region.sums:
        yield "LM head"
        yield f"{loss} loss" if loss else "loss"


def _is_last(heavy: fx.Node, within: set[fx.Node]) -> bool:
    """Whether no other matrix product of the region reads what this one leads to."""
    return not any(is_heavy(n) for n in descendants(heavy.users, within))


def _norms(region: Region) -> Iterator[str]:
    count = sum(n.target in (aten.layer_norm.default, aten.rms_norm.default, aten.rsqrt.default) for n in region.nodes)
    if count:
        yield "norms" if count > 1 else "norm"


def _role(heavy: fx.Node, within: set[fx.Node]) -> str:
    if any(stack_of(f) is not None for f in factors_of(heavy)):
        return "experts"
    before = _first(heavy, within, up=True)
    after = _first(heavy, within, up=False)
    if _chooses(heavy):
        return "router"
    if _gates(before) or _gates(after):
        return "gated MLP"
    if any(n.target in _ACTIVATIONS for n in before | after if not _inside_norm(n)):
        return "MLP"
    if any(_attends(n) for n in before):
        return "output projection"
    if any(_attends(n) for n in _first(heavy, within, up=False, past_sums=True)):
        return "q/k/v projection"
    return "projection"


def _attends(node: fx.Node) -> bool:
    """Attention, a loop that stands for it, or a product of two activations, of which a written-out one is made.

    What a linear layer multiplies by is a weight, be it computed in the graph.
    """
    if node.target is operator.getitem:
        node = node.all_input_nodes[0]
    if is_attention(node) or "mixes_at" in node.meta:
        return True
    if node.target is aten.linear.default or not is_heavy(node):
        return False
    return not any(_is_given(f) or stack_of(f) is not None for f in factors_of(node))


def _is_given(value: fx.Node) -> bool:
    """An input of the graph or a constant, perhaps cast, viewed or transposed."""
    return source_of_views(value).op in ("placeholder", "get_attr")


def is_grouped(node: fx.Node) -> bool:
    """Products of groups of tokens with the weights of their experts, by an op that no axis rule knows."""
    made = node.meta.get("val")
    if node.op != "call_function" or not isinstance(made, torch.Tensor) or rule_of(node.target):
        return False
    inputs = operands_of(node)
    rows = [i for i in inputs if i.meta["val"].is_floating_point() and i.meta["val"].dim() > 1 and not _is_stack(i)]
    return made.dim() > 1 and bool(rows) and any(map(_is_stack, inputs)) and any(map(is_count, inputs))


def is_count(value: fx.Node) -> bool:
    """Whether a tensor numbers something, or chooses."""
    return not value.meta["val"].is_floating_point()


def _is_stack(value: fx.Node) -> bool:
    """The weights of all experts."""
    return _is_given(value) and not is_count(value) and value.meta["val"].dim() == 3


def _first(start: fx.Node, within: set[fx.Node], up: bool, past_sums: bool = False) -> set[fx.Node]:
    """Nodes between ``start`` and the region's next matrix product, or its border (the node beyond it included).

    Residual additions end the walk unless ``past_sums``.
    """
    found: set[fx.Node] = set()
    stack = list(start.all_input_nodes if up else start.users)
    while stack:
        node = stack.pop()
        if node in found or (is_heavy(node) and node in within):
            continue
        found.add(node)
        if node in within and (past_sums or not _adds(node)):
            stack.extend(node.all_input_nodes if up else node.users)
    return found


def _chooses(product: fx.Node) -> bool:
    """Whether a product leads to a choice, in its region or behind it, past no other product and no residual sum."""
    seen: set[fx.Node] = set()
    stack = list(product.users)
    while stack:
        node = stack.pop()
        if node.target in _SELECTS:
            return True
        if node not in seen and not (is_heavy(node) or _attends(node) or _adds(node)):
            seen.add(node)
            stack.extend(node.users)
    return False


def _adds(node: fx.Node) -> bool:
    """A residual addition: two values of the region, so the walk ends there."""
    return node.target is aten.add.Tensor and len([i for i in node.all_input_nodes if i.op == "call_function"]) == 2


def _gates(nodes: set[fx.Node]) -> bool:
    """A product of an activation with another matrix product's result."""
    for node in nodes:
        if node.target is not aten.mul.Tensor:
            continue
        inputs = node.all_input_nodes
        if (
            len(inputs) == 2
            and any(i.target in _ACTIVATIONS for i in inputs)
            and any(_from_product(i) for i in inputs if i.target not in _ACTIVATIONS)
        ):
            return True
    return False


def _from_product(node: fx.Node) -> bool:
    for _ in range(3):
        if is_heavy(node):
            return True
        inputs = [i for i in node.all_input_nodes if isinstance(i, fx.Node)]
        if len(inputs) != 1:
            return False
        node = inputs[0]
    return is_heavy(node)


def _inside_norm(node: fx.Node) -> bool:
    """The square of an RMS norm is no activation."""
    return node.target is aten.pow.Tensor_Scalar and any(u.target is aten.mean.dim for u in node.users)


def attention_label(node: fx.Node, mask: str = "") -> str:
    """For example ``attention (causal)``."""
    if node.target is WINDOW_ATTENTION:
        fact = MaskFact("sliding_window", is_causal(node), window_of(node), *vectors_of(node))
        return f"attention ({fact.label})"
    if is_causal(node):
        return "attention (causal)"
    given = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if mask:
        return f"attention ({mask.replace('_', ' ')})"
    return "attention (explicit mask)" if isinstance(given, fx.Node) else "attention (no mask)"
