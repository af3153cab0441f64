"""Live bytes over one training step, as `mstc.plan.memory` predicts them, for people to look at."""

from __future__ import annotations

import torch.fx as fx

from mstc.dump.model import Memory
from mstc.plan.memory import predict as timeline


def predict(gm: fx.GraphModule, training: bool, fused: bool) -> Memory:
    """The memory of one step of the graph; without ``training`` the forward only.

    fused: as a compiler runs the graph, which makes cheap values again in the backward; else as eager does.
    """
    points = timeline(gm, training, fused).points
    return Memory(
        steps=tuple(p.label for p in points),
        backward=sum(not p.backward for p in points),
        parameters=tuple(p.held["parameters"] + p.held["inputs"] for p in points),
        gradients=tuple(p.held["gradients"] for p in points),
        saved=tuple(p.held["saved"] for p in points),
        temporary=tuple(p.held["temporaries"] for p in points),
    )
