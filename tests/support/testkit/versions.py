"""What older versions of PyTorch and Triton cannot do, with any backend; the tests that need it are skipped there."""

from __future__ import annotations

from importlib import metadata

import pytest


def _is_before(package: str, *version: int) -> bool:
    """Also where it is not installed."""
    found = metadata.version(package) if any(metadata.distributions(name=package)) else "0.0"
    return tuple(int(n) for n in found.split(".")[: len(version)]) < version


BEFORE_2_13 = _is_before("torch", 2, 13)
BEFORE_TRITON_3_9 = _is_before("triton", 3, 9)


def _needs(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(BEFORE_2_13, reason=f"before torch 2.13 {reason}")


NEEDS_HOOKS = _needs("hooks inside the function give gradients that are not eager's, or a graph that does not run")
NEEDS_CHECKS = _needs("compiling drops the checks of linear algebra's success")
NEEDS_EQUAL_MASKS = _needs("Dynamo cannot tell that a mask that is made twice selects as much both times")
NEEDS_FLOAT64_ATTENTION = _needs("Inductor hands attention's log-sum-exp of float64 on as float32")
NEEDS_SCANS = _needs("transformers writes Mamba's scan token by token")
NEEDS_LINEAR_CE = _needs("there is no F.linear_cross_entropy")
NEEDS_INTERPRETER = pytest.mark.skipif(
    BEFORE_TRITON_3_9 and not _is_before("numpy", 2, 4),
    reason="the interpreter of Triton before 3.9 does not run with NumPy 2.4",
)
