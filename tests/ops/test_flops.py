"""A FLOP counter sees what runs inside a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mstc.backend import mstc

OPTIONS = {"lower": "eager", "mini_sequence": {"chunk_tokens": 16}, "lm_head": {"chunk_tokens": 16}}


def loss(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, head: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x = x + torch.nn.functional.gelu(x @ up) @ down
    x = x + torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    return torch.nn.functional.cross_entropy((x @ head)[0], y)


def inputs(tokens: int) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    shapes = [(1, tokens, 8), (8, 24), (24, 8), (8, 32)]
    values = [torch.randn(s, generator=gen, requires_grad=True) for s in shapes]
    return [*values, torch.randint(32, (tokens,), generator=gen)]


class Counter(TorchDispatchMode):
    """As `FlopCounterMode` counts, without its hooks on modules."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "mstc":
            flops = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
            self.found[str(func)] = self.found.get(str(func), 0) + flops
        return out


def counted(given: list[torch.Tensor], *, dynamic: bool = False) -> dict[str, int]:
    """FLOPs by op of one step; the counter stands inside the compiled function, since Dynamo does nothing under it."""
    torch._dynamo.reset()
    counter = Counter()

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        run = mstc(gm, inputs, options=OPTIONS)

        def counting(*args: Any) -> Any:
            with counter:
                return run(*args)

        return counting

    result = torch.compile(loss, backend=backend, dynamic=dynamic)(*given)
    with counter:
        result.backward()
    return counter.found


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("tokens", [64, 96])
def test_products_in_loops(dynamic: bool, tokens: int) -> None:
    found = counted(inputs(tokens), dynamic=dynamic)
    mlp, head = 2 * tokens * 2 * 8 * 24, 2 * tokens * 8 * 32
    again = mlp // 2  # the backward makes the hidden layer again, and never the second product
    assert found["mstc.loop.default"] == mlp
    assert found["mstc.loop_backward.default"] == 2 * mlp + again
    assert found["mstc.loss_loop.default"] == 3 * head


def test_frozen_weights_have_no_products_of_their_own() -> None:
    given = inputs(64)
    given[1].requires_grad_(False)
    mlp = 2 * 64 * 2 * 8 * 24
    assert counted(given)["mstc.loop_backward.default"] == 2 * mlp
