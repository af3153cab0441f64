"""Numbers in words, and a plan: for each kind of loop and for attention, how many there are and how they run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mstc.plan.calls import Call

__all__ = ["bytes_text", "count_text", "counted", "in_words"]


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


def counted(n: int, what: str) -> str:
    """``1 chunk``, ``4 chunks``, ``2 queries``"""
    many = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{n} {what if n == 1 else many}"


def bytes_text(n: float) -> str:
    """``1.5 GiB``"""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def count_text(n: float) -> str:
    """``2.1 T``: with a prefix of 1000s and a space, ready for a unit."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(n) < 1000:
            return f"{n:.0f} " if not prefix else f"{n:.1f} {prefix}"
        n /= 1000
    return f"{n:.1f} P"


def _span(counts: Sequence[int], what: str) -> str:
    least, most = min(counts), max(counts)
    return counted(most, what) if least == most else f"{least} to {counted(most, what)}"
