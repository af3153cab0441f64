"""exp for bodies that keep values in registers: elementwise operations only.

Compiled on a CPU, `Tensor.exp` is a call into a vector library, before which every register that is in use goes to
memory and after which it comes back. The scan takes an exponential per channel, column and token; written out, it
takes half the time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["exp"]

LEAST = -126 * math.log(2)
"""log of the least normal number of float32."""
GREATEST = 88.722839
"""log of the greatest number of float32."""
LOG2 = (0.693359375, math.log(2) - 0.693359375)
"""Its first ten bits, whose product with a whole number up to 128 is exact, and the rest."""
POLYNOMIAL = (1.0, 1.000000038, 0.5000000047, 0.1666641551, 0.0416663529, 0.008375126398, 0.001394110847)
"""Chebyshev's interpolation of exp from -log(2) / 2 to log(2) / 2; off by at most 3e-9."""
MANTISSA_BITS, EXPONENT_BIAS = 23, 127


def exp(x: Tensor) -> Tensor:
    """exp(x) = 2^k exp(r), k whole and abs(r) <= log(2) / 2, in float32; another dtype takes ``Tensor.exp``.

    Below -87.3 it is 1.2e-38 instead of less, from 88.4 on infinite; within, off by at most 2 units in the last place.
    Source: W. J. Cody and W. Waite, Software Manual for the Elementary Functions, 1980, chapter 6.
    """
    if x.dtype != torch.float32:
        return x.exp()
    x = x.clamp(LEAST, GREATEST)
    k = (x * (1 / math.log(2))).round()
    r = x - k * LOG2[0] - k * LOG2[1]
    result = r * POLYNOMIAL[-1] + POLYNOMIAL[-2]
    for coefficient in reversed(POLYNOMIAL[:-2]):
        result = result * r + coefficient
    return result * ((k.to(torch.int32) + EXPONENT_BIAS) << MANTISSA_BITS).view(torch.float32)
