"""Masks drawn from one seed per token: the tokens go along, everything else is counted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mstc.graph.places import Flow, Lost, Place
from mstc.graph.rules.call import Call, Rule
from mstc.graph.sizes import Size, same
from mstc.ops import keep as keep  # defines mstc::keep


@dataclass(frozen=True)
class SeededFlow:
    """seeds[t] goes to index t of ``place``; no other dimension of the result comes from the operand."""

    place: Place
    repeats: bool = False

    def carry(self, operand: int, place: Place) -> Place | Lost:
        return self.place if same(place.n, self.place.n) else Lost.MIXED

    def back(self, operand: int, place: Place) -> Place | None:
        return Place(0, self.place.n) if place == self.place else None


def seeded(call: Call) -> Flow | None:
    n: Size = call.shape(0)[0]
    return SeededFlow(Place(call.arg("dim"), n, call.arg("outer"), call.arg("inner")))


DRAW_RULES: dict[object, Rule] = {torch.ops.mstc.keep.default: seeded}
