"""PyTorch's own logs: the name of the running compilation, and what ``TORCH_TRACE`` collects (both private)."""

from __future__ import annotations

import os

from torch._guards import CompileContext
from torch._logging._internal import trace_log, trace_structured

__all__ = ["compile_name", "trace_artifact", "tracing_to_file"]


def compile_name() -> str:
    """``graph 0/1``: the number of the compilation that is running, as TORCH_LOGS and tlparse write it; "" outside."""
    running = CompileContext.current_compile_id()
    return f"graph {running}" if running is not None else ""


def tracing_to_file() -> bool:
    """Whether ``TORCH_TRACE`` collects artifacts."""
    return bool(os.environ.get("TORCH_TRACE")) and bool(trace_log.handlers)


def trace_artifact(name: str, text: str) -> None:
    """Hand a text to ``TORCH_TRACE``, where tlparse shows it beside the graph that is being compiled."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: text)
