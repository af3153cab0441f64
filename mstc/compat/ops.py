"""What ops, their modes and nested arguments are: classes and functions that PyTorch keeps in private modules.

- `OpOverload`, `HigherOrderOperator`: what the target of a node may be; `TorchDispatchMode`: sees each op that runs.
- `get_decompositions`: PyTorch's own formulas of ops.
- `tree_leaves`: of nested lists, tuples and dicts of arguments.
"""

from __future__ import annotations

import torch.utils._pytree as pytree
from torch._decomp import get_decompositions
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["HigherOrderOperator", "OpOverload", "TorchDispatchMode", "get_decompositions", "tree_leaves"]

tree_leaves = pytree.tree_leaves
