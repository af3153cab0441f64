"""Chunk tables for the Triton kernels: sequences and packed documents look alike to them.

Tokens are flattened to [B T, H, ...]; every chunk has a first and a last token, every sequence (or
document) a first and a last chunk.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mstc.kernels.common.checks import check_offsets
from mstc.kernels.common.segments import CHUNK, SEGMENT

__all__ = ["ChunkTable", "chunk_table", "sequence_rows"]


class ChunkTable(NamedTuple):
    """starts, stops [chunks]: tokens; first [sequences + 1]: chunks; slots: of their kept states."""

    starts: Tensor
    stops: Tensor
    first: Tensor
    slots: Tensor

    @property
    def sequences(self) -> int:
        return self.first.shape[0] - 1

    @property
    def span(self) -> tuple[Tensor, Tensor]:
        """First tokens, and those behind the last ones: what every kernel over chunks is given."""
        return self.starts, self.stops

    @property
    def chunks(self) -> int:
        return self.starts.shape[0]


def chunk_table(batch: int, tokens: int, cu_seqlens: Tensor | None, device: torch.device) -> ChunkTable:
    """The chunks of ``batch`` sequences, or of the documents packed into one."""
    if cu_seqlens is None:
        per_row = -(-tokens // CHUNK)
        inside = torch.arange(per_row, device=device) * CHUNK
        base = torch.arange(batch, device=device).unsqueeze(1) * tokens
        starts, stops = base + inside, base + (inside + CHUNK).clamp(max=tokens)
        first = torch.arange(batch + 1, device=device) * per_row
        return ChunkTable(starts.flatten(), stops.flatten(), first, torch.zeros(batch, dtype=torch.long, device=device))
    offsets = check_offsets(cu_seqlens, tokens)
    spans = list(pairwise(offsets))
    pairs = [(s, min(s + CHUNK, stop)) for start, stop in spans for s in range(start, stop, CHUNK)]
    counts = [0, *(-(-(stop - start) // CHUNK) for start, stop in spans)]
    slots = [0, *(-(-(stop - start) // SEGMENT) for start, stop in spans)]
    table = torch.tensor(pairs, device=device).view(-1, 2)
    first = torch.tensor(counts, device=device).cumsum(0)
    slot = torch.tensor(slots, device=device).cumsum(0)[:-1]
    return ChunkTable(table[:, 0].contiguous(), table[:, 1].contiguous(), first, slot)


def sequence_rows(table: ChunkTable, cu_seqlens: Tensor | None) -> Tensor:
    """The row of the batch in which each sequence lies."""
    rows = torch.arange(table.sequences, device=table.slots.device)
    return rows if cu_seqlens is None else torch.zeros_like(rows)
