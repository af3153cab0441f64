"""A training step on a GPU: the same loss and gradients as eager."""

from __future__ import annotations

import pytest
import torch

from mstc.cli.bench.job import Job
from mstc.cli.bench.worker import measure

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("system", ["inductor", "mstc"])
def test_same_loss_and_gradient_norm_as_eager(system: str) -> None:
    assert torch.cuda.is_available()

    def run(name: str) -> tuple[float, float]:
        result = measure(Job(system=name, model="llama-bytes", seq=4096, steps=2, device="cuda"))
        assert result.losses[0] == pytest.approx(result.losses[1], rel=1e-5)
        return result.losses[0], result.grad_norm

    assert run(system) == pytest.approx(run("eager"), rel=1e-4)
