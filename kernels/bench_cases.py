"""What the benchmarks run: each class as a function of its tensors, and one step of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from mstc.kernels.api import dplr_attention, linear_attention
from mstc.kernels.selective_scan.op import selective_scan
from mstc.kernels.selective_scan.reference import reference

__all__ = ["CLASSES", "SCAN", "Form", "Sizes", "Step", "case", "indexed_loop", "make_step", "scan_inputs", "token_loop"]

CLASSES = ["none", "scalar", "vector", "delta", "gated delta", "dplr", "window 512"]
SCAN = "selective scan"
Form = Callable[..., Tensor]
Step = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """B, T, H, K = V; the selective scan takes D = ``channels`` and N = ``columns``."""

    tokens: int
    batch: int = 1
    heads: int = 8
    width: int = 64
    channels: int = 512
    columns: int = 16
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


def case(name: str, sizes: Sizes) -> tuple[Form, list[Tensor]]:
    """A class, or "softmax" or "selective scan", as a function of its tensors; and the tensors."""
    from mstc.kernels.sliding_window.op import sliding_window_attention

    if name == SCAN:
        return selective_scan, scan_inputs(sizes)
    q, k, v, scalar, vector, beta = _inputs(sizes)
    if name == "softmax":
        return _softmax, [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    forms: dict[str, tuple[Form, list[Tensor]]] = {
        "none": (lambda q, k, v: linear_attention(q, k, v), [q, k, v]),
        "scalar": (lambda q, k, v, g: linear_attention(q, k, v, decay=g), [q, k, v, scalar]),
        "vector": (lambda q, k, v, g: linear_attention(q, k, v, decay=g), [q, k, v, vector]),
        "delta": (lambda q, k, v, b: linear_attention(q, k, v, beta=b), [q, k, v, beta]),
        "gated delta": (
            lambda q, k, v, g, b: linear_attention(q, k, v, decay=g, beta=b),
            [q, k, v, scalar, beta],
        ),
        "dplr": (
            lambda q, k, v, a, b, g: dplr_attention(q, k, v, a, b, decay=g),
            [q, k, v, -k, k * beta.unsqueeze(-1), vector],
        ),
        "window 512": (lambda q, k, v: sliding_window_attention(q, k, v, window=512, sinks=4), [q, k, v]),
    }
    return forms[name]


def _inputs(sizes: Sizes) -> list[Tensor]:
    """q, normalized k, v, log decays per head and per column of K, beta."""
    torch.manual_seed(0)
    rows = (sizes.batch, sizes.tokens, sizes.heads)
    with torch.device(sizes.device):
        q, k, v = (torch.randn(*rows, sizes.width, dtype=sizes.dtype) for _ in range(3))
        scalar, vector, beta = (torch.rand(*shape, dtype=sizes.dtype) for shape in (rows, (*rows, sizes.width), rows))
    return [q, normalize(k, dim=-1), v, -scalar, -vector, beta]


def scan_inputs(sizes: Sizes) -> list[Tensor]:
    """x, dt, A, B, C; A in float32."""
    torch.manual_seed(0)
    rows = (sizes.batch, sizes.tokens)
    with torch.device(sizes.device):
        x, dt = (make(*rows, sizes.channels, dtype=sizes.dtype) for make in (torch.randn, torch.rand))
        b, c = (torch.randn(*rows, sizes.columns, dtype=sizes.dtype) for _ in range(2))
        return [x, dt, -torch.rand(sizes.channels, sizes.columns), b, c]


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def token_loop(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The scan token by token, the tokens taken apart once: the fastest loop in plain torch."""
    return reference(x, dt, a, b, c, None)[0]


def indexed_loop(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The scan as models without a kernel write it: decays and inputs of all tokens, then a loop that indexes them.

    The gradient of each index is a tensor of all tokens, so that the backward takes time with T squared.
    """
    decays = (a[:, None] * dt.mT.unsqueeze(-1)).exp()
    added = (dt * x).mT.unsqueeze(-1) * b.unsqueeze(1)
    state, outputs = torch.zeros_like(decays[:, :, 0]), []
    for i in range(x.shape[1]):
        state = decays[:, :, i] * state + added[:, :, i]
        outputs.append((state @ c[:, i].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, 1)


def make_step(form: Form, tensors: Sequence[Tensor], backward: bool = True) -> Step:
    """Forward, and backward from an incoming gradient of ones that is made beforehand."""
    if not backward:
        return lambda: form(*tensors)
    leaves = [t.requires_grad_() for t in tensors]
    with torch.no_grad():
        grad = torch.ones_like(form(*leaves))
    return lambda: torch.autograd.grad(form(*leaves), leaves, grad)
