"""The graphs that Dynamo makes of a call, without running any.

Only Dynamo's settings lift its limits on recompilation, and it alone tells why a graph ends where it does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import BackendCompilerFailed

from mstc.compat.fakes import FakeTensor, FakeTensorMode
from mstc.compat.ops import tree_leaves

__all__ = ["Captured", "capture"]


class Captured:
    """One graph that Dynamo handed to a backend, and why the function's graph ends there ("" where it returns)."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        found: Any = getattr(gm, "compile_subgraph_reason", None)
        reason = found if found is not None and found.graph_break else None
        self.gm, self.inputs = gm, inputs
        self.broken = str(reason.reason) if reason else ""
        frame = reason.user_stack[-1] if reason and reason.user_stack else None
        self.source = f"{frame.filename}:{frame.lineno}" if frame is not None else ""


def capture(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], seen: Callable[[Captured], None]
) -> None:
    """Let Dynamo trace a call of ``fn`` and hand each graph to ``seen``; no graph runs.

    Code between two graphs runs as Python, on zeros in place of their values. Other compilations of the same
    function stay as they are: each call counts as a backend of its own, and the limits on recompilations are lifted.
    """
    limits = {"recompile_limit": 1 << 20, "accumulated_recompile_limit": 1 << 20, "fail_on_recompile_limit_hit": True}

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        seen(Captured(gm, inputs))
        output = gm.graph.output_node()
        values = [n.meta["example_value"] if isinstance(n, fx.Node) else n for n in tree_leaves(output.args[0])]
        mode = next((i.fake_mode for i in inputs if isinstance(i, FakeTensor)), None)
        training = torch.is_grad_enabled()
        return lambda *_: [_stand_in(v, mode, training) for v in values]

    with dynamo_config.patch(limits):
        try:
            torch.compile(fn, backend=backend, dynamic=False)(*args, **kwargs)
        except BackendCompilerFailed as e:
            raise e.inner_exception from None


def _stand_in(value: Any, mode: FakeTensorMode | None, training: bool) -> Any:
    """Zeros like a fake value that take no memory, in the given fake mode if any."""
    if not isinstance(value, torch.Tensor):
        return hint if (hint := getattr(getattr(value, "node", None), "hint", None)) is not None else value
    shape = [s if isinstance(s, int) else s.node.hint for s in value.shape]
    with mode or contextlib.nullcontext():
        zeros = torch.zeros((), dtype=value.dtype, device=value.device).expand(shape)
    return zeros.requires_grad_(training and value.requires_grad)
