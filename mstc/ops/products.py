"""Matrix products in float32 on CPUs for which PyTorch's own are slow.

On x86 PyTorch multiplies float32 with MKL, which keeps its AVX-512 kernels for Intel's CPUs. oneDNN, in PyTorch as
well, writes its kernels for the instructions that a CPU has: on an AMD Zen 5 its products take less than half the time
(`docs/benchmarks.md`). Both add up in float32; they differ by rounding. ``mstc::product`` is oneDNN's as an operator
that profilers and FLOP counters see. The functions below have the names and arguments of PyTorch's, and call those
where oneDNN would not be faster, and where ``torch.backends.mkldnn.enabled`` is off.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, cast

import torch

from mstc import compat

# Below this, calling the operator and looking up oneDNN's kernel cost more than MKL's product does.
FLOPS_PER_THREAD = 2**23
SMALLEST_SIDE = 32

torch.library.define("mstc::product", "(Tensor(a!) out, Tensor a, Tensor b, bool add) -> ()")


@torch.library.impl("mstc::product", "CPU")
def _product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, add: bool) -> None:
    product = compat.onednn_product()
    assert product is not None, "nobody asked `_takes` first"
    if out.is_contiguous():
        product(out, a, b, add)
    else:
        product(out.mT, b.mT, a.mT, add)


torch.library.register_fake("mstc::product", lambda out, a, b, add: None)


def mm(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor, **more: Any) -> torch.Tensor:
    """As `torch.mm`."""
    if more or not _takes(out, a, b, 2):
        return torch.mm(a, b, out=out, **more)
    torch.ops.mstc.product(out, a, b, False)
    return out


def bmm(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor, **more: Any) -> torch.Tensor:
    """As `torch.bmm`."""
    if more or not _takes(out, a, b, 3):
        return torch.bmm(a, b, out=out, **more)
    torch.ops.mstc.product(out, a, b, False)
    return out


def addmm(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: torch.Tensor,
    **more: Any,
) -> torch.Tensor:
    """As `torch.addmm`; ``x`` may be ``out`` itself."""
    if more or beta != 1 or alpha != 1 or not _takes(out, a, b, 2):
        return torch.addmm(x, a, b, beta=beta, alpha=alpha, out=out, **more)
    if x is not out:
        out.copy_(x)
    torch.ops.mstc.product(out, a, b, True)
    return out


def fast_products() -> contextlib.AbstractContextManager[None]:
    """Code that Inductor writes meanwhile multiplies by the functions above, where this machine gains by that."""
    if not onednn_is_faster():
        return contextlib.nullcontext()
    return compat.multiplying_by({"mm": mm, "addmm": addmm, "bmm": bmm})


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is a CPU for which oneDNN has AVX-512 kernels and MKL has not."""
    cpu, has_mkl = torch.cpu.get_capabilities(), cast("Callable[[], bool]", torch.backends.mkl.is_available)
    return str(cpu.get("cpu_name", "")).startswith("AMD") and has_mkl() and compat.onednn_product() is not None


def _takes(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, rank: int) -> bool:
    """Whether oneDNN takes these as they lie, and gains by it. Where the shapes are wrong, PyTorch is to say so."""
    if not (out.dtype is a.dtype is b.dtype is torch.float32 and out.dim() == a.dim() == b.dim() == rank):
        return False
    rows, columns, inner = *out.shape[-2:], a.shape[-1]
    return (
        min(rows, columns, inner) >= SMALLEST_SIDE
        and 2 * out.numel() * inner >= FLOPS_PER_THREAD * torch.get_num_threads()
        and 2 * packed_bytes(a, out) <= out.nbytes + a.nbytes + b.nbytes
        and onednn_is_faster()
        and bool(torch.backends.mkldnn.enabled)
        and all(x.device.type == "cpu" and (x.is_contiguous() or x.mT.is_contiguous()) for x in (out, a, b))
        and (a.shape, b.shape) == ((*out.shape[:-1], inner), (*out.shape[:-2], inner, columns))
    )


def packed_bytes(a: torch.Tensor, out: torch.Tensor) -> int:
    """About how much oneDNN lays out anew at once, in buffers of its own: each thread a part of ``b``, and of ``a``
    where that is the transpose of a dense matrix."""
    rows, inner = out.shape[-2], a.shape[-1]
    of_a, of_b = (0 if a.is_contiguous() else min(rows, 256) * inner), 128 * min(inner, 512)
    return (of_a + of_b) * out.itemsize * torch.get_num_threads()
