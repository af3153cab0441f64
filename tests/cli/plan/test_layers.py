"""Which layers stand for all of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mstc.cli.plan.layers import LEAST, Layers, layers_of, shortened


@pytest.mark.parametrize(
    ("kinds", "captured", "period"),
    [
        ("a" * 32, 4, 1),
        ("ab" * 16, 4, 2),
        (("s" * 5 + "g") * 8, 12, 6),
        ("ddd" + "m" * 58, 5, 1),
        ("aaab" * 8, 8, 4),
        ("aaa", 3, 1),
        ("abcdefgh", 8, 1),
        ("a" * 30 + "bb", 32, 1),
        ("a", 1, 1),
    ],
)
def test_as_few_as_stand_for_all(kinds: str, captured: int, period: int) -> None:
    assert layers_of(kinds) == Layers(len(kinds), captured, period)


@given(st.text("ab", max_size=3), st.text("ab", min_size=1, max_size=4), st.integers(1, 30), st.integers(0, 3))
def test_filled_in_they_are_the_model(first: str, repeated: str, times: int, more: int) -> None:
    """Whatever is captured, what is missing repeats what stands before the last layer; the last keeps its kind."""
    kinds = first + repeated * times + repeated[: more % len(repeated)]
    found = layers_of(kinds)
    head = kinds[: found.captured - 1]
    period = "".join(kinds[i] for i in found.repeated) if found.missing else ""
    assert head + period * (found.missing // max(found.period, 1)) + kinds[found.captured - 1] == kinds
    assert found.captured >= min(LEAST, len(kinds))
    assert not found.missing or found.repeated.start >= 1


class Config:
    def __init__(self, count: int) -> None:
        self.num_hidden_layers = count


class Layer(nn.Module):
    def __init__(self, number: int, wide: bool = False) -> None:
        super().__init__()
        self.number, self.window = number, 64 if number % 2 else None
        self.linear = nn.Linear(4, 8 if wide else 4)


class Model(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.config = Config(count)
        self.layers = nn.ModuleList(Layer(i, wide=i < 1) for i in range(count))


def test_layers_are_told_by_what_their_modules_hold() -> None:
    """A number that is a layer's own tells nothing; a window and the shape of a weight do."""
    model = Model(12)
    assert shortened(model, model.config) == Layers(12, 4, 2)
    assert len(model.layers) == model.config.num_hidden_layers == 4


def test_a_model_without_one_list_of_layers_is_left_whole() -> None:
    model = Model(6)
    model.decoder = nn.ModuleList(Layer(0) for _ in range(6))
    assert shortened(model, model.config) == Layers(6, 6, 1)
    assert len(model.layers) == 6
