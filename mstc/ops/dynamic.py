"""Bodies for dynamic lengths: one symbolic body for all chunks that keep the guards it was traced under.

A body that was compiled by hand has no guards of its own: where tracing it, or compiling it, decided anything by a
length (say, that it is even), the condition stays behind in the shape environment. Each chunk length is checked
against those conditions once; where they fail, a body for just these lengths is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

Body = Callable[..., Any]  # traced or compiled
T = TypeVar("T")


@dataclass
class DynamicBodies:
    """Forward and backward bodies whose last inputs are the dynamic lengths and the chunk's length.

    forward, backward: the symbolic bodies; holds: whether these lengths keep their guards; special: compiles both
    for just these lengths.
    """

    forward: Body | None
    backward: Body | None
    holds: Callable[[Sequence[int]], bool]
    special: Callable[[Sequence[int]], tuple[Body | None, Body | None]]
    _known: dict[tuple[int, ...], tuple[Body | None, Body | None]] = field(default_factory=dict)

    def at(self, lengths: Sequence[int]) -> tuple[Mapping[int, Body], Mapping[int, Body]]:
        """Forward and backward bodies by chunk length, for these dynamic lengths."""
        return _ByLength(self, tuple(lengths), 0), _ByLength(self, tuple(lengths), 1)

    def bodies(self, lengths: tuple[int, ...]) -> tuple[Body | None, Body | None]:
        """Both bodies for these lengths, the chunk's own last."""
        found = self._known.get(lengths)
        if found is None:
            if self.holds(lengths):
                found = _with_lengths(self.forward, lengths), _with_lengths(self.backward, lengths)
            else:
                found = apart(self.special, lengths)
            self._known[lengths] = found
        return found


def apart(trace: Callable[..., T], *args: Any) -> T:
    """Call ``trace`` in a thread of its own: in this one a running operator has switched autograd and tracing off."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(trace, *args).result()


def _with_lengths(body: Body | None, lengths: tuple[int, ...]) -> Body | None:
    return None if body is None else lambda *args: body(*args, *lengths)


class _ByLength(Mapping[int, Body]):
    def __init__(self, bodies: DynamicBodies, lengths: tuple[int, ...], which: int) -> None:
        self._bodies, self._lengths, self._which = bodies, lengths, which

    def __getitem__(self, length: int) -> Body:
        found = self._bodies.bodies((*self._lengths, length))[self._which]
        assert found is not None
        return found

    def __iter__(self) -> Iterator[int]:
        raise TypeError("a body for dynamic lengths serves any chunk length")

    __len__ = None  # type: ignore[assignment]
