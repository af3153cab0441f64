"""One fx node as a frozen record."""

from __future__ import annotations

import linecache
import operator
import re
from functools import lru_cache
from typing import Any

import torch
import torch.fx as fx

from mstc import compat
from mstc.dump.model import Node
from mstc.graph.costs import attention_flops, matmul_flops, nbytes
from mstc.graph.provenance import module_of, source_line, title_of
from mstc.ops.loop import is_loop
from mstc.ops.program import known, program
from mstc.plan.words import counted

LONGEST = 300  # characters of any text that comes from a model; the rest is counted, not kept


def short(text: str, longest: int = LONGEST) -> str:
    """``text``, or its beginning and its length where a page could not show it all."""
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text):,} characters)"


class Recorder:
    """Makes records of nodes; an unchanged node gives the record that it gave before."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._known: dict[str, Node] = {}

    def name(self, name: str) -> str:
        """The name itself, or a short one that stands for a very long one."""
        if len(name) <= LONGEST:
            return name
        return self._names.setdefault(name, f"{name[:40]}_long{len(self._names)}")

    def nodes(self, graph: fx.Graph) -> tuple[Node, ...]:
        return tuple(self.node(n) for n in graph.nodes)

    def node(self, node: fx.Node) -> Node:
        made = self._make(node)
        before = self._known.get(made.name)
        if before == made:
            return before
        self._known[made.name] = made
        return made

    def _make(self, node: fx.Node) -> Node:
        source, code = _origin(node.meta.get("stack_trace") or "")
        return Node(
            name=self.name(node.name),
            kind=_kind(node),
            op=short(op_name(node)),
            title=short(title_of(node)),
            args=short(self._args(node)),
            inputs=tuple(self.name(i.name) for i in node.all_input_nodes),
            value=short(value_text(_value(node))),
            nbytes=_bytes(node),
            flops=matmul_flops(node) + attention_flops(node),
            grad=bool(node.meta.get("needs_grad")),
            source=source,
            code=code,
            module=short(module_of(node)),
        )

    def _args(self, node: fx.Node) -> str:
        if node.op in ("placeholder", "get_attr"):
            return ""
        given = [self._show(a) for a in node.args]
        if is_loop(node):
            given[-1] = _body(node.args[-1])
        return ", ".join([*given, *(f"{k}={self._show(v)}" for k, v in node.kwargs.items())])

    def _show(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.name(value.name)
        if isinstance(value, list | tuple):
            return "[" + ", ".join(self._show(v) for v in value) + "]"
        if isinstance(value, int) and value == _END:
            return "end"
        return str(value) if isinstance(value, torch.dtype | torch.device) else repr(value)


_END = 2**63 - 1  # how a slice without an end is written


def op_name(node: fx.Node) -> str:
    """``aten.linear``, ``aten.add.Tensor``, ``getitem``; the kind for what is no call."""
    if node.op != "call_function":
        return str(node.target) if node.op in ("call_method", "call_module") else _kind(node)
    if node.target is operator.getitem:
        return "getitem"
    if isinstance(node.target, compat.OpOverload | compat.HigherOrderOperator):
        return str(node.target).removesuffix(".default")
    return str(getattr(node.target, "__name__", node.target))


def value_text(value: object) -> str:
    """``f32[2, 64]`` for a tensor; several in parentheses."""
    if isinstance(value, torch.Tensor):
        return f"{_dtype(value.dtype)}[{', '.join(str(s) for s in value.shape)}]"
    if isinstance(value, list | tuple):
        return f"({', '.join(value_text(v) for v in value)})"
    return "" if value is None else str(value)


def _dtype(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    shorter = re.fullmatch(r"(float|int|uint|complex)(\d+.*)", name)
    return f"{shorter[1][0]}{shorter[2]}" if shorter else name.replace("bfloat", "bf")


def _value(node: fx.Node) -> object:
    return node.meta.get("val", node.meta.get("example_value"))


def _bytes(node: fx.Node) -> int:
    if node.target is not operator.getitem and not isinstance(_value(node), torch.Tensor):
        return 0
    return nbytes(node)


def _kind(node: fx.Node) -> str:
    if node.op == "placeholder":
        return compat.input_kind(node)
    return {"get_attr": "constant", "output": "output"}.get(node.op, "op")


def _body(key: object) -> str:
    """What a loop runs; the key itself is a hash that tells a reader nothing."""
    if not isinstance(key, str) or not known(key):
        return "a body"
    found = program(key)
    return f"{found.label!r} in {counted(found.count, 'chunk')}"


@lru_cache(maxsize=4096)
def _origin(stack_trace: str) -> tuple[str, str]:
    """(file:line, text of the line) of the user's own frame."""
    found = source_line(stack_trace)
    if found is None:
        return "", ""
    file, line = found
    return short(f"{file}:{line}"), short(linecache.getline(file, line).strip())
