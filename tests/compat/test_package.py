"""Private names of PyTorch by theme: each module says why it needs them, and the package offers what they do."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

from mstc import compat

BY_NAME = {"autocast", "building", "errors"}  # used as modules
MODULES = sorted(m.name for m in pkgutil.iter_modules(compat.__path__))


def test_the_package_offers_what_its_modules_do() -> None:
    modules = [importlib.import_module(f"mstc.compat.{name}") for name in MODULES if name not in BY_NAME]
    offered = [name for module in modules for name in module.__all__]
    assert sorted(offered) == sorted(compat.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_each_module_says_why(name: str) -> None:
    module = importlib.import_module(f"mstc.compat.{name}")
    assert module.__doc__ is not None and len(module.__doc__.split()) > 10
