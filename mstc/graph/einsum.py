"""What the dimensions of an einsum's operands are called."""

from __future__ import annotations

import torch
import torch.fx as fx

Name = str | int  # a letter; or a dimension that an ellipsis stands for, counted from its right end


def names_of(node: fx.Node) -> tuple[list[tuple[Name, ...]], tuple[Name, ...]]:
    """The dimensions of each operand, and those of the result."""
    equation = str(node.args[0]).replace(" ", "")
    tensors = [i.meta["val"] for i in node.args[1]]  # type: ignore[union-attr]
    given, arrow, result = equation.partition("->")
    terms = [_spelt(term, tensor) for term, tensor in zip(given.split(","), tensors, strict=True)]
    hidden = max((name for term in terms for name in term if isinstance(name, int)), default=0)
    repeated = tuple(range(hidden, 0, -1))
    if not arrow:
        letters = given.replace(".", "").replace(",", "")
        return terms, (*repeated, *sorted(c for c in set(letters) if letters.count(c) == 1))
    left, dots, right = result.partition("...")
    return terms, (*left, *(repeated if dots else ()), *right)


def _spelt(term: str, tensor: torch.Tensor) -> tuple[Name, ...]:
    left, dots, right = term.partition("...")
    return (*left, *(range(tensor.dim() - len(left) - len(right), 0, -1) if dots else ()), *right)


def contracted(node: fx.Node) -> set[Name]:
    """The dimensions that are multiplied and summed over."""
    terms, result = names_of(node)
    names = [name for term in terms for name in term]
    return {name for name in names if names.count(name) > 1 and name not in result}
