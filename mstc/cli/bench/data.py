"""The tokens that are trained on: random ones, or the bytes of the standard library's source files."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["random_batches", "text_batches"]

_ENOUGH_BYTES = 4 << 20  # files are read in order of their names until there is this much


def random_batches(count: int, batch: int, seq: int, vocab: int, seed: int) -> list[Tensor]:
    """``count`` times the same ids [batch, seq]: a benchmark repeats one piece of work."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (batch, seq), generator=generator)] * count


def text_batches(count: int, batch: int, seq: int, seed: int) -> list[Tensor]:
    """``count`` batches of ids [batch, seq], each row a stretch of Python source as bytes (0 to 255)."""
    text = torch.frombuffer(bytearray(_source_text(max(_ENOUGH_BYTES, seq))), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(text) - seq + 1, (count, batch), generator=generator)
    return [torch.stack([text[s : s + seq] for s in row.tolist()]).long() for row in starts]


def _source_text(enough: int) -> bytes:
    """The standard library's source files one after another, ended by a zero byte each."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(folder.glob("*.py")) + sorted(folder.glob("*/*.py")):
        text += path.read_bytes() + b"\0"
        if len(text) >= enough:
            return bytes(text)
    if not text:
        raise FileNotFoundError(f"no Python source files in {folder}, which this run trains on")
    return bytes(text * (enough // len(text) + 1))
