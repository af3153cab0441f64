"""`mstc.wrap` compiles in place and changes nothing else about the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mstc
from mstc.cli.bench.models import MODELS, build_model

EAGERLY = {"lower": "eager", "mini_sequence": {"chunk_tokens": 8}, "lm_head": {"chunk_tokens": 8}}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return out


def test_the_same_object_class_and_keys_come_back() -> None:
    model = Mlp()
    keys = list(model.state_dict())
    wrapped = mstc.wrap(model, EAGERLY)
    assert wrapped is model and type(wrapped) is Mlp
    assert list(wrapped.state_dict()) == keys
    wrapped.load_state_dict(Mlp().state_dict())


def test_the_same_numbers_and_gradients() -> None:
    torch.manual_seed(0)
    model, x = Mlp().double(), torch.randn(2, 40, 8, dtype=torch.float64)

    def run() -> list[Tensor]:
        loss = model(x).square().mean()
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    expected = run()
    mstc.wrap(model, EAGERLY)
    for a, b in zip(expected, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_hooks_still_run() -> None:
    model, seen = Mlp(), []
    model.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    mstc.wrap(model, EAGERLY)(torch.randn(1, 16, 8))
    assert seen == [(1, 16, 8)]


def test_generate_gives_the_same_tokens() -> None:
    torch.manual_seed(0)
    model: Any = build_model(MODELS["llama-tiny"]).eval()
    prompt = torch.randint(0, 256, (1, 12))
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, **settings)
    assert torch.equal(mstc.wrap(model, EAGERLY).generate(prompt, **settings), expected)


@pytest.mark.parametrize("given", [lambda x: x, None, Mlp])
def test_only_modules_can_be_wrapped(given: Any) -> None:
    with pytest.raises(TypeError, match="mstc.wrap needs an nn.Module"):
        mstc.wrap(given)


def test_bad_options_are_refused_at_once() -> None:
    model = Mlp()
    with pytest.raises(mstc.OptionError, match="did you mean 'masks'"):
        mstc.wrap(model, {"mask": True})
    assert model._compiled_call_impl is None
