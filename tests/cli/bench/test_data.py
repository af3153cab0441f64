"""The tokens: repeatable, in range, and text is text."""

from __future__ import annotations

import torch

from mstc.cli.bench.data import random_batches, text_batches


def test_text_is_python_source_and_repeatable() -> None:
    batches = text_batches(count=3, batch=2, seq=2000, seed=1)
    assert [tuple(ids.shape) for ids in batches] == [(2, 2000)] * 3
    assert bytes(batches[0][0].tolist()).decode("utf-8", errors="ignore").isprintable() is False  # it has lines
    assert any(word in bytes(torch.cat(batches).flatten().tolist()) for word in (b"def ", b"import ", b"return "))
    again = text_batches(count=3, batch=2, seq=2000, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    assert not torch.equal(batches[0], batches[1])


def test_random_batches_repeat_one_piece_of_work() -> None:
    first, second = random_batches(count=2, batch=1, seq=50, vocab=7, seed=0)
    assert torch.equal(first, second) and first.shape == (1, 50)
    assert int(first.min()) >= 0 and int(first.max()) < 7
