"""What a pass is: a pure search for sites, and a few lines that rewrite one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from mstc.graph.axes import Axes
from mstc.graph.editor import Editor
from mstc.graph.provenance import source_of
from mstc.graph.regions import Region, find_regions
from mstc.ops.build import Compiler
from mstc.options import Options
from mstc.report import Fidelity, Refusal


def _no_compiler(gm: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
    raise AssertionError("this pass compiles a body, but the driver gave no compiler")


def not_compiled(gm: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """For graphs that are looked at only: the bodies of their loops never run."""

    def body(*args: Any) -> Any:
        raise AssertionError("this loop was made to be looked at")

    return body


@dataclass(frozen=True)
class Analysis:
    """The axes of a graph, and its regions."""

    gm: fx.GraphModule
    axes: Axes
    regions: list[Region]


@dataclass(frozen=True)
class Chosen:
    """What a plan says of a loop or mixer.

    chunks: how many; again: it runs again in the backward; offload: positions of its results that are offloaded;
    saves: names of the values inside it that wait for its backward.
    """

    chunks: int = 1
    again: bool = False
    offload: tuple[int, ...] = ()
    saves: tuple[str, ...] = ()


@dataclass
class Context:
    """What a pass may read, and where it may leave facts for later passes and the report.

    options: the user's; training: whether gradients are recorded; facts: what one pass proved
    about a node for others to read (``facts["masks"][node]`` and so on);
    compile_body: lowers a loop body for fake example inputs; explained: bodies are not to run, so
    their programs must not be taken for compiled ones;
    planning: the graph is a draft that never runs.
    chosen: the plan under a memory budget, by `key_of` each call; keys: of the loops, by the names of their calls.
    """

    options: Options
    training: bool
    facts: dict[str, dict[fx.Node, Any]] = field(default_factory=dict)
    plan: list[str] = field(default_factory=list)
    compile_body: Compiler = _no_compiler
    explained: bool = False
    planning: bool = False
    chosen: dict[str, Chosen] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    _analysis: Analysis | None = None

    def analysis(self, gm: fx.GraphModule) -> Analysis:
        """What the graph is now, inferred once between two edits."""
        if self._analysis is None or self._analysis.gm is not gm:
            axes = Axes(gm.graph)
            self._analysis = Analysis(gm, axes, find_regions(gm.graph, axes))
        return self._analysis

    def edited(self) -> None:
        """To be told after each edit: what was inferred holds no longer."""
        self._analysis = None

    def key_of(self, call: str) -> str:
        """How a plan knows a call: a loop by the names of its products (`loop_key`), anything else by its own."""
        return self.keys.get(call, call)


@dataclass(frozen=True)
class Pass:
    """One transform.

    name: in reports; option: the key of `options` that switches it ("" for always on);
    fidelity: how close it keeps the numbers; find: pure, yields sites and refusals;
    apply: rewrites one site through the editor; repeats: what it rewrote may make new sites.
    The driver owns looping, ordering, checking, timing and logging.
    """

    name: str
    option: str
    fidelity: Fidelity
    find: Callable[[fx.GraphModule, Context], Iterable[Any]]
    apply: Callable[[Editor, Any, Context], None]
    repeats: bool = False

    def runs(self, options: Options) -> bool:
        """Whether these options leave the pass switched on."""
        return not self.option or options.enabled(self.option)


def refuse(name: str, node: fx.Node, reason: str, remedy: str = "") -> Refusal:
    """A refusal that names the node and the user's own line."""
    return Refusal(name, node.name, source_of(node), reason, remedy)
