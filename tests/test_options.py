"""Options: what is allowed, what it becomes, and what each mistake says."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mstc.errors import OptionError
from mstc.options import PASSES, Budget, LmHead, Masks, MiniSequence, Options, Recompute, parse_options


@pytest.mark.parametrize("nothing", [None, {}])
def test_defaults(nothing: dict[str, Any] | None) -> None:
    options = parse_options(nothing)
    assert options == Options()
    assert [name for name in PASSES if options.enabled(name)] == [
        "masks",
        "written_attention",
        "query_chunks",
        "mini_sequence",
        "lm_head",
        "recompute",
    ]
    assert (options.accumulate, options.lower, options.strict, options.verify) == ("float32", "inductor", False, False)
    assert options.unused_outputs == () and options.asked == frozenset()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"masks": False}, Options(masks=Masks(False))),
        ({"masks": {}}, Options(asked=frozenset({"masks"}))),
        ({"lm_head": True}, Options(asked=frozenset({"lm_head"}))),
        (
            {"mini_sequence": {"chunk_tokens": 256}},
            Options(mini_sequence=MiniSequence(True, 256), asked=frozenset({"mini_sequence"})),
        ),
        ({"lm_head": {"chunk_tokens": "auto"}}, Options(lm_head=LmHead(True, "auto"), asked=frozenset({"lm_head"}))),
        ({"recompute": {"offload": False}}, Options(recompute=Recompute(), asked=frozenset({"recompute"}))),
        ({"accumulate": "param"}, Options(accumulate="param")),
        ({"memory_budget": "20GiB"}, Options(memory_budget=Budget(20 << 30))),
        ({"memory_budget": 1 << 30}, Options(memory_budget=Budget(1 << 30))),
        (
            {"memory_budget": {"total": "1.5 GB", "outside": "auto"}},
            Options(memory_budget=Budget(1_500_000_000, "auto")),
        ),
        ({"unused_outputs": [1, "logits"]}, Options(unused_outputs=(1, "logits"))),
        ({"lower": "aot_eager", "strict": True, "verify": True}, Options(lower="aot_eager", strict=True, verify=True)),
    ],
)
def test_values(given: dict[str, Any], expected: Options) -> None:
    assert parse_options(given) == expected


def test_quiet_values_of_what_is_not_built() -> None:
    passes: dict[str, Any] = {
        name: quiet for quiet in (None, False) for name in ("experts", "attention", "shard_sequence", "shard_experts")
    }
    assert parse_options({**passes, "memory_budget": None, "dump": None}) == Options()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("experts", True),
        ("attention", {"kind": "gla", "layers": "LLLN", "window": 64, "sinks": 4, "max_error": 0.1}),
        ("shard_sequence", {"inputs": "sharded", "method": "ring"}),
        ("shard_experts", {"capacity": None}),
    ],
)
def test_not_built_yet(key: str, value: object) -> None:
    with pytest.raises(OptionError, match=rf"'{key}[^']*' is not built yet.*leave it out or give (None|False)"):
        parse_options({key: value})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([("masks", True)], "options must be a dict or None"),
        ({"mini_seqence": True}, "unknown option: 'mini_seqence'; did you mean 'mini_sequence'?"),
        ({"zzz": True}, "unknown option: 'zzz' (allowed: masks,"),
        ({3: True}, "unknown option: 3"),
        ({"mini_sequence": 512}, "'mini_sequence' must be True, False or a dict with settings chunk_tokens, got 512"),
        ({"masks": None}, "'masks' must be True, False or a dict, got None"),
        ({"masks": 1}, "got 1 (int)"),
        ({"masks": {"kind": "causal"}}, "unknown setting of 'masks': 'kind' (it has none)"),
        ({"lm_head": {"chunk_token": 8}}, "did you mean 'chunk_tokens'?"),
        ({"lm_head": {"chunk_tokens": 0}}, "'lm_head.chunk_tokens' must be a number of tokens"),
        ({"lm_head": {"chunk_tokens": True}}, "got True (bool)"),
        ({"lm_head": {"chunk_tokens": 8.0}}, "got 8.0 (float)"),
        ({"lm_head": {"chunk_tokens": "all"}}, "got 'all' (str)"),
        ({"recompute": {"offload": 1}}, "'recompute.offload' must be True or False"),
        ({"accumulate": "float64"}, "'accumulate' must be \"float32\" or \"param\", got 'float64'"),
        ({"accumulate": True}, "got True (bool)"),
        ({"unused_outputs": "logits"}, "got 'logits' (str)"),
        ({"unused_outputs": [-1]}, "'unused_outputs' must be"),
        ({"unused_outputs": [True]}, "'unused_outputs' must be"),
        ({"lower": "cuda"}, '"inductor", "aot_eager" or "eager"'),
        ({"strict": 1}, "'strict' must be True or False"),
        ({"attention": {"window": 0}}, "'attention.window' must be an int above 0"),
        ({"attention": {"keep_below": "never"}}, "'attention.keep_below' must be"),
        ({"shard_sequence": {"method": "star"}}, "'shard_sequence.method' must be"),
        ({"experts": "yes"}, "'experts' must be True, False or a dict"),
        ({"memory_budget": "lots"}, "'memory_budget' must be bytes"),
        ({"memory_budget": {"outside": 4}}, "'memory_budget' needs 'total'"),
        ({"memory_budget": {"totl": 4}}, "did you mean 'total'?"),
        ({"memory_budget": "0GiB"}, "'memory_budget' must be bytes"),
        ({"memory_budget": {"total": "1GiB", "outside": "all"}}, "'memory_budget.outside' must be bytes"),
        ({"dump": 3}, "'dump' must be None or a folder"),
    ],
)
def test_mistakes(given: Any, says: str) -> None:
    with pytest.raises(OptionError) as error:
        parse_options(given)
    assert says in str(error.value)


def test_an_unknown_pass_is_an_error() -> None:
    with pytest.raises(OptionError, match="did you mean 'masks'"):
        Options().enabled("mask")


def test_options_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Options().strict = True  # type: ignore[misc]


CHUNKS = st.one_of(st.booleans(), st.fixed_dictionaries({"chunk_tokens": st.one_of(st.just("auto"), st.integers(1))}))


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "masks": st.booleans(),
            "mini_sequence": CHUNKS,
            "lm_head": CHUNKS,
            "recompute": st.booleans(),
            "accumulate": st.sampled_from(["float32", "param"]),
            "unused_outputs": st.lists(st.integers(0, 9)),
            "lower": st.sampled_from(["inductor", "aot_eager", "eager"]),
            "strict": st.booleans(),
        },
    )
)
def test_to_dict_is_what_parse_options_reads(given: dict[str, Any]) -> None:
    options = parse_options(given)
    again = parse_options(options.to_dict())
    assert again.to_dict() == options.to_dict()
    assert options.asked <= again.asked
