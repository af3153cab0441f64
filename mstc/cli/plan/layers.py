"""Which layers of a model must be captured so that all of them are known: layers repeat, with a period of one or more.

A layer is told by its modules, the shapes of its parameters, and what else its modules hold (a window, a kind of
attention), its own number left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

LEAST = 4  # layers captured at least: the first, the last, and two between them


@dataclass(frozen=True)
class Layers:
    """``count`` layers, of which the first ``captured`` stand for all: what is missing repeats the ``period`` layers
    before the last captured one."""

    count: int
    captured: int
    period: int

    @property
    def missing(self) -> int:
        return self.count - self.captured

    @property
    def repeated(self) -> range:
        """The numbers of the layers that are repeated."""
        return range(self.captured - 1 - self.period, self.captured - 1)


def shortened(model: Any, config: Any) -> Layers:
    """Take out of the model the layers that repeat others, and say which these are.

    A model without one list of layers, or whose layers repeat too late, is left whole.
    """
    count = int(config.num_hidden_layers)
    lists = [(m, name) for m in model.modules() for name, child in m.named_children() if _is_list(child, count)]
    if len(lists) != 1:
        return Layers(count, count, 1)
    holder, name = lists[0]
    layers = getattr(holder, name)
    kinds = getattr(config, "layer_types", None)
    found = layers_of(_signatures(list(layers), kinds if kinds and len(kinds) == count else [""] * count))
    if found.missing:
        setattr(holder, name, layers[: found.captured])
        for one in _configs(model):
            if getattr(one, "num_hidden_layers", None) == count:
                one.num_hidden_layers = found.captured
    return found


def layers_of(signatures: Sequence[Any]) -> Layers:
    """The fewest layers that stand for all, at least `LEAST`.

    With ``first`` layers of their own and a period, that is one whole period behind them and behind layer 0 (which
    reads the embedding), the last layer (which leads to the head), and as many more as leave whole periods to fill in.
    """
    count = len(signatures)
    best = Layers(count, count, 1)
    for period in range(1, count):
        alike = [signatures[i] == signatures[i + period] for i in range(count - period)]
        first = count - period - next((i for i, same in enumerate(reversed(alike)) if not same), len(alike))
        captured = max(first, 1) + period + 1
        captured += max(LEAST - captured, 0)
        captured += (count - captured) % period
        if captured < best.captured:
            best = Layers(count, captured, period)
    return best


def _is_list(module: nn.Module, count: int) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == count


def _configs(model: Any) -> Iterator[Any]:
    """Every configuration that a module of the model holds, each once."""
    found = {id(c): c for m in model.modules() for c in vars(m).values() if hasattr(c, "num_hidden_layers")}
    yield from found.values()


def _signatures(layers: Sequence[nn.Module], kinds: Sequence[str]) -> list[Any]:
    """What each layer is; a number that is each layer's own index tells nothing."""
    facts = [dict(_facts(layer)) for layer in layers]
    indices = {
        key
        for key in facts[0]
        if isinstance(facts[0][key], int) and all(type(f.get(key)) is int and f[key] == i for i, f in enumerate(facts))
    }
    return [
        (kind, tuple((k, v) for k, v in f.items() if k not in indices)) for kind, f in zip(kinds, facts, strict=True)
    ]


def _facts(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in layer.named_modules():
        yield f"{path}:", type(module).__name__
        for name, p in module.named_parameters(recurse=False):
            yield f"{path}.{name}", tuple(p.shape)
        for name, value in vars(module).items():
            if value is None or isinstance(value, (bool, int, float, str)):
                yield f"{path}:{name}", value
