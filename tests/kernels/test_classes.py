"""Decay over K, delta rule and diagonal plus low rank: each op against its recurrence."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from mstc.kernels.api import dplr_attention, linear_attention
from mstc.kernels.common.segments import SEGMENT
from mstc.kernels.delta_rule.op import delta_rule
from mstc.kernels.delta_rule.recurrent import fused_recurrent as delta_recurrent
from mstc.kernels.delta_rule.reference import reference as delta_reference
from mstc.kernels.dplr.op import dplr
from mstc.kernels.dplr.recurrent import fused_recurrent as dplr_recurrent
from mstc.kernels.dplr.reference import reference as dplr_reference
from mstc.kernels.vector_decay.op import vector_decay
from mstc.kernels.vector_decay.recurrent import fused_recurrent as vector_recurrent
from mstc.kernels.vector_decay.reference import reference as vector_reference
from testkit.shares import first_of

Compare = Callable[..., None]
LENGTHS = [1, 15, 63, 64, 65, 1000]
KINDS = ["vector", "bonus", "delta", "gated delta", "vector delta", "dplr"]
NAMES = ["q", "k", "v", "a", "b", "decay", "bonus", "beta", "initial_state"]
REFERENCES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "vector": vector_reference,
    "bonus": vector_reference,
    "delta": delta_reference,
    "gated delta": delta_reference,
    "vector delta": delta_reference,
    "dplr": dplr_reference,
}
RECURRENT: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "vector": vector_recurrent,
    "bonus": vector_recurrent,
    "delta": delta_recurrent,
    "gated delta": delta_recurrent,
    "vector delta": delta_recurrent,
    "dplr": dplr_recurrent,
}


def make(
    kind: str,
    length: int,
    dtype: torch.dtype = torch.float32,
    extreme: bool = False,
    batch: int = 2,
    key: int = 20,
    value: int = 33,
) -> dict[str, Tensor]:
    """Inputs for B, T, H = 3; extreme: log decays of 0, -0.1 and -20 mixed."""
    heads = 3
    q, k, a = (torch.randn(batch, length, heads, key) for _ in range(3))
    v = torch.randn(batch, length, heads, value)
    inputs = {"q": q, "k": normalize(k, dim=-1), "v": v}
    if kind == "dplr":
        inputs["a"] = -normalize(a, dim=-1)
        inputs["b"] = -inputs["a"] * torch.rand(batch, length, heads, key)
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    shape = (batch, length, heads) if kind == "gated delta" else (batch, length, heads, key)
    if kind != "delta":
        mixed = torch.tensor([0.0, -20.0, -0.1])[torch.randint(3, shape)]
        inputs["decay"] = mixed if extreme else -torch.rand(shape)
    if kind == "bonus":
        inputs["bonus"] = torch.randn(heads, key)
    if "delta" in kind:
        inputs["beta"] = torch.rand(batch, length, heads)
    inputs["initial_state"] = torch.randn(batch, heads, key, value)
    return inputs


def op(**inputs: Any) -> tuple[Tensor, Tensor]:
    if "a" in inputs:
        return dplr_attention(**inputs, output_final_state=True)
    return linear_attention(**inputs, output_final_state=True)


def by(forms: dict[str, Callable[..., tuple[Tensor, Tensor]]], kind: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The form of ``kind`` as a function of named tensors."""

    def run(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        given: dict[str, Tensor | None] = dict(inputs)
        given.setdefault("initial_state", None)
        if kind == "vector":
            given["bonus"] = None
        if kind == "delta":
            given["decay"] = None
        return forms[kind](**given, scale=inputs["q"].shape[-1] ** -0.5)

    return run


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_recurrence(kind: str, length: int, extreme: bool, compare: Compare) -> None:
    compare(op, by(REFERENCES, kind), make(kind, length, extreme=extreme, batch=1 if length > 100 else 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, dtype: torch.dtype, compare: Compare) -> None:
    compare(op, by(REFERENCES, kind), make(kind, 130, dtype))


@pytest.mark.parametrize(("key", "value"), [(1, 1), (256, 8), (8, 256)])
@pytest.mark.parametrize("kind", KINDS)
def test_widths(kind: str, key: int, value: int, compare: Compare) -> None:
    compare(op, by(REFERENCES, kind), make(kind, 70, key=key, value=value))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    inputs = {n: t.double().requires_grad_() for n, t in make(kind, 5, batch=1, key=2, value=2).items()}
    names = list(inputs)
    for form in (by(REFERENCES, kind), op):
        assert torch.autograd.gradcheck(
            lambda *a, f=form: f(**dict(zip(names, a, strict=True))), tuple(inputs.values()), fast_mode=True
        )


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents(kind: str, compare: Compare) -> None:
    lengths = [5, 0, 64, SEGMENT + 3, 1]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    inputs = make(kind, sum(lengths), batch=1)
    inputs["initial_state"] = torch.randn(len(lengths), *inputs["initial_state"].shape[1:])
    form = by(REFERENCES, kind)

    def one_by_one(initial_state: Tensor, **tensors: Tensor) -> tuple[Tensor, ...]:
        outs, states = [], []
        for i, (start, stop) in enumerate(pairwise(offsets.tolist())):
            if start == stop:
                states.append(initial_state[i : i + 1])
                continue
            part = {n: t if n == "bonus" else t[:, start:stop] for n, t in tensors.items()}
            o, s = form(**part, initial_state=initial_state[i : i + 1])
            outs.append(o)
            states.append(s)
        return torch.cat(outs, 1), torch.cat(states)

    compare(lambda **i: op(**i, cu_seqlens=offsets), one_by_one, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_token_by_token(kind: str, compare: Compare) -> None:
    form = by(RECURRENT, kind)

    def decode(initial_state: Tensor, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        outs, state = [], initial_state
        for t in range(tensors["q"].shape[1]):
            token = {n: x if n == "bonus" else x[:, t : t + 1] for n, x in tensors.items()}
            o, state = form(**token, initial_state=state)
            outs.append(o)
        return torch.cat(outs, 1), state

    compare(decode, by(REFERENCES, kind), make(kind, 9))


@pytest.mark.parametrize("kind", ["bonus", "gated delta", "dplr"])
def test_opcheck(kind: str) -> None:
    ops: dict[str, Any] = {"bonus": vector_decay, "gated delta": delta_rule, "dplr": dplr}
    inputs = [t.requires_grad_() for t in make(kind, 70, key=8, value=8).values()]
    torch.library.opcheck(ops[kind], (*inputs, None, 0.5, False))


@pytest.mark.parametrize("kind", first_of(KINDS, ["gated delta"]))
def test_compiles_whole(kind: str, compare: Compare) -> None:
    torch._dynamo.reset()
    form = torch.compile(op, backend="aot_eager", fullgraph=True)
    inputs = make(kind, 70, key=8, value=8)
    with torch.no_grad():
        got, wanted = form(**inputs), op(**inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.inductor
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_inductor(kind: str, compare: Compare) -> None:
    torch._dynamo.reset()
    compare(torch.compile(op, fullgraph=True), by(REFERENCES, kind), make(kind, 130))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    inputs = make(kind, 70, key=8, value=8)
    with torch.autocast("cpu", torch.bfloat16):
        got = op(**inputs)
    low = {n: t.bfloat16() if n in ("q", "k", "v", "a", "b") else t for n, t in inputs.items()}
    wanted = op(**low)
    assert got[0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_flops_grow_with_tokens(kind: str) -> None:
    counts = []
    for length in (64, 128):
        inputs = {n: t.requires_grad_() for n, t in make(kind, length, key=8, value=8).items()}
        with FlopCounterMode(display=False) as counter:
            op(**inputs)[0].sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] > 0
    assert counts[1] == 2 * counts[0]
