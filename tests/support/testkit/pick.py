"""Draws the sizes, flags and tensors of random calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

SIZES = (1, 2, 3, 4, 6)


class Pick:
    """Draws sizes, flags and tensors."""

    def __init__(self, draw: Callable[..., Any]) -> None:
        self._draw = draw
        self._random = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def int(self, low: int, high: int) -> int:
        return int(self._draw(st.integers(low, high)))

    def flag(self) -> bool:
        return bool(self._draw(st.booleans()))

    def one(self, *values: Any) -> Any:
        return self._draw(st.sampled_from(values))

    def size(self) -> int:
        return int(self._draw(st.sampled_from(SIZES)))

    def shape(self, low: int = 1, high: int = 4) -> list[int]:
        return [self.size() for _ in range(self.int(low, high))]

    def tensor(self, shape: list[int], dtype: torch.dtype = torch.float64) -> Tensor:
        if dtype.is_floating_point:
            return torch.randn(shape, dtype=dtype, generator=self._random)
        return torch.randint(0, 2, shape, generator=self._random).to(dtype)

    def indices(self, shape: list[int], below: int) -> Tensor:
        return torch.randint(0, below, shape, generator=self._random)

    def dim(self, shape: list[int]) -> int:
        return self.int(-len(shape), len(shape) - 1)

    def order(self, count: int) -> list[int]:
        return list(self._draw(st.permutations(range(count))))

    def dims(self, shape: list[int]) -> list[int]:
        chosen = self._draw(st.lists(st.sampled_from(range(len(shape))), unique=True, min_size=1))
        return [d - len(shape) if self.flag() else d for d in chosen]

    def smaller(self, shape: list[int]) -> list[int]:
        """A shape that broadcasts to ``shape``: leading dimensions left out, others 1."""
        return [1 if self.flag() else n for n in shape[self.int(0, len(shape)) :]]

    def regroup(self, shape: list[int]) -> list[int]:
        """Another shape of as many elements."""
        left, result = math.prod(shape), []
        while left > 1 and len(result) < 4:
            divisors = [d for d in range(1, left + 1) if left % d == 0]
            result.append(self._draw(st.sampled_from(divisors)))
            left //= result[-1]
        return [*result, left]
