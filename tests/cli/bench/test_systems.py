"""Every compared system does the same work: the same loss from the same model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mstc.cli.bench.models import MODELS, build_model
from mstc.cli.bench.systems import INDUCTOR_VARIANTS, SYSTEMS
from mstc.compat import set_activation_memory_budget
from testkit.versions import BEFORE_2_13, NEEDS_LINEAR_CE


@pytest.fixture(autouse=True)
def _budget() -> Iterator[None]:
    yield
    set_activation_memory_budget(1.0)


def loss_and_norm(system: str) -> tuple[float, float]:
    torch.manual_seed(0)
    model = build_model(MODELS["llama-tiny"])
    ids = torch.randint(0, MODELS["llama-tiny"].vocab, (2, 40))
    with torch.compiler.set_stance("force_eager"):
        loss = SYSTEMS[system].build(model, {})(ids)
        torch.autograd.backward(loss)
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return loss.item(), norm.item()


_MARKS = {
    "inductor-linear-ce": [NEEDS_LINEAR_CE],
    "liger": [pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernels need a GPU")],
}


@pytest.mark.parametrize("system", [pytest.param(s, marks=_MARKS.get(s, [])) for s in SYSTEMS])
def test_same_loss_and_gradient_as_eager(system: str) -> None:
    assert loss_and_norm(system) == pytest.approx(loss_and_norm("eager"), rel=1e-5)


def test_the_variants_are_systems() -> None:
    assert len(INDUCTOR_VARIANTS) == 4 - BEFORE_2_13 and set(INDUCTOR_VARIANTS) <= set(SYSTEMS)
