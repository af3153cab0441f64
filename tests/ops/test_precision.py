"""bf16: no further from float64 than eager is, and gradients of weights summed in float32 over chunks."""

from __future__ import annotations

import pytest
import torch

from testkit.exactness import Gradients, chunked, gradients_of
from testkit.tiny import Tiny, inputs, step

SEEDS = range(5)


def build(dtype: torch.dtype, seed: int) -> Tiny:
    """The same weights for each dtype, all exactly representable in bf16."""
    model = Tiny(width=16, inner=48)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.2)
    return model.to(torch.bfloat16).to(dtype)


def measured(dtype: torch.dtype, seed: int, compile_it: bool) -> Gradients:
    model = build(dtype, seed)
    x, labels = inputs(2, 60, 16)
    fn = step(model)
    if compile_it:
        torch._dynamo.reset()
        fn = torch.compile(fn, backend="mstc", options=chunked(15, 15, "eager"))
    return gradients_of(fn, dict(model.named_parameters()), (x.to(torch.bfloat16).to(dtype), labels))[1]


def squared_distance(got: Gradients, reference: Gradients) -> float:
    """Sum over gradients of |g - r|^2 / |r|^2."""
    total = 0.0
    for name, r in reference.items():
        g = got[name]
        assert g is not None and r is not None
        total += float((g.double() - r.double()).square().sum() / r.double().square().sum())
    return total


def test_as_close_to_float64_as_eager() -> None:
    eager = mine = 0.0
    for seed in SEEDS:
        reference = measured(torch.float64, seed, compile_it=False)
        eager += squared_distance(measured(torch.bfloat16, seed, compile_it=False), reference)
        mine += squared_distance(measured(torch.bfloat16, seed, compile_it=True), reference)
    print(f"RMS distance from float64: mstc {mine**0.5:.4g}, eager {eager**0.5:.4g}")
    assert mine**0.5 <= 1.05 * eager**0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_have_the_dtype_of_their_parameters(dtype: torch.dtype) -> None:
    model = Tiny(dtype=dtype)
    x, labels = inputs(dtype=dtype)
    torch._dynamo.reset()
    fast = torch.compile(step(model), backend="mstc", options=chunked(7, 5, "eager"))
    _, gradients = gradients_of(fast, dict(model.named_parameters()), (x, labels))
    assert all(g is not None and g.dtype == dtype for g in gradients.values())


def test_float32_sums_are_closer_than_the_parameters_own() -> None:
    """What `accumulate` is for: many small chunks."""
    distances = {}
    reference = measured(torch.float64, 0, compile_it=False)
    for accumulate in ("float32", "param"):
        model = build(torch.bfloat16, 0)
        x, labels = inputs(2, 60, 16)
        torch._dynamo.reset()
        options = chunked(4, 4, "eager", accumulate=accumulate)
        fast = torch.compile(step(model), backend="mstc", options=options)
        got = gradients_of(fast, dict(model.named_parameters()), (x.bfloat16(), labels))[1]
        distances[accumulate] = squared_distance(got, reference) ** 0.5
    assert distances["float32"] < 0.8 * distances["param"], distances
