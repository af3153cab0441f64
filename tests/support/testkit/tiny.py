"""A model of two tokenwise regions around a mixer, with a head: small enough to compile in a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Tiny(nn.Module):
    """x -> x + mlp(norm(x)) -> a running mean over time -> x + mlp(norm(x)) -> head."""

    def __init__(
        self, width: int = 8, inner: int = 24, classes: int = 11, bias: bool = True, dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(width, inner, bias=bias) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(inner, width, bias=bias) for _ in range(2))
        self.head = nn.Linear(width, classes, bias=bias)
        self.to(dtype)

    def features(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = x + self.downs[i](F.gelu(self.ups[i](self.norms[i](x))))
            if i == 0:
                x = x + x.cumsum(1) / x.shape[1]
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))  # type: ignore[no-any-return]


def inputs(
    batch: int = 2, length: int = 23, width: int = 8, classes: int = 11, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Activations and labels."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, length, width, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, classes, (batch, length), generator=generator)


def step(model: nn.Module, loss: Loss = mean_loss) -> Any:
    """A function from inputs and labels to the loss."""

    def run(x: Tensor, labels: Tensor) -> Tensor:
        return loss(model(x), labels)

    return run
