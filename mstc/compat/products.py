"""Matrix products of oneDNN on a CPU, and whose products the code that Inductor writes calls.

PyTorch carries oneDNN, but gives float32 to it only where its weights were packed before. The function below
(``at::native::mkldnn_matmul``) takes plain tensors, writes to a given result and can add to it; it has no Python name.
It is an exported symbol of ``libtorch_cpu``, whose mangled name spells its parameters' types: with another signature
it would not be found. Its arguments are references to ``at::Tensor``, a pointer to the ``TensorImpl`` that ``_cdata``
gives. Checked by running with 2.11 and 2.13.

A backend may be called while fake tensors are made; ``_disable_current_modes`` makes real ones for the check.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._inductor import select_algorithm
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["multiplying_by", "onednn_product"]

_SYMBOL = "_ZN2at6native13mkldnn_matmulERKNS_6TensorES3_S3_ff"

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], None]


@functools.cache
def onednn_product() -> Product | None:
    """``product(out, a, b, add)``: out = a b, or out += a b, by oneDNN; None where this PyTorch or this CPU has it not.

    ``a`` (m, k) and ``b`` (k, n), or (batch, m, k) and (batch, k, n), are real tensors of float32 on the CPU, not
    empty, dense or the transposes of dense ones; ``out`` is dense. The function checks some of that, and that the CPU
    has AVX-512, by C++ exceptions, which nothing catches here, and the rest not at all.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not library.exists():
        return None
    function = getattr(ctypes.CDLL(str(library)), _SYMBOL, None)
    if function is None:
        return None
    function.argtypes, function.restype = [ctypes.c_void_p] * 3 + [ctypes.c_float] * 2, None
    size = ctypes.sizeof(ctypes.c_void_p)

    def product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, add: bool) -> None:
        pointers = (ctypes.c_void_p * 3)(a._cdata, b._cdata, out._cdata)
        at = ctypes.addressof(pointers)
        function(at, at + size, at + 2 * size, float(add), 1.0)  # beta, alpha

    return product if _is_product(product) else None


def _is_product(product: Product) -> bool:
    """Whether it multiplies and adds what small numbers say exactly."""
    with _disable_current_modes():
        a, b = (torch.arange(6.0, device="cpu", dtype=torch.float32).view(shape) for shape in ((2, 3), (3, 2)))
        out = torch.full_like(a[:, :2], torch.nan).contiguous()
        product(out, a, b, False)
        product(out, a, b, True)
        return torch.equal(out, 2 * torch.mm(a, b))


@contextlib.contextmanager
def multiplying_by(products: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Code that Inductor writes meanwhile calls these for "mm", "addmm" and "bmm", with ``out=`` for the result.

    Its wrapper binds the namespace of such functions when it is loaded, and offers no other hook. A wrapper that was
    loaded before (the same code in another graph) keeps what it has: slower, never wrong.
    """
    module: Any = select_algorithm
    plain = module.extern_kernels
    module.extern_kernels = _Overlay(plain, products)
    try:
        yield
    finally:
        module.extern_kernels = plain


class _Overlay:
    """A namespace with some of its functions replaced; what is written to it goes to the plain one."""

    def __init__(self, plain: Any, own: Mapping[str, Callable[..., Any]]) -> None:
        vars(self).update(plain=plain, own=own)

    def __getattr__(self, name: str) -> Any:
        own = vars(self)["own"]
        return own[name] if name in own else getattr(vars(self)["plain"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["plain"], name, value)
