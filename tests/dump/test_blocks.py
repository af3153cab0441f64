"""The model at a glance: every node in one block, statuses, identical layers folded."""

from __future__ import annotations

import torch

from mstc.dump.blocks import fold
from mstc.dump.model import Block, Dump, Fold
from testkit import hf_models
from testkit.dumps import WHOLE, explain, explain_tiny


def block(label: str, *inputs: int) -> Block:
    return Block("region", "kept", label, None, "", "", (), (), inputs)


def test_every_node_stands_in_one_block(tiny_dump: Dump) -> None:
    (graph,) = tiny_dump.graphs
    names = [n for b in graph.blocks for n in b.nodes]
    expected = {n.name for n in graph.last if n.kind not in ("parameter", "buffer", "output")}
    assert len(names) == len(set(names)) and set(names) == expected


def test_statuses_and_sizes(tiny_dump: Dump) -> None:
    (graph,) = tiny_dump.graphs
    looped = [b for b in graph.blocks if b.chunks > 1]
    assert [b.status for b in looped] == ["chunked", "chunked", "loss"]
    for b in looped:
        assert b.inside and b.flops > 0 and b.held == b.nbytes // b.chunks and b.source
    assert any(b.kind == "rest" and b.label == "scan" for b in graph.blocks)


def test_a_block_comes_after_what_it_reads(tiny_dump: Dump) -> None:
    for i, b in enumerate(tiny_dump.graphs[0].blocks):
        assert all(j < i for j in b.inputs)


def test_refused_regions_are_marked() -> None:
    (graph,) = explain_tiny(WHOLE).graphs
    assert {b.status for b in graph.blocks if b.kind == "region"} == {"refused"}


def test_repeats_are_found() -> None:
    layer = ["attention", "mlp"]
    labels = ["embedding", *layer * 5, "head"]
    blocks = [block(label, *([i - 1] if i else [])) for i, label in enumerate(labels)]
    assert fold(blocks) == [Fold(1, 2, 5)]
    assert fold(blocks[:3]) == []
    assert fold([]) == []


def test_a_pattern_of_layers_is_one_fold() -> None:
    labels = ["L", "L", "L", "N"] * 3
    blocks = [block(label, *([i - 1] if i else [])) for i, label in enumerate(labels)]
    assert fold(blocks) == [Fold(0, 4, 3)]


def test_layers_of_a_real_model_fold() -> None:
    model = hf_models.causal("llama", torch.bfloat16, num_hidden_layers=4)
    ids = hf_models.tokens()
    options = {"lower": "eager", "mini_sequence": {"chunk_tokens": 25}, "lm_head": {"chunk_tokens": 25}}

    def loss_fn(ids):  # type: ignore[no-untyped-def]
        return model(input_ids=ids, labels=ids).loss

    (graph,) = explain(loss_fn, ids, options=options).graphs
    (found,) = graph.folds
    assert found.count == 4
    stretch = graph.blocks[found.start : found.start + found.period]
    assert [b.status for b in stretch] == ["recomputed", "rewritten", "chunked"]
    assert [b.layer for b in graph.blocks[found.start :: found.period][:4]] == [0, 1, 2, 3]
