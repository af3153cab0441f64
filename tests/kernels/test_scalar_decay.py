"""Linear attention with a scalar decay: the op against the recurrence."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mstc import compat
from mstc.kernels.api import linear_attention
from mstc.kernels.common.segments import SEGMENT
from mstc.kernels.scalar_decay.chunked import BODY
from mstc.kernels.scalar_decay.op import scalar_decay
from mstc.kernels.scalar_decay.recurrent import fused_recurrent
from mstc.kernels.scalar_decay.reference import reference

LENGTHS = [1, 15, 63, 64, 65, 1000]
DECAYS = ["none", "head", "token", "extreme"]
Compare = Callable[..., None]


def make(
    length: int, decay: str, dtype: torch.dtype = torch.float32, batch: int = 2, key: int = 20, value: int = 33
) -> dict[str, Tensor]:
    """Inputs for B, T, H = 3; decay: see DECAYS."""
    heads = 3
    inputs = {
        "q": torch.randn(batch, length, heads, key),
        "k": torch.randn(batch, length, heads, key),
        "v": torch.randn(batch, length, heads, value),
    }
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    if decay == "head":
        inputs["decay"] = -torch.rand(heads)
    elif decay == "token":
        inputs["decay"] = -torch.rand(batch, length, heads)
    elif decay == "extreme":
        inputs["decay"] = torch.tensor([0.0, -20.0, -0.1])[torch.randint(3, (batch, length, heads))]
    inputs["initial_state"] = torch.randn(batch, heads, key, value)
    return inputs


def op(**inputs: Any) -> tuple[Tensor, Tensor]:
    return linear_attention(**inputs, output_final_state=True)


def exact(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if decay is not None and decay.dim() == 1:
        decay = decay.expand(q.shape[:3])
    return reference(q, k, v, decay, initial_state, q.shape[-1] ** -0.5)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", LENGTHS)
def test_matches_the_recurrence(length: int, decay: str, compare: Compare) -> None:
    compare(op, exact, make(length, decay))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", ["none", "token", "extreme"])
def test_half_precision(decay: str, dtype: torch.dtype, compare: Compare) -> None:
    compare(op, exact, make(150, decay, dtype))


@pytest.mark.parametrize(("key", "value"), [(1, 1), (256, 8), (8, 256)])
def test_widths(key: int, value: int, compare: Compare) -> None:
    compare(op, exact, make(70, "token", key=key, value=value))


def test_a_decay_of_minus_infinity_resets(compare: Compare) -> None:
    inputs = make(130, "token")
    inputs["decay"][:, [3, 64, 100]] = -torch.inf
    got, _ = op(**inputs)
    wanted, _ = exact(**{name: tensor.double() for name, tensor in inputs.items()})
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decay", ["none", "token"])
def test_gradcheck(decay: str) -> None:
    inputs = {n: t.double().requires_grad_() for n, t in make(6, decay, batch=1, key=2, value=3).items()}
    names = list(inputs)
    for form in (exact, op):
        assert torch.autograd.gradcheck(
            lambda *a, f=form: f(**dict(zip(names, a, strict=True))), tuple(inputs.values())
        )


def test_only_the_final_state_is_used(compare: Compare) -> None:
    inputs = make(70, "token")
    compare(lambda **i: op(**i)[1:], lambda **i: exact(**i)[1:], inputs)


@pytest.mark.parametrize("decay", ["none", "token"])
def test_packed_documents(decay: str, compare: Compare) -> None:
    lengths = [5, 0, 64, SEGMENT + 3, 1]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    inputs = make(sum(lengths), decay, batch=1)
    inputs["initial_state"] = torch.randn(len(lengths), *inputs["initial_state"].shape[1:])

    def one_by_one(initial_state: Tensor, **tokens: Tensor) -> tuple[Tensor, ...]:
        outs, states = [], []
        for i, (a, b) in enumerate(pairwise(offsets.tolist())):
            if a == b:
                states.append(initial_state[i : i + 1])
                continue
            o, s = exact(**{n: t[:, a:b] for n, t in tokens.items()}, initial_state=initial_state[i : i + 1])
            outs.append(o)
            states.append(s)
        return torch.cat(outs, 1), torch.cat(states)

    compare(lambda **i: op(**i, cu_seqlens=offsets), one_by_one, inputs)


def test_decoding_token_by_token(compare: Compare) -> None:
    def decode(initial_state: Tensor, **tokens: Tensor) -> tuple[Tensor, Tensor]:
        outs, state = [], initial_state
        for t in range(tokens["q"].shape[1]):
            o, state = fused_recurrent(
                *(tokens[n][:, t : t + 1] for n in ("q", "k", "v", "decay")), state, tokens["q"].shape[-1] ** -0.5
            )
            outs.append(o)
        return torch.cat(outs, 1), state

    compare(decode, exact, make(9, "token"))


def test_rows_of_short_sequences_are_taken_together(compare: Compare) -> None:
    compare(op, exact, make(10, "token", batch=70))


@pytest.mark.parametrize("decay", ["none", "token"])
def test_opcheck(decay: str) -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in make(70, decay).items()}
    arguments = (inputs["q"], inputs["k"], inputs["v"], inputs.get("decay"), inputs["initial_state"], None, 0.5, False)
    torch.library.opcheck(scalar_decay, arguments)
    packed = {n: t.detach().requires_grad_() for n, t in make(70, decay, batch=1).items()}
    offsets = torch.tensor([0, 30, 70])
    torch.library.opcheck(
        scalar_decay, (packed["q"], packed["k"], packed["v"], packed.get("decay"), None, offsets, 0.5, False)
    )


def test_compiles_whole(compare: Compare) -> None:
    form = torch.compile(op, backend="aot_eager", fullgraph=True)
    compare(form, exact, make(130, "token"))


@pytest.mark.inductor
def test_inductor_and_a_dynamic_length(compare: Compare) -> None:
    form = torch.compile(op, fullgraph=True, dynamic=True)
    for length in (70, 130):
        compare(form, exact, make(length, "token", key=16, value=16))


@pytest.mark.inductor
@pytest.mark.parametrize("decay", ["none", "token"])
def test_bodies_are_whole_under_inductor(decay: str) -> None:
    inputs = make(64, decay, batch=1)
    tokens = tuple(
        None if n not in inputs else inputs[n].transpose(1, 2).reshape(3, 1, 64, *inputs[n].shape[3:])
        for n in ("q", "k", "v", "decay")
    )
    state = inputs["initial_state"].reshape(3, 20, 33)
    forward = torch.compile(BODY.forward, fullgraph=True)
    for got, wanted in zip(forward(tokens, (), state), BODY.forward(tokens, (), state), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_bodies_of_many_shapes_are_all_compiled(uncompiled: list[Any]) -> None:
    """Dynamo would run the ninth shape, and those after it, uncompiled."""
    for key in [*range(1, 13), *range(1, 13)]:
        inputs = make(600, "token", key=key, value=4, batch=1)
        args = (inputs["q"], inputs["k"], inputs["v"], inputs["decay"], inputs["initial_state"], None, 0.5)
        for got, wanted in zip(scalar_decay(*args, True), scalar_decay(*args, False), strict=True):
            torch.testing.assert_close(got, wanted)
    assert len(uncompiled) == 12 * 2  # a whole segment, and the rest of 88 tokens


@pytest.mark.inductor
def test_a_body_with_none_among_its_inputs_and_outputs() -> None:
    calls: list[int] = []

    def body(tokens: tuple[Tensor | None, ...], x: Tensor) -> tuple[tuple[Tensor | None, ...], Tensor]:
        calls.append(x.shape[0])
        return (None, x * 2 if tokens[0] is None else tokens[0] + x), x + 1

    compiled = compat.compile_by_shape(body, contextlib.nullcontext)
    for size in (2, 3):
        for first in (None, torch.ones(size)):
            for _ in range(2):
                (nothing, got), more = compiled((first,), torch.arange(float(size)))
                assert nothing is None
                assert torch.equal(got, body((first,), torch.arange(float(size)))[0][1])
                assert torch.equal(more, torch.arange(float(size)) + 1)
    assert len(calls) == 2 * 2 * 3  # traced once, and called twice by this test, for each


def test_autocast() -> None:
    inputs = make(70, "token")
    with torch.autocast("cpu", torch.bfloat16):
        out, state = op(**inputs)
    low = {n: t.bfloat16() if n in ("q", "k", "v") else t for n, t in inputs.items()}
    wanted, wanted_state = op(**low)
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert torch.equal(out, wanted)
    assert torch.equal(state, wanted_state)


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    inputs = {n: t.requires_grad_() for n, t in make(128, "token").items()}
    with FlopCounterMode(display=False) as counter:
        op(**inputs)[0].sum().backward()
    tokens = 2 * 128 * 3
    forward = tokens * (2 * 64 * (20 + 33) + 4 * 20 * 33)
    backward = tokens * (2 * 64 * (3 * 20 + 2 * 33) + 10 * 20 * 33)
    assert counter.get_total_flops() == forward + backward


def test_double_backward_is_refused() -> None:
    inputs = {n: t.requires_grad_() for n, t in make(20, "token").items()}
    (grad,) = torch.autograd.grad(op(**inputs)[0].sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="scalar_decay_backward"):
        grad.sum().backward()
