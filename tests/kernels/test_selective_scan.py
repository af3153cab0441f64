"""The selective scan: the op against the recurrence."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import silu

from mstc import compat
from mstc.kernels import KernelArgumentError, selective_scan
from mstc.kernels.common.segments import SEGMENT
from mstc.kernels.selective_scan import blocks
from mstc.kernels.selective_scan.op import selective_scan_core
from mstc.kernels.selective_scan.reference import reference

Compare = Callable[..., None]
LENGTHS = [1, 15, 16, 17, 63, 64, 65, 1000]


def make(length: int, dtype: torch.dtype = torch.float32, extreme: bool = False, batch: int = 2) -> dict[str, Tensor]:
    """Inputs for D = 12, N = 5; extreme: decays of 0 and far below -20 mixed."""
    channels, columns = 12, 5
    steps = torch.rand(batch, length, channels)
    inputs = {
        "x": torch.randn(batch, length, channels),
        "dt": steps * torch.randint(2, steps.shape) if extreme else steps,
        "B": torch.randn(batch, length, columns),
        "C": torch.randn(batch, length, columns),
        "z": torch.randn(batch, length, channels),
    }
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    inputs["A"] = -torch.rand(channels, columns) * (40 if extreme else 1)
    inputs["D"] = torch.randn(channels)
    inputs["initial_state"] = torch.randn(batch, channels, columns)
    return inputs


def op(**inputs: Any) -> tuple[Tensor, Tensor]:
    return selective_scan(**inputs, output_final_state=True)


def exact(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor, A: Tensor, D: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    y, state = reference(x, dt, A, B, C, initial_state)
    return (y + D * x) * silu(z), state


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_matches_the_recurrence(length: int, extreme: bool, compare: Compare) -> None:
    compare(op, exact, make(length, extreme=extreme, batch=1 if length > 100 else 2))


def test_half_precision(compare: Compare) -> None:
    compare(lambda **i: core(**i), lambda **i: core_exact(**i), without_gate(make(130, torch.bfloat16)))


def without_gate(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in inputs.items() if n not in ("z", "D")}


def core(**inputs: Tensor) -> tuple[Tensor, Tensor]:
    return selective_scan(**inputs, output_final_state=True)


def core_exact(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    return reference(x, dt, A, B, C, initial_state)


def test_gradcheck() -> None:
    inputs = {n: t[..., :3].double().requires_grad_() for n, t in without_gate(make(5, batch=1)).items()}
    inputs["x"], inputs["dt"] = (inputs[n].detach()[..., :2].requires_grad_() for n in ("x", "dt"))
    inputs["A"] = inputs["A"].detach()[:2].requires_grad_()
    inputs["initial_state"] = inputs["initial_state"].detach()[:, :2].requires_grad_()
    names = list(inputs)
    for form in (core, core_exact):
        assert torch.autograd.gradcheck(
            lambda *a, f=form: f(**dict(zip(names, a, strict=True))), tuple(inputs.values()), fast_mode=True
        )


def test_packed_documents(compare: Compare) -> None:
    lengths = [5, 0, 64, SEGMENT + 3, 1]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    inputs = make(sum(lengths), batch=1)
    inputs["initial_state"] = torch.randn(len(lengths), *inputs["initial_state"].shape[1:])

    def one_by_one(initial_state: Tensor, A: Tensor, D: Tensor, **tokens: Tensor) -> tuple[Tensor, ...]:
        outs, states = [], []
        for i, (start, stop) in enumerate(pairwise(offsets.tolist())):
            before = initial_state[i : i + 1]
            if start == stop:
                states.append(before)
                continue
            part = {n: t[:, start:stop] for n, t in tokens.items()}
            o, s = exact(**part, A=A, D=D, initial_state=before)
            outs.append(o)
            states.append(s)
        return torch.cat(outs, 1), torch.cat(states)

    compare(lambda **i: op(**i, cu_seqlens=offsets), one_by_one, inputs)


def test_decoding_token_by_token(compare: Compare) -> None:
    def decode(initial_state: Tensor, A: Tensor, D: Tensor, **tokens: Tensor) -> tuple[Tensor, Tensor]:
        outs, state = [], initial_state
        for t in range(tokens["x"].shape[1]):
            part = {n: x[:, t : t + 1] for n, x in tokens.items()}
            o, state = op(**part, A=A, D=D, initial_state=state)
            outs.append(o)
        return torch.cat(outs, 1), state

    compare(decode, exact, make(9))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_opcheck(compiled: bool) -> None:
    i = {n: t.requires_grad_() for n, t in make(40).items()}
    tensors = (i["x"], i["dt"], i["A"], i["B"], i["C"], i["initial_state"])
    torch.library.opcheck(selective_scan_core, (*tensors, None, compiled))


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_compiled_code_takes_blocks(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of threads; the fixture sets it back."""
    taken: list[bool] = []
    original = blocks.run_forward
    monkeypatch.setattr(blocks, "run_forward", lambda *a: taken.append(True) or original(*a))
    torch.set_num_threads(threads)
    inputs = make(40)
    form = torch.compile(op, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(form(**inputs), op(**inputs))
    assert taken


def test_bodies_are_compiled_once_for_each_number_of_threads(uncompiled: list[Any]) -> None:
    """Their code shares channels among as many as torch has."""
    for threads in (1, 2, 1, 2):
        torch.set_num_threads(threads)
        compiled_op(**make(40))
    assert [(function, threads) for function, _, threads in uncompiled] == [
        (blocks.forward_block, 1),
        (blocks.forward_block, 2),
    ]


def test_tiles_grow_with_the_threads() -> None:
    a = torch.zeros(2048, 16)
    torch.set_num_threads(1)
    assert blocks._tiles(a) == [slice(512 * i, 512 * (i + 1)) for i in range(4)]
    torch.set_num_threads(2)
    assert blocks._tiles(a) == [slice(0, 1024), slice(1024, 2048)]


@pytest.mark.parametrize("threads", [1, None])
def test_threads_of_compiled_code(threads: int | None) -> None:
    torch.set_num_threads(2)
    x = torch.randn(64, 4096)
    body, code = run_and_get_code(lambda: compat.compile_for(lambda x: (x.exp() + 1.25,), [x], threads))
    torch.testing.assert_close(body(x)[0], x.exp() + 1.25)
    assert "exp()" in code[0]
    assert ("#pragma omp parallel" in code[0]) == (threads is None)


def compiled_op(**inputs: Any) -> tuple[Tensor, Tensor]:
    """The form of compiled code, from its op on: no outer compilation per shape."""
    y, final, _ = selective_scan_core(
        *(inputs[n] for n in ("x", "dt", "A", "B", "C", "initial_state")), inputs.get("cu_seqlens"), True
    )
    return y, final


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_blocks_match_the_recurrence(length: int, extreme: bool, compare: Compare) -> None:
    inputs = make(length, extreme=extreme, batch=1 if length > 100 else 2)
    compare(compiled_op, lambda **i: core_exact(**i), without_gate(inputs))


def test_blocks_in_half_precision(compare: Compare) -> None:
    compare(compiled_op, lambda **i: core_exact(**i), without_gate(make(130, torch.bfloat16)))


def test_blocks_of_packed_documents(compare: Compare) -> None:
    lengths = [5, 0, 64, blocks.STRETCH + 3, 1]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    inputs = without_gate(make(sum(lengths), batch=1))
    inputs["initial_state"] = torch.randn(len(lengths), *inputs["initial_state"].shape[1:])
    compare(lambda **i: compiled_op(**i, cu_seqlens=offsets), lambda **i: core(**i, cu_seqlens=offsets), inputs)


@pytest.mark.slow
def test_blocks_of_some_channels_and_long_segments(compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 4 channels, each with its gradients of A, and their sums into those of B and C; 64 tokens a segment."""
    monkeypatch.setattr(blocks, "TILE", 4 * 5)
    monkeypatch.setattr(blocks, "segment_tokens", lambda columns: 64)
    compare(compiled_op, lambda **i: core_exact(**i), without_gate(make(150)))


@pytest.mark.parametrize(("columns", "tokens"), [(1, 32), (16, 32), (17, 64), (64, 128), (1000, 512)])
def test_kept_states_are_at_most_half_the_channels_per_token(columns: int, tokens: int) -> None:
    assert blocks.segment_tokens(columns) == tokens
    assert blocks.STRETCH % tokens == 0


def test_split_anywhere() -> None:
    """The same algebra, elementwise: (A1, B1) then (A2, B2) = (A2 A1, A2 B1 + B2), A = exp(A sum dt)."""
    inputs = without_gate(make(50))
    whole, final = core(**inputs)
    first = {n: t if n in ("A", "initial_state") else t[:, :21] for n, t in inputs.items()}
    second = {n: t if n == "A" else t[:, 21:] for n, t in inputs.items() if n != "initial_state"}
    out1, state = core(**first)
    out2, added = core(**second)
    transition = (second["dt"].sum(1).unsqueeze(-1) * inputs["A"]).exp()
    torch.testing.assert_close(transition * state + added, final, rtol=1e-4, atol=1e-5)
    seen = (second["dt"].cumsum(1).unsqueeze(-1) * inputs["A"]).exp() * state.unsqueeze(1)
    out2 = out2 + (seen @ second["C"].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(torch.cat([out1, out2], 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("x", (2, 12)), ("dt", (2, 6, 11)), ("A", (11, 5)), ("B", (2, 6, 4)), ("D", (3,)), ("z", (2, 6))],
)
def test_bad_arguments(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(KernelArgumentError, match=rf"^{name}: got shape"):
        op(**{**make(6), name: torch.randn(shape)})
