"""In which precision sums are carried out."""

from __future__ import annotations

import torch

_HALF = (torch.bfloat16, torch.float16)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32 in place of a half precision; any other dtype as it is."""
    return torch.float32 if dtype in _HALF else dtype
