"""Time and peak against the number of mini-sequences, with nothing else chosen."""

from __future__ import annotations

from typing import Any

from mstc.cli.plan.draft import Planned
from mstc.plan.solve import peak_of
from mstc.plan.stages import Levers


def sweep_chunks(planned: Planned, tokens: int) -> list[dict[str, Any]]:
    """One row per number of chunks of the longest loop; nothing runs again, and nothing inside loops is saved."""
    stages = planned.stages(tokens, Levers(pruned=False))
    levels = max(len({o.choice.counts for o in s.options}) for s in stages)
    rows = []
    for level in range(levels):
        options = []
        for stage in stages:
            counts = sorted({o.choice.counts for o in stage.options})
            wanted = counts[min(level, len(counts) - 1)]
            same = [o for o in stage.options if o.choice.counts == wanted]
            options.append(next((o for o in same if not any(o.choice.again)), same[0]))
        most = max(max(o.choice.counts, default=1) for o in options)
        rows.append(
            {
                "chunk": tokens // most,
                "peak": peak_of(stages, options, planned.resident),
                "seconds": sum(o.seconds for o in options),
            }
        )
    return rows
