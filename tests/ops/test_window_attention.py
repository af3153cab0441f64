"""Attention to a window of keys against PyTorch's attention with the window's mask."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mstc import compat
from mstc.ops import window_attention as op

window_attention = torch.ops.mstc.window_attention.default


def band(length: int, window: int, causal: bool) -> Tensor:
    """True where a query sees a key."""
    distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
    return (distance < window) & ((distance >= 0) if causal else (distance > -window))


def operands(
    length: int, heads: tuple[int, int] = (2, 2), width: int = 8, batch: int = 2, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, k, v with heads inside of tokens, as models have them, and the gradient of the result."""
    generator = torch.Generator().manual_seed(length)
    counts = (heads[0], heads[1], heads[1], heads[0])
    made = [torch.randn(batch, length, n, width, generator=generator, dtype=torch.float64) for n in counts]
    return [x.to(dtype).transpose(1, 2).requires_grad_(i < 3) for i, x in enumerate(made)]


def expected(
    given: list[Tensor], window: int, causal: bool, scale: float | None = None, **vectors: Tensor
) -> tuple[Tensor, ...]:
    q, k, v, grad = given
    mask = band(q.shape[2], window, causal)
    if "seen" in vectors:
        mask = mask & vectors["seen"][:, None, None]
    if "documents" in vectors:
        mask = mask & (vectors["documents"][:, None, :, None] == vectors["documents"][:, None, None])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out, *torch.autograd.grad(out, (q, k, v), grad)


def found(
    given: list[Tensor], window: int, causal: bool, scale: float | None = None, **vectors: Tensor
) -> tuple[Tensor, ...]:
    q, k, v, grad = given
    out = window_attention(q, k, v, window, causal, scale=scale, **vectors)
    return out, *torch.autograd.grad(out, (q, k, v), grad)


