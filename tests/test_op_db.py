"""PyTorch's own list of ops with their samples, each among products: equal to eager, forward and every gradient.

Every tensor of a sample that needs a gradient comes out of a product, straight or with its first and last axis
exchanged, so that the axes an op works along are tokens in one program and features in the next; what the op returns
goes into a product again. Chunks of two tokens are forced.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import UnaryUfuncInfo
from torch.utils import _pytree as pytree

from testkit.exactness import BOUNDS, gradient_errors
from testkit.shares import every

DTYPE = torch.float64
OPTIONS = {"lower": "aot_eager", "mini_sequence": {"chunk_tokens": 2}, "lm_head": {"chunk_tokens": 2}}
SAMPLES = 8
WIDTH = 3

# Ops for which eager's numbers are no reference, by their names.
NO_REFERENCE = {
    "as_strided_scatter": "PyTorch's derivative is not that of the function (its own gradcheck fails)",
    "empty": "memory that nobody wrote",
    "empty_like": "memory that nobody wrote",
    "empty_permuted": "memory that nobody wrote",
    "empty_strided": "memory that nobody wrote",
    "new_empty": "memory that nobody wrote",
    "new_empty_strided": "memory that nobody wrote",
    "to_sparse": "comparisons of sparse tensors are not implemented",
    "chalf": "torch.equal has no complex half",
    "native_dropout_backward": "AOTAutograd fails with exchanged axes alike",
    "linalg.matrix_power": "to the power 0, eager returns zeros for the gradient of what is not used",
}


@dataclass(eq=False)
class Program(nn.Module):
    """One sample of an op among products.

    call: the op's results from the sample's tensors; tensors: of the sample; differentiable: which of them get
    gradients; swapped: whether first and last axis are exchanged between a product and the op.
    """

    call: Callable[[Sequence[Tensor]], list[Tensor]]
    tensors: list[Tensor]
    differentiable: list[bool]
    swapped: bool

    def inputs(self) -> list[Tensor]:
        """Fresh leaves: the sample's tensors as they go into the products, then the products' weights."""
        generator = torch.Generator().manual_seed(0)
        pairs = zip(self.tensors, self.differentiable, strict=True)
        leaves = [self._turned(t, need).clone().requires_grad_(need) for t, need in pairs]
        # Diagonal: the op is to see the sample's own numbers, which keep to its domain.
        before = [torch.eye(x.shape[-1], dtype=DTYPE).requires_grad_() for x in leaves if x.requires_grad and x.dim()]
        with torch.no_grad():
            results = self.call([t.detach() for t in self.tensors])
        after = [torch.randn(r.shape[-1], WIDTH, generator=generator, dtype=DTYPE) for r in results if _matrix(r)]
        return [*leaves, *before, *(w.requires_grad_() for w in after)]

    def __post_init__(self) -> None:
        super().__init__()

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        count = len(self.tensors)
        weights = iter(inputs[count:])
        values = []
        for x, need in zip(inputs[:count], self.differentiable, strict=True):
            values.append(self._turned(F.linear(x, next(weights)), need) if need and x.dim() else x)
        results = self.call(values)
        return [torch.sin(r / (1 + r * r) @ next(weights)) if _matrix(r) else r for r in results]

    def _turned(self, x: Tensor, need: bool) -> Tensor:
        return x.transpose(0, -1) if need and self.swapped and x.dim() > 1 else x


def _matrix(result: Tensor) -> bool:
    return result.dtype == DTYPE and result.dim() > 1


def programs_of(op: Any) -> Iterator[Program]:
    """One for each sample that has a matrix to work on, every second one with its axes exchanged."""
    samples = op.sample_inputs("cpu", DTYPE, requires_grad=op.supports_autograd)
    count = 0
    for sample in samples:
        if isinstance(op, UnaryUfuncInfo) and sample.input.dim() == 1:
            sample.input = torch.stack([sample.input, sample.input.flip(0)]).detach().requires_grad_()
        leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[i].detach().clone() for i in where]
        needs = [leaves[i].requires_grad and leaves[i].dtype == DTYPE for i in where]
        if not any(need and t.dim() > 1 and t.numel() > 1 for t, need in zip(tensors, needs, strict=True)):
            continue

        def call(values: Sequence[Tensor], leaves: Any = leaves, where: Any = where, spec: Any = spec) -> list[Tensor]:
            given = list(leaves)
            for i, value in zip(where, values, strict=True):
                given[i] = value
            x, args, kwargs = pytree.tree_unflatten(given, spec)
            return [r for r in pytree.tree_leaves(op.op(x, *args, **kwargs)) if isinstance(r, Tensor)]

        count += 1
        yield Program(call, tensors, needs, swapped=count % 2 == 0)


def outcome(program: Callable[..., Any], inputs: Sequence[Tensor]) -> dict[str, Tensor | None]:
    """Results, and the gradients of the sum of their squares."""
    torch.manual_seed(3)
    results = list(program(*inputs))
    smooth = [r for r in results if r.requires_grad]
    if smooth:
        torch.stack([(r.abs() if r.is_complex() else r).square().sum() for r in smooth]).sum().backward()
    found = {f"gradient {i}": x.grad for i, x in enumerate(inputs) if x.requires_grad}
    return found | {f"result {i}": r.detach() for i, r in enumerate(results)}


def check(got: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        other = got[name]
        assert (value is None) == (other is None), f"{name} is there on one side only"
        if value is not None and other is not None:
            assert (other.shape, other.dtype) == (value.shape, value.dtype), name
            assert value.is_floating_point() or torch.equal(other, value), name
    floats = [n for n, v in expected.items() if v is not None and v.is_floating_point()]
    for group in ("gradient", "result"):
        names = [n for n in floats if n.startswith(group)]
        errors = gradient_errors({n: got[n] for n in names}, {n: expected[n] for n in names}, least=1e-4)
        for name, error in errors.items():
            assert error <= BOUNDS[DTYPE], f"{name} differs by {error:.2e}"


OPS = [op for op in op_db if DTYPE in op.dtypes and op.supports_autograd and op.name not in NO_REFERENCE]


def name_of(op: Any) -> str:
    return f"{op.name}-{op.variant_test_name}".strip("-")


def check_samples(op: Any, most: int) -> None:
    """The first samples that eager takes."""
    checked, reason = 0, "none has a matrix to work on"
    for program in itertools.islice(programs_of(op), most):
        try:
            expected = outcome(program, program.inputs())
        except (RuntimeError, NotImplementedError) as refusal:  # no kernel, or none for exchanged axes
            reason = str(refusal)
            continue
        checked += 1
        torch._dynamo.reset()
        check(outcome(torch.compile(program, backend="mstc", options=OPTIONS), program.inputs()), expected)
    if not checked:
        pytest.skip(f"no sample of {op.name}: {reason}")


@pytest.mark.parametrize("op", every(4, OPS), ids=map(name_of, OPS))
def test_an_op_among_products(op: Any) -> None:
    check_samples(op, 2)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS, ids=name_of)
def test_more_samples_of_an_op_among_products(op: Any) -> None:
    check_samples(op, SAMPLES)
