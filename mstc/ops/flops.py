"""FLOPs of the loop ops and of products, as `FlopCounterMode` counts them (2 per multiply-add)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from mstc.ops import loop as _registered  # noqa: F401  (the ops that are counted here)
from mstc.ops import products as _products  # noqa: F401
from mstc.ops.program import program


def _forward(tokens: Any, shared: Any, lengths: Sequence[int], key: str, **_: Any) -> int:
    return int(program(key).flops(lengths)[0])


def _backward(grads: Any, tokens: Any, shared: Any, kept: Any, lengths: Sequence[int], key: str, **_: Any) -> int:
    return int(program(key).flops(lengths)[1])


def _loss(tokens: Any, shared: Any, seeds: Any, lengths: Sequence[int], key: str, **_: Any) -> int:
    """The joint body makes values and gradients."""
    return int(program(key).flops(lengths)[1])


def _product(out: Sequence[int], a: Sequence[int], b: Sequence[int], add: bool, **_: Any) -> int:
    return 2 * math.prod(out) * a[-1]


register_flop_formula(torch.ops.mstc.loop)(_forward)
register_flop_formula(torch.ops.mstc.loop_backward)(_backward)
register_flop_formula(torch.ops.mstc.loss_loop)(_loss)
register_flop_formula(torch.ops.mstc.product)(_product)