@pytest.fixture(params=["kernel", "products"])
def form(request: pytest.FixtureRequest) -> object:
    """The CPU's kernel a block at a time, and the plain products of devices without one."""
    if request.param == "products":
        with mock.patch.object(op, "_on_cpu", return_value=False):
            yield request.param
    else:
        yield request.param


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "window"), [(7, 1), (7, 3), (130, 5), (300, 128), (129, 128), (600, 512), (50, 64)])
@pytest.mark.usefixtures("form")
def test_the_same_numbers(length: int, window: int, causal: bool) -> None:
    """Blocks that are whole, begun, and wider than the sequence; a window of one and of more than there is."""
    given = operands(length)
    for ours, theirs in zip(found(given, window, causal), expected(given, window, causal), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("heads", [(4, 2), (6, 1)])
@pytest.mark.usefixtures("form")
def test_heads_that_share_keys(heads: tuple[int, int]) -> None:
    given = operands(200, heads)
    for ours, theirs in zip(found(given, 40, True, 0.3), expected(given, 40, True, 0.3), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.usefixtures("form")
def test_precision(dtype: torch.dtype) -> None:
    """No further from float64 than twice PyTorch's own attention."""
    given = operands(500, (4, 2), 16, dtype=dtype)
    exact = expected([x.detach().double().requires_grad_(x.requires_grad) for x in given], 100, True)
    for ours, theirs, wanted in zip(found(given, 100, True), expected(given, 100, True), exact, strict=True):
        error, bound = ((x - wanted).abs().max() for x in (ours, theirs))
        assert ours.dtype == dtype
        assert error <= 2 * bound


@pytest.mark.usefixtures("form")
def test_extreme_scores() -> None:
    """Scores of which one outweighs all others, and keys outside the window that would outweigh them, do no harm."""
    q, k, v, grad = operands(300, dtype=torch.float32)
    given = [q.detach().mul(1e3).requires_grad_(), k.detach().mul(1e3).requires_grad_(), v, grad]
    ours, theirs = found(given, 20, True), expected(given, 20, True)
    torch.testing.assert_close(ours[0], theirs[0])
    assert all(torch.isfinite(x).all() for x in ours)


def test_nothing_outside_the_window_is_read() -> None:
    q, k, v, _ = (x.detach() for x in operands(300))
    whole = window_attention(q, k, v, 20, True)
    poisoned = [x.clone() for x in (k, v)]
    for x in poisoned:
        x[:, :, :200] = torch.nan
    after = window_attention(q, *poisoned, 20, True)
    first = 200 + 20 + op.block_rows(20)  # a block reads the keys that one of its queries sees
    torch.testing.assert_close(after[:, :, first:], whole[:, :, first:])
    assert after[:, :, :200].isnan().all()


def test_opcheck() -> None:
    given = [x.float().detach().requires_grad_() for x in operands(70, (4, 2))[:3]]
    vectors = {"documents": torch.arange(70)[None] // 30, "seen": torch.ones(2, 70, dtype=torch.bool)}
    for more in ((None, None), vectors.values()):
        torch.library.opcheck(torch.ops.mstc.window_attention_forward.default, (*given, 16, True, None, *more))
    torch.library.opcheck(torch.ops.mstc.window_attention.default, (*given, 16, False), {"scale": 0.5, **vectors})


# ------------------------------------------------------------------ documents and hidden keys


def hidden(length: int) -> dict[str, Tensor]:
    """Vectors of two sequences: of one the keys at the start are hidden, so that its first queries see nothing, of the
    other many at the end; documents as they are packed, of different lengths."""
    at = torch.arange(length)
    return {
        "seen": torch.stack([at >= length // 3, at < length // 4]),
        "documents": torch.stack([at // max(length // 3, 1), (at >= length // 5) * 7]),
    }


@pytest.mark.parametrize("names", [("seen",), ("documents",), ("documents", "seen")])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "window"), [(7, 3), (300, op.EVERYTHING), (600, 100), (600, op.EVERYTHING)])
@pytest.mark.usefixtures("form")
def test_documents_and_hidden_keys(length: int, window: int, causal: bool, names: tuple[str, ...]) -> None:
    given = operands(length, (4, 2))
    vectors = {n: x for n, x in hidden(length).items() if n in names}
    ours, theirs = (compute(given, window, causal, **vectors) for compute in (found, expected))
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("form")
def test_a_vector_of_all_sequences_and_documents_in_any_order() -> None:
    given, documents = operands(300), torch.arange(300)[None] * 7 % 5
    ours, theirs = (compute(given, op.EVERYTHING, True, documents=documents) for compute in (found, expected))
    torch.testing.assert_close(ours[0], theirs[0])


def test_on_a_cpu_other_documents_are_not_read() -> None:
    q, k, v, _ = (x.detach() for x in operands(600))
    documents = (torch.arange(600) >= 512)[None]
    whole = window_attention(q, k, v, op.EVERYTHING, True, documents=documents)
    k[:, :, :512], v[:, :, :512] = torch.nan, torch.nan
    after = window_attention(q, k, v, op.EVERYTHING, True, documents=documents)
    torch.testing.assert_close(after[:, :, 512:], whole[:, :, 512:])


@pytest.mark.parametrize("causal", [True, False])
def test_flops_are_of_the_pairs_that_are_seen(causal: bool) -> None:
    q, k, v, grad = operands(100, batch=3)
    seen = int(band(100, 9, causal).sum())
    assert op.pairs(100, 9, causal) == seen
    with FlopCounterMode(display=False) as counter:
        out = window_attention(q, k, v, 9, causal)
        forward = counter.get_total_flops()
        out.backward(grad)
    assert forward == 2 * 3 * 2 * seen * 16
    assert counter.get_total_flops() - forward == 2 * 3 * 2 * seen * (3 * 8 + 2 * 8)


def test_layout_of_gradients() -> None:
    """As the fakes say, whatever the layout of the operands."""
    for give in (lambda x: x, lambda x: x.contiguous(), lambda x: x.mT.contiguous().mT):
        given = [give(x.detach()).requires_grad_() for x in operands(40)[:3]]
        out = window_attention(*given, 8, True)
        grads = torch.autograd.grad(out.sum(), given)
        assert [g.stride() for g in grads] == [torch.empty_like(x).stride() for x in given]


def test_the_calls_of_flash_kernels() -> None:
    """Their schemas take what is passed to them, and results lie as is said; no kernel runs."""
    with compat.FakeTensorMode():
        q, k, v, grad = (
            torch.empty(2, 64, n, 32, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for n in (4, 2, 2, 4)
        )
        out, lse = compat.flash_window(q, k, v, 15, 0, None)
        like, numbers = op._empty(q, v)
        assert (out.shape, out.stride(), out.dtype) == (like.shape, like.stride(), like.dtype)
        assert (lse.shape, lse.dtype) == (numbers.shape, numbers.dtype)
        for made, x in zip(compat.flash_window_backward(grad, q, k, v, out, lse, 15, 0, None), (q, k, v), strict=True):
            assert (made.shape, made.stride(), made.dtype) == (x.shape, x.stride(), x.dtype)
