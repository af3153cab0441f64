"""A plan in words: for each kind of loop and for attention, how many there are and how they run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mstc.plan.calls import Call

__all__ = ["in_words"]


def in_words(calls: Iterable[Call]) -> list[str]:
    """One line per label, in the order of the schedule; ops between loops and attention are left out.

    As in "32 x gated MLP: 4 to 8 chunks, again in the backward (12 of 32)".
    """
    alike: dict[str, list[Call]] = {}
    for call in calls:
        if call.kind != "op":
            alike.setdefault(call.label, []).append(call)
    return [_line(label, several) for label, several in alike.items()]


def _line(label: str, calls: Sequence[Call]) -> str:
    loops = [c.chunks for c in calls if c.program is not None]
    saving = [len(c.saved) for c in calls if c.saved]
    parts = [
        _span(loops, "chunk") if loops else "",
        _of("again in the backward", sum(c.again for c in calls), calls),
        _of(f"saves {_span(saving, 'value')} inside", len(saving), calls) if saving else "",
        _of("offloaded", sum(bool(c.offloads) for c in calls), calls),
    ]
    how = ", ".join(p for p in parts if p)
    return f"{len(calls)} x {label}" + (f": {how}" if how else "")


def _of(words: str, count: int, calls: Sequence[Call]) -> str:
    """The words where they hold, with the count where they do not hold of all."""
    if count == 0:
        return ""
    return words if count == len(calls) else f"{words} ({count} of {len(calls)})"


def _span(counts: Sequence[int], what: str) -> str:
    least, most = min(counts), max(counts)
    return f"{most if least == most else f'{least} to {most}'} {what}{'s' * (most > 1)}"
