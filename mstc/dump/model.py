"""What a dump holds: frozen, JSON-able records.

A node that a pass leaves alone is the same record in the graph before and after it, so that a dump
of many passes holds each node once (see `mstc.dump.coding`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mstc.report import Edit, Fidelity, Refusal

FORMAT = 2  # of the JSON; a reader refuses another one


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a graph.

    kind: "parameter", "buffer", "input", "constant", "op" or "output"; op: name of the operator;
    title: the user's name of an input; args: as text; value: such as ``f32[2, 64]``; grad: whether it
    needs a gradient; source: the user's own ``file:line``; code: that line; module: dotted path.
    """

    name: str
    kind: str
    op: str
    title: str
    args: str
    inputs: tuple[str, ...]
    value: str
    nbytes: int
    flops: float
    grad: bool
    source: str
    code: str
    module: str


@dataclass(frozen=True)
class Stage:
    """The graph after one pass; the first stage, named "", is the graph as it was captured."""

    name: str
    nodes: tuple[Node, ...]
    fidelity: Fidelity = Fidelity.EXACT
    seconds: float = 0.0
    edits: tuple[Edit, ...] = ()
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Block:
    """A part of the rewritten graph, as the page draws the model at a glance.

    kind: "region", "mixer" or "rest"; status: what happened (see `mstc.dump.blocks`);
    nodes: names in the rewritten graph; inside: names of the nodes that a loop runs, in the graph before;
    inputs: positions of the blocks that it reads; flops: of the forward; nbytes: of what it makes;
    held: bytes of the largest part that exists at once.
    """

    kind: str
    status: str
    label: str
    layer: int | None
    module: str
    source: str
    nodes: tuple[str, ...]
    inside: tuple[str, ...]
    inputs: tuple[int, ...]
    tokens: str = ""
    chunks: int = 1
    flops: float = 0.0
    nbytes: int = 0
    held: int = 0
    saved: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Fold:
    """``count`` identical stretches of ``period`` blocks each, the first at position ``start``."""

    start: int
    period: int
    count: int


@dataclass(frozen=True)
class Memory:
    """Predicted live bytes, step by step, through forward and backward.

    steps: names of the nodes; backward: position of the first step of the backward; the four
    categories have one number per step.
    """

    steps: tuple[str, ...] = ()
    backward: int = 0
    parameters: tuple[int, ...] = ()
    gradients: tuple[int, ...] = ()
    saved: tuple[int, ...] = ()
    temporary: tuple[int, ...] = ()

    def totals(self) -> list[int]:
        return [sum(parts) for parts in zip(self.parameters, self.gradients, self.saved, self.temporary, strict=True)]

    @property
    def peak(self) -> int:
        return max(self.totals(), default=0)


@dataclass(frozen=True)
class GraphDump:
    """One captured graph: its stages, what it consists of, and the memory of a step before and after."""

    name: str
    training: bool
    fidelity: Fidelity
    stages: tuple[Stage, ...] = ()
    blocks: tuple[Block, ...] = ()
    folds: tuple[Fold, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    plan: tuple[str, ...] = ()
    timings: dict[str, float] = field(default_factory=dict)
    before: Memory = Memory()
    after: Memory = Memory()
    broken: str = ""  # why the function's graph ends here, where it goes on in another one

    @property
    def first(self) -> tuple[Node, ...]:
        return self.stages[0].nodes if self.stages else ()

    @property
    def last(self) -> tuple[Node, ...]:
        return self.stages[-1].nodes if self.stages else ()


@dataclass(frozen=True)
class Measured:
    """Memory of one step that ran, above what rested before it, in bytes.

    system: "eager" or "mstc"; peak: the highest (a mark that the system kept, or the allocator); samples: pairs of
    (seconds since the step began, bytes).
    """

    system: str
    device: str
    peak: int
    samples: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True)
class Dump:
    """All graphs of one function or of one process, and the steps of it that were measured."""

    title: str
    command: str
    options: dict[str, object] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    graphs: tuple[GraphDump, ...] = ()
    seconds: float = 0.0
    measured: tuple[Measured, ...] = ()
