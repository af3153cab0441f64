"""DDP and FSDP2 over two processes: gradients as without mstc, and the loops and masks still there."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mstc
from testkit.exactness import BOUNDS, chunked, gradient_errors
from testkit.float64 import true_float64
from testkit.hf_models import causal
from testkit.workers import run_workers

WORLD = 2
MICRO_BATCHES = 2
SLOW = pytest.mark.slow


@dataclass
class Seen:
    """gradients, whole; loss of the last micro-batch; graphs: how many; loops, heads, masks: edits in all of them."""

    gradients: dict[str, Tensor]
    loss: Tensor
    graphs: int
    loops: int
    heads: int
    masks: int
    refusals: list[str]


def batch(rank: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * rank + number)
    return torch.randint(3, 96, (2, 50), generator=generator)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]


def expected(dtype: torch.dtype) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Without mstc and in one process: the mean over ranks of the sums over micro-batches."""
    model = causal("llama", dtype)
    losses = [loss_of(model, batch(rank, n)) for rank in range(WORLD) for n in range(MICRO_BATCHES)]
    (sum(losses) / WORLD).backward()  # type: ignore[union-attr, no-untyped-call]
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return gradients, [losses[rank * MICRO_BATCHES + MICRO_BATCHES - 1].detach() for rank in range(WORLD)]


def seen(named: dict[str, Tensor], loss: Tensor) -> Seen:
    edits = [e for r in mstc.reports() for e in r.edits]
    return Seen(
        named,
        loss.detach(),
        len(mstc.reports()),
        sum(e.pass_name == "mini_sequence" for e in edits),
        sum(e.pass_name == "lm_head" for e in edits),
        sum(e.pass_name == "masks" for e in edits),
        [f"{x.pass_name}: {x.reason}" for r in mstc.reports() for x in r.refusals],
    )


def check(results: list[Seen], dtype: torch.dtype = torch.float64) -> None:
    with true_float64() if dtype is torch.float64 else contextlib.nullcontext():
        gradients, losses = expected(dtype)
    bound = BOUNDS[dtype]
    for rank, got in enumerate(results):
        print(got.graphs, got.loops, got.heads, got.masks, got.refusals)
        torch.testing.assert_close(got.loss, losses[rank], rtol=bound, atol=0)
        assert got.gradients.keys() == gradients.keys()
        errors = gradient_errors(dict(got.gradients), dict(gradients))
        assert max(errors.values()) <= bound, errors


def check_refusals(got: Seen) -> None:
    """What splitting costs: a part that gets the mask from another may not know what it is, and says so."""
    assert all(r.startswith("masks: the mask is not proven") for r in got.refusals), got.refusals


# ------------------------------------------------------------------ DDP


def train_ddp(rank: int, lower: str, compiled: str, optimize: bool) -> Seen:
    torch._dynamo.config.optimize_ddp = optimize
    with true_float64():
        model = causal("llama")
        options = chunked(lower=lower)
        # Small buckets, so that DDP's optimizer splits even this model.
        dist._DEFAULT_FIRST_BUCKET_BYTES = 20_000  # type: ignore[attr-defined]
        parallel = DistributedDataParallel(model, bucket_cap_mb=0.04)
        fn: Any = loss_of
        if compiled == "step":
            fn = torch.compile(loss_of, backend="mstc", options=options)
        elif compiled == "outside":
            parallel = torch.compile(parallel, backend="mstc", options={**options})
        else:
            model.compile(backend="mstc", options=options)
        for number in range(MICRO_BATCHES):
            if number < MICRO_BATCHES - 1:
                with parallel.no_sync():
                    fn(parallel, batch(rank, number)).backward()
            else:
                loss = fn(parallel, batch(rank, number))
                loss.backward()
    return seen({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, loss)


@pytest.mark.parametrize("compiled", ["outside", *(pytest.param(c, marks=SLOW) for c in ("step", "inside"))])
def test_ddp(compiled: str) -> None:
    """The step compiled, the wrapped model, or the model inside the wrapper; accumulated over two micro-batches."""
    results = run_workers(train_ddp, WORLD, "aot_eager", compiled, True)
    check(results)
    for got in results:
        assert got.loops >= 4 and got.heads >= 1 and got.masks >= 1
        check_refusals(got)


@SLOW
def test_ddp_without_splitting() -> None:
    results = run_workers(train_ddp, WORLD, "aot_eager", "outside", False)
    check(results)
    for got in results:
        assert got.loops >= 4 and got.heads >= 1 and got.masks >= 2
        assert not got.refusals


# ------------------------------------------------------------------ FSDP2


def train_fsdp(rank: int, lower: str, compiled: str, accumulate: str) -> Seen:
    """In float32: FSDP2 breaks the graph, and Dynamo goes on wrongly behind a break under `true_float64`'s mode."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = causal("llama", torch.float32)
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    options = chunked(lower=lower)
    fn: Any = loss_of
    if compiled == "step":
        fn = torch.compile(loss_of, backend="mstc", options=options)
    elif compiled == "layers":
        for layer in model.model.layers:
            layer.compile(backend="mstc", options=options)
    else:
        model.compile(backend="mstc", options=options)
    for number in range(MICRO_BATCHES):
        if accumulate == "no_sync":
            model.set_requires_gradient_sync(number == MICRO_BATCHES - 1)
        loss = fn(model, batch(rank, number))
        loss.backward()
    whole = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    return seen(whole, loss)


@pytest.mark.parametrize("accumulate", ["no_sync", pytest.param("sync", marks=SLOW)])
@pytest.mark.parametrize("compiled", ["step", *(pytest.param(c, marks=SLOW) for c in ("model", "layers"))])
def test_fsdp(compiled: str, accumulate: str) -> None:
    results = run_workers(train_fsdp, WORLD, "aot_eager", compiled, accumulate)
    check(results, torch.float32)
    for got in results:
        assert got.loops >= 2
        if compiled != "layers":  # the head lies outside of the layers
            assert got.heads >= 1
            check_refusals(got)


# ------------------------------------------------------------------ bad input


def lose_the_group(rank: int) -> list[tuple[str, dict[str, Tensor]]]:
    """What a step says, and the gradients it leaves, after the group is gone: without mstc and with it."""
    found = []
    for fn in (loss_of, torch.compile(loss_of, backend="mstc", options=chunked(lower="aot_eager"))):
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        model = DistributedDataParallel(causal("llama"))
        fn(model, batch(0, 0)).backward()
        dist.destroy_process_group()
        said = ""
        try:
            fn(model, batch(0, 1)).backward()
        except (RuntimeError, ValueError) as error:
            said = type(error).__name__
        found.append((said, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    return found


def test_a_process_group_that_is_gone() -> None:
    """As in eager: the same error, or the same gradients."""
    for (said, gradients), (said_compiled, compiled) in run_workers(lose_the_group, 1):
        assert said_compiled == said
        assert compiled.keys() == gradients.keys()
        assert max(gradient_errors(dict(compiled), dict(gradients)).values()) <= 1e-6
