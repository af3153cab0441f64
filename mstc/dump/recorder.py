"""Watches the pipeline and keeps what it sees as records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.fx as fx

from mstc.dump.blocks import fold, make_blocks
from mstc.dump.memory import predict
from mstc.dump.model import Block, GraphDump, Memory, Stage
from mstc.dump.nodes import Recorder, short
from mstc.passes.base import Pass
from mstc.pipeline import Ran
from mstc.report import Refusal, Report


class Recording:
    """The stages of one graph as they come; a watcher of `mstc.pipeline.run`."""

    def __init__(self, training: bool) -> None:
        self._training = training
        self._recorder = Recorder()
        self.stages: list[Stage] = []
        self._before = Memory()

    def start(self, gm: fx.GraphModule) -> None:
        self.stages.append(Stage("", self._recorder.nodes(gm.graph)))
        self._before = predict(gm, self._training, fused=False)

    def ran(self, step: Pass, gm: fx.GraphModule, done: Ran) -> None:
        nodes = self._recorder.nodes(gm.graph) if done.changed else self.stages[-1].nodes
        refusals = tuple(_short(r) for r in done.refusals)
        self.stages.append(Stage(step.name, nodes, step.fidelity, done.seconds, done.edits, refusals))

    def finish(self, gm: fx.GraphModule, report: Report) -> GraphDump:
        """Everything about the graph, now that all passes ran."""
        blocks = make_blocks(self.stages, report.regions, report.refusals)
        after = predict(gm, self._training, fused=True)
        return _graph(report, self._training, self.stages, blocks, self._before, after)


def left_as_it_came(gm: fx.GraphModule, report: Report) -> GraphDump:
    """A graph that could not be brought to normal form: its nodes, and the reason among the refusals."""
    stages = [Stage("", Recorder().nodes(gm.graph))]
    return _graph(report, False, stages, make_blocks(stages, (), report.refusals), Memory(), Memory())


def _graph(
    report: Report, training: bool, stages: Sequence[Stage], blocks: Sequence[Block], before: Memory, after: Memory
) -> GraphDump:
    return GraphDump(
        name=report.graph,
        training=training,
        fidelity=report.fidelity,
        stages=tuple(stages),
        blocks=tuple(blocks),
        folds=tuple(fold(blocks)),
        refusals=tuple(_short(r) for r in report.refusals),
        plan=tuple(report.plan),
        timings=dict(report.timings),
        before=before,
        after=after,
    )


def _short(refusal: Refusal) -> Refusal:
    """A graph in Dynamo's form may have names of any length."""
    return replace(refusal, node=short(refusal.node), source=short(refusal.source), reason=short(refusal.reason))
