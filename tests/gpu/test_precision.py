"""bf16 on a GPU: gradients no further from float64 than eager's, with weights' gradients multiplied on tensor cores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from testkit.exactness import Gradients, chunked, gradient_errors, gradients_of

pytestmark = pytest.mark.gpu


def _gradients(dtype: torch.dtype, compiled: bool) -> Gradients:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to(torch.bfloat16).to("cuda", dtype)
    x = torch.randn(2, 1024, 256, device="cuda").to(torch.bfloat16).to(dtype)
    y = torch.randint(0, 256, (2048,), device="cuda")

    def step(x: Tensor) -> Tensor:
        logits = model(x).flatten(0, 1)
        return F.cross_entropy(logits.float() if dtype is torch.bfloat16 else logits, y)

    torch._dynamo.reset()
    fn = torch.compile(step, backend="mstc", options=chunked(256, 256, "inductor")) if compiled else step
    return gradients_of(fn, dict(model.named_parameters()), (x,))[1]


def test_no_further_from_float64_than_eager() -> None:
    assert torch.cuda.is_available()
    exact = _gradients(torch.float64, compiled=False)
    eager, ours = (gradient_errors(_gradients(torch.bfloat16, c), exact) for c in (False, True))
    print({name: (eager[name], ours[name]) for name in exact})
    assert all(ours[name] <= 1.05 * eager[name] for name in exact)
