"""What an attention's mask was proven to be, for later passes and the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.fx as fx

Kind = Literal["all_true", "causal", "sliding_window", "document", "padding"]

Place = Literal["sequence", "position"] | int


@dataclass(frozen=True)
class Vector:
    """A number for each position of each sequence, which stands in ``node``.

    places: of each dimension of the node what indexes it: "sequence", "position" or a number.
    """

    node: fx.Node
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Seen:
    """A condition on keys: that a `Vector` is true (equals: None) or equals a number, or that it does not (negated)."""

    vector: Vector
    equals: int | None
    negated: bool


@dataclass(frozen=True)
class MaskFact:
    """Query i sees key j if and only if every part that is present holds.

    kind: the most telling part; causal: j <= i; window: i - j < window (and j - i < window unless causal);
    documents: a node whose values for i and for j are equal; padding: a node whose value for j alone tells whether
    the key is seen; ids, seen: the same as they can be computed, None where the nodes are read in an unusual way.
    """

    kind: Kind
    causal: bool = False
    window: int | None = None
    documents: fx.Node | None = None
    padding: fx.Node | None = None
    ids: Vector | None = None
    seen: Seen | None = None

    @property
    def label(self) -> str:
        """People's words for it, such as "causal, window 4096, documents"."""
        parts = ["causal"] if self.causal else []
        if self.window is not None:
            parts.append(f"window {self.window}")
        if self.documents is not None:
            parts.append("documents")
        if self.padding is not None:
            parts.append("padding")
        return ", ".join(parts) or "no mask"
