"""Masks of documents and padding: vectors of run time become operands of attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mstc.graph.attention import WINDOW_ATTENTION
from mstc.passes import masks
from testkit.exactness import of_all_pairs
from testkit.mask_pass import attend, band, causal, compiled, queries, same_numbers


@pytest.fixture
def of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of documents and padding are rewritten however short they are."""
    monkeypatch.setattr(masks, "FEWEST_TOKENS", 1)


def same_document(ids: torch.Tensor) -> torch.Tensor:
    return ids[:, None, :, None] == ids[:, None, None]


IDS = torch.tensor([[3, 3, 1, 1, 1, 0, 0], [0, 0, 3, 3, 3, 3, 3]])

VECTORS: dict[str, tuple[Callable[..., torch.Tensor], str, set[str]]] = {
    "documents": (lambda q, d: causal(q) & same_document(d), "causal, documents", {"documents"}),
    "of no order": (lambda q, d: same_document(d), "documents", {"documents"}),
    "positions first": (lambda q, d: causal(q) & (d.mT.clone().mT != 0)[:, None, None], "causal, padding", {"seen"}),
    "not 0": (lambda q, d: causal(q) & (d != 0)[:, None, None], "causal, padding", {"seen"}),
    "3": (lambda q, d: causal(q) & (d == 3)[:, None, None].expand(2, 4, 7, 7), "causal, padding", {"seen"}),
    "3, told by a difference": (lambda q, d: causal(q) & (3 - d == 0)[:, None, None], "causal, padding", {"seen"}),
    "bool": (lambda q, d: causal(q) & d.bool()[:, None, None], "causal, padding", {"seen"}),
    "not bool": (lambda q, d: ~d.bool()[:, None, None].expand(2, 1, 7, 7), "padding", {"seen"}),
    "of one sequence": (lambda q, d: causal(q) & (d[1] != 0), "causal, padding", {"seen"}),
    "of more tokens": (lambda q, d: same_document(d.repeat(1, 2).sort()[0][:, :7]), "documents", {"documents"}),
    "window": (lambda q, d: band(q) & d.bool()[:, None, None], "causal, window 4, padding", {"seen"}),
    "both": (
        lambda q, d: causal(q) & same_document(d) & (d != 1)[:, None, None],
        "causal, documents, padding",
        {"documents", "seen"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(VECTORS))
@pytest.mark.usefixtures("of_any_length")
def test_documents_and_padding_are_vectors(name: str) -> None:
    """The mask of all pairs is gone, and queries that see no key get what they got."""
    build, label, vectors = VECTORS[name]
    seen = compiled(attend(build), queries(2, 4, 7, 8), IDS)
    assert seen.labels == [label]
    (call,) = seen.attention
    assert call.target is WINDOW_ATTENTION and set(call.kwargs) == {"scale", *vectors}
    assert all(call.kwargs[n].meta["val"].shape[0] in (1, 2) for n in vectors)
    assert of_all_pairs(seen.after.graph, 7) == []
    same_numbers(seen)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda q, d: torch.where(d == 0, -1e38, 0.0)[:, None, None].expand(2, 1, 7, 7), "average"),
        (lambda q, d: causal(q) & (d.flip(1) != 0)[:, None, None], "another order"),
        (lambda q, d: causal(q) & (2 * d != 6)[:, None, None], "another order"),
        (lambda q, d: causal(q) & same_document(d.repeat(2, 1).sort()[0][:2]), "another order"),
    ],
)
@pytest.mark.usefixtures("of_any_length")
def test_masks_of_padding_that_stay(build: Any, reason: str) -> None:
    seen = compiled(attend(build), queries(2, 4, 7, 8), IDS)
    assert not seen.sites and reason in seen.refusals[0].reason


@pytest.mark.usefixtures("of_any_length")
def test_documents_of_symbolic_length() -> None:
    def build(q: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return causal(q) & same_document(d)

    seen = compiled(attend(build), queries(2, 4, 7, 8), IDS, dynamic=True)
    assert [n.target for n in seen.attention] == [WINDOW_ATTENTION]


@pytest.mark.usefixtures("of_any_length")
def test_calls_that_share_padding() -> None:
    def fn(q: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        mask = causal(q) & d.bool()[:, None, None]
        once = F.scaled_dot_product_attention(q, q, q, mask)
        return F.scaled_dot_product_attention(once, q, q, mask)

    seen = compiled(fn, queries(2, 4, 7, 8), IDS)
    assert len(seen.sites) == 2
    same_numbers(seen)
