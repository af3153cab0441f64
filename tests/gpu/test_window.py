"""Attention to a window on a GPU: FlashAttention-2 in half precision, products in blocks of queries otherwise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mstc.ops.window_attention import WINDOW_ATTENTION

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_against_the_mask_of_all_pairs(dtype: torch.dtype, causal: bool) -> None:
    """Outputs and gradients no further from float64 than twice what PyTorch's attention is."""
    generator = torch.Generator("cuda").manual_seed(0)
    made = [torch.randn(2, 1000, n, 64, generator=generator, device="cuda", dtype=dtype) for n in (8, 2, 2, 8)]
    distance = torch.arange(1000, device="cuda")[:, None] - torch.arange(1000, device="cuda")
    mask = (distance < 300) & ((distance >= 0) if causal else (distance > -300))

    def run(ours: bool, wide: bool = False) -> list[torch.Tensor]:
        q, k, v, grad = (x.transpose(1, 2).to(torch.float64 if wide else dtype).detach() for x in made)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        if ours:
            out = WINDOW_ATTENTION(*leaves, 300, causal)
        else:
            out = F.scaled_dot_product_attention(*leaves, attn_mask=mask, enable_gqa=True)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    for found, usual, exact in zip(run(True), run(False), run(False, wide=True), strict=True):
        error, bound = ((x.double() - exact).abs().max() for x in (found, usual))
        assert error <= 2 * bound


def test_memory_grows_with_the_length() -> None:
    """Nothing of all pairs: what forward and backward hold at most doubles with the length."""

    def held(length: int) -> int:
        q, k, v = (torch.randn(1, length, 4, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        WINDOW_ATTENTION(*leaves, 256, True).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    held(4096)
    assert held(32768) < 2.2 * held(16384)
