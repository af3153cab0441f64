"""What a region or mixer is, in people's words, told by its structure alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.fx as fx

from mstc.graph.costs import is_heavy
from mstc.graph.regions import Region

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
_MIXERS = (aten.scaled_dot_product_attention.default,)
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
    if region.sums:
        yield "LM head"
        yield f"{loss} loss" if loss else "loss"
        return
    for role in ("gated MLP", "MLP", "router", "q/k/v projection", "projection"):
        if role in roles.values():
            yield role


def _norms(region: Region) -> Iterator[str]:
    count = sum(n.target in (aten.layer_norm.default, aten.rms_norm.default, aten.rsqrt.default) for n in region.nodes)
    if count:
        yield "norms" if count > 1 else "norm"


def _role(heavy: fx.Node, within: set[fx.Node]) -> str:
    before = _first(heavy, within, up=True)
    after = _first(heavy, within, up=False)
    if any(n.target in _SELECTS for n in after):
        return "router"
    if _gates(before) or _gates(after):
        return "gated MLP"
    if any(n.target in _ACTIVATIONS for n in before | after if not _inside_norm(n)):
        return "MLP"
    if any(n.target in _MIXERS for n in before):
        return "output projection"
    if any(_attends(n) for n in _first(heavy, within, up=False, past_sums=True)):
        return "q/k/v projection"
    return "projection"


def _attends(node: fx.Node) -> bool:
    """Attention, or the product of two activations with which a written-out one begins."""
    return node.target in _MIXERS or (
        node.target in (aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
        and all(i.op == "call_function" for i in node.all_input_nodes)
    )


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
    if node.kwargs.get("is_causal") or (len(node.args) > 5 and node.args[5]):
        return "attention (causal)"
    given = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if mask:
        return f"attention ({mask.replace('_', ' ')})"
    return "attention (explicit mask)" if isinstance(given, fx.Node) else "attention (full)"
