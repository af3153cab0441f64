"""``mstc doctor``: does this installation work?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import torch
from rich.table import Table
from torch import Tensor

from mstc.cli.console import make_console
from mstc.cli.environment import describe_machine, describe_versions
from mstc.kernels import aot

__all__ = ["doctor"]


@click.command()
@click.option("--kernels", is_flag=True, help="Compile every Triton kernel for its targets; print what each needs.")
def doctor(kernels: bool) -> None:
    """Print versions, devices, whether torch.compile knows the backend, and a self-check.

    Exit status 1 when the backend is not registered or the self-check fails.
    """
    if kernels:
        click.echo(aot.to_text(list(aot.compile_all())))
        return
    registered = "mstc" in torch.compiler.list_backends()
    check = (
        _self_check() if registered else "not run: the backend is not registered; install the package (pip install .)"
    )
    table = Table(show_header=False)
    for name, value in [*describe_versions().items(), *describe_machine().items()]:
        table.add_row(name, ", ".join(value) or "none" if isinstance(value, list) else str(value))
    table.add_row("backend", "registered" if registered else "not registered")
    table.add_row("self-check", check)
    make_console().print(table)
    if check != "passed":
        raise click.exceptions.Exit(1)


def _self_check() -> str:
    """Compile a small MLP with the backend, lowered eagerly, and compare loss and gradient with eager."""
    torch.manual_seed(0)
    weight, tokens = torch.randn(16, 16, dtype=torch.float64), torch.randn(64, 16, dtype=torch.float64)

    def loss_fn(w: Tensor, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(x @ w).square().mean()

    options: dict[str, Any] = {"lower": "eager", "mini_sequence": {"chunk_tokens": 16}}
    expected = _loss_and_gradient(loss_fn, weight, tokens)
    got = _loss_and_gradient(torch.compile(loss_fn, backend="mstc", options=options), weight, tokens)
    differences = [(a - b).abs().max().item() for a, b in zip(expected, got, strict=True)]
    return "passed" if max(differences) < 1e-9 else f"failed: differs from eager by {max(differences):.1e}"


def _loss_and_gradient(loss_fn: Callable[[Tensor, Tensor], Tensor], weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    w = weight.clone().requires_grad_()
    loss = loss_fn(w, x)
    (gradient,) = torch.autograd.grad(loss, w)
    return loss.detach(), gradient
