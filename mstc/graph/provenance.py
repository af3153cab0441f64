"""Where a node comes from: the user's source line, the module path, the layer's number."""

from __future__ import annotations

import re

import torch.fx as fx

from mstc import compat

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_NOT_THE_USERS = ("/torch/nn/", "/torch/_", "/torch/utils/", "/torch/fx/", "/torch/overrides")


def source_of(node: fx.Node) -> str:
    """``file:line`` of the innermost frame outside torch itself, "" where none is known."""
    found = source_line(node.meta.get("stack_trace") or "")
    return f"{found[0]}:{found[1]}" if found else ""


def source_line(stack_trace: str) -> tuple[str, int] | None:
    """(file, line) of the innermost frame of a printed stack outside torch itself."""
    frames = [(file, int(line)) for file, line, _ in _FRAME.findall(stack_trace)]
    users = [f for f in frames if not any(part in f[0] for part in _NOT_THE_USERS)]
    found = users or frames
    return found[-1] if found else None


def module_of(node: fx.Node) -> str:
    """Dotted path of the innermost module, such as ``model.layers.3.mlp.down_proj``; "" at the top."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    entry = list(stack.values())[-1]
    path = entry[0] if isinstance(entry, tuple) else str(entry)
    return dotted(path)


def dotted(path: str) -> str:
    """Dynamo writes ``L['self']._modules['a']._modules['0']`` or ``G['m'].model.layers[0]``; make it dotted."""
    path = re.sub(r"^[LG]\['[^']*'\]\.?", "", path)
    path = re.sub(r"\.?_(?:modules|parameters|buffers)\['([^']+)'\]", r".\1", path)
    path = re.sub(r"\['?([^'\]]+)'?\]", r".\1", path)
    return path.strip(".")


def layer_of(node: fx.Node) -> int | None:
    """The first number in the module path: the index of the layer in its list of layers."""
    for part in module_of(node).split("."):
        if part.isdigit():
            return int(part)
    return None


def title_of(node: fx.Node) -> str:
    """The user's own name of an input: ``model.layers.0.mlp.up_proj.weight``, ``ids``; "" where a node is no input."""
    if node.op != "placeholder":
        return ""
    path = compat.input_name(node)
    variable = re.match(r"[LG]\['([^']*)'\]", path)
    inner = dotted(path)
    if variable and variable[1] != "self" and "." not in inner:
        return f"{variable[1]}.{inner}".strip(".")  # a module of one layer: its own name tells it from others
    return inner or str(node.meta.get("user_name", node.name))
