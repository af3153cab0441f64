"""What the examples share: a small Llama with random weights, text to learn, and a look at what was compiled."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import mstc

LENGTH, VOCABULARY = 2048, 512


def small_llama(length: int = LENGTH) -> Any:
    """Two layers, so that an example runs in seconds on a CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def batches(count: int, length: int = LENGTH, seed: int = 0) -> list[Tensor]:
    """Counting modulo the vocabulary from random starts: easy to learn, so the loss falls."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, VOCABULARY, (count, 1, 1), generator=generator)
    return list((starts + torch.arange(length)) % VOCABULARY)


# Chunks small enough that even these models run in loops; leave this out for real ones.
OPTIONS: dict[str, Any] = {
    "mini_sequence": {"chunk_tokens": 512},
    "lm_head": {"chunk_tokens": 512},
}


def train(
    loss_fn: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, data: Iterable[Tensor], show: bool = True
) -> list[float]:
    """One step per batch; the losses, printed as well where ``show`` says so."""
    losses = []
    for step, ids in enumerate(data):
        loss = loss_fn(ids)
        loss.backward()  # outside: inside the compiled function it would break the graph
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if show:
            print(f"step {step}: loss {losses[-1]:.4f}")
    return losses


def run(main: Callable[[int], list[float]], about: str | None) -> None:
    """Call ``main`` with the number of steps that the command line gives."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="steps of the optimizer (default: 3)")
    steps = parser.parse_args().steps
    if steps < 1:
        parser.error(f"--steps must be 1 or more, got {steps}")
    main(steps)


def show_reports() -> None:
    """One line per compiled graph: what became loops, and what was refused."""
    for number, report in enumerate(mstc.reports()):
        loops = sum(edit.pass_name in ("lm_head", "mini_sequence") for edit in report.edits)
        print(f"graph {number}: {loops} loops, {len(report.refusals)} refusals")
        for refusal in report.refusals:
            print(f"    {refusal.pass_name}: {refusal.reason}")
