"""``mstc::keep``: the mask of a dropout as a function of one seed per token.

    keep(seeds, sizes, dim, outer, inner, p)[..., t, ...] = mix((seeds[t] + c) * g) < (p - 1/2) 2^64

with c counting the other positions and `mix` the finalizer of SplitMix64 (Steele, Lea and Flood, 2014): each
token has a stream of that generator to itself. So the mask of a token depends on its seed alone: it is the same however
the tokens are cut, in the forward and where it is computed again. Plain integer arithmetic, so that
Inductor fuses it and nothing of the mask's size is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

torch.library.define(
    "mstc::keep", "(Tensor seeds, SymInt[] sizes, int dim, SymInt outer, SymInt inner, float p) -> Tensor"
)


def _signed(value: int) -> int:
    """64 bits read as a two's complement."""
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))

# Seeds are drawn from [0, SEEDS).
SEEDS = 2**63 - 1


@torch.library.impl("mstc::keep", "CompositeImplicitAutograd")
def _keep(seeds: torch.Tensor, sizes: Sequence[int], dim: int, outer: int, inner: int, p: float) -> torch.Tensor:
    """True with probability ``p``; size(dim) = outer * tokens * inner."""
    before, after = [*sizes[:dim], outer], [inner, *sizes[dim + 1 :]]
    others = math.prod(before) * math.prod(after)
    counter = torch.arange(others, device=seeds.device, dtype=torch.int64).view(*before, 1, *after)
    # Not ``counter * _GOLDEN``: Inductor takes that for arithmetic on indices, which must not overflow.
    z = (seeds.view(-1, *(1 for _ in after)) + counter) * _GOLDEN
    for shift, factor in _ROUNDS:
        # A logical shift: what an arithmetic one fills in is masked out.
        z = (z ^ ((z >> shift) & (2 ** (64 - shift) - 1))) * factor
    # The last step of the mixing changes low bits only; here the high ones decide.
    threshold = min(max(int((p - 0.5) * 2.0**64), -(2**63)), 2**63 - 1)
    return (z < threshold).reshape(sizes)
