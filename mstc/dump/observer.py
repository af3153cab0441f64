"""What a real compilation leaves behind for people: files, log lines, artifacts of TORCH_TRACE.

Graphs are recorded only where somebody asked for them: by ``options={"dump": folder}``, ``TORCH_LOGS="+mstc"``
or ``TORCH_TRACE``. Any other compilation pays for one look at those three.
"""

from __future__ import annotations

import logging
import threading
from itertools import pairwise
from pathlib import Path

import torch.distributed as dist
import torch.fx as fx

from mstc import compat
from mstc.dump.environment import command_line, versions
from mstc.dump.files import Drawn
from mstc.dump.model import Block, Dump, GraphDump
from mstc.dump.recorder import Recording, left_as_it_came
from mstc.dump.text import blocks_text, graph_text, stage_diff
from mstc.errors import OptionError
from mstc.options import Options
from mstc.report import Report

log = logging.getLogger("mstc")

# The graphs of this process by the folder that they go to, so that a later one adds to the page.
_graphs: dict[Path, list[GraphDump]] = {}
_lock = threading.Lock()


class Observer:
    """Watches one compilation, if asked to, and publishes what it saw."""

    def __init__(self, options: Options, report: Report, recording: bool) -> None:
        self._options, self._report, self._recording = options, report, recording
        self._watcher: Recording | None = None
        self._graph: GraphDump | None = None

    def watch(self, training: bool) -> Recording | None:
        """A watcher for the pipeline, or None where nobody wants one."""
        if self._recording:
            self._watcher = Recording(training)
        return self._watcher

    def rewritten(self, gm: fx.GraphModule) -> None:
        """All passes ran."""
        if self._watcher is not None:
            self._graph = self._watcher.finish(gm, self._report)

    def left(self, gm: fx.GraphModule) -> None:
        """The graph is lowered as it came."""
        if self._recording:
            self._graph = left_as_it_came(gm, self._report)

    def publish(self) -> None:
        """Write, log and trace what was asked for."""
        report = self._report
        report.drawing = Drawn(_dump(self._options, (self._graph or outline(report),)))
        log.info("%s: %d regions, %d refusals, %s", report.graph, *_figures(report))
        for refusal in report.refusals:
            log.info("%s: %s refused %s: %s", report.graph, refusal.pass_name, refusal.node, refusal.reason)
        if self._graph is None:
            return
        _log(self._graph)
        _trace(self._graph)
        if self._options.dump is not None:
            _write(Path(self._options.dump), self._options, self._graph, report)


def observe(options: Options, report: Report) -> Observer:
    """An observer of one compilation; it records graphs only where somebody reads them.

    Raises `OptionError` where the folder to dump into cannot be made.
    """
    if options.dump is not None:
        try:
            Path(options.dump).mkdir(parents=True, exist_ok=True)
        except OSError as e:
            words = f"option 'dump' is {options.dump!r}, a folder that cannot be made: {e.strerror}; give another"
            raise OptionError(words) from e
    wanted = options.dump is not None or log.isEnabledFor(logging.DEBUG) or compat.tracing_to_file()
    return Observer(options, report, wanted)


def outline(report: Report) -> GraphDump:
    """A report whose graphs were not recorded: its regions and mixers, one after another."""
    blocks = [
        Block(
            r.kind, "chunked" if r.loop else "kept", r.label, r.layer, r.module, r.source, r.nodes, (),
            (i - 1,) if i else (), r.tokens, r.chunks, saved=r.saved, note=r.note,
        )
        for i, r in enumerate(report.regions)
    ]  # fmt: skip
    return GraphDump(
        report.graph,
        False,
        report.fidelity,
        blocks=tuple(blocks),
        refusals=tuple(report.refusals),
        plan=tuple(report.plan),
        timings=dict(report.timings),
    )


def _figures(report: Report) -> tuple[int, int, str]:
    return len(report.regions), len(report.refusals), report.fidelity.words


def _dump(options: Options, graphs: tuple[GraphDump, ...]) -> Dump:
    seconds = sum(g.timings.get("total", 0.0) for g in graphs)
    return Dump("compiled graphs", command_line(), options.to_dict(), versions(), graphs, seconds)


def _write(folder: Path, options: Options, graph: GraphDump, report: Report) -> None:
    """Add the graph to the page in the folder; each rank of a distributed run has a folder of its own."""
    if dist.is_available() and dist.is_initialized():
        folder = folder / f"rank-{dist.get_rank()}"
    with _lock:
        graphs = _graphs.setdefault(folder.resolve(), [])
        graphs.append(graph)
        report.drawing = Drawn(_dump(options, tuple(graphs)))
        report.save(folder)


def _log(graph: GraphDump) -> None:
    if not log.isEnabledFor(logging.DEBUG):
        return
    log.debug("%s:\n%s", graph.name, blocks_text(graph.blocks, graph.folds))
    log.debug("%s as captured:\n%s", graph.name, graph_text(graph.first))
    for before, after in pairwise(graph.stages):
        diff = stage_diff(before, after)
        if diff:
            log.debug("%s after %s:\n%s", graph.name, after.name, diff)


def _trace(graph: GraphDump) -> None:
    if not compat.tracing_to_file():
        return
    compat.trace_artifact("mstc_blocks", blocks_text(graph.blocks, graph.folds))
    for i, stage in enumerate(graph.stages):
        if i == 0 or stage.nodes != graph.stages[i - 1].nodes:
            compat.trace_artifact(f"mstc_{i}_{stage.name or 'captured'}", graph_text(stage.nodes))
