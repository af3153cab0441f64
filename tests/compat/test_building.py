"""Kernels of what is compiled together are built at the end, and nothing else is put off."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import AsyncCompile

from mstc import compat
from mstc.compat import building
from mstc.graph.normal_form import normalize
from testkit.tiny import Tiny, inputs, step


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What happened: "wait" for each module whose kernels were waited for, and what a test adds."""
    happened: list[str] = []
    plain = AsyncCompile._wait_futures

    def told(compiler: AsyncCompile, scope: dict[str, Any]) -> None:
        happened.append("wait")
        plain(compiler, scope)

    monkeypatch.setattr(AsyncCompile, "_wait_futures", told)
    with inductor_config.patch(compile_threads=2):
        yield happened


def compiled(shift: float) -> Callable[..., Any]:
    """A kernel of its own, which no cache knows."""
    return compat.compile_for(lambda x: (x + shift).exp() * x, [torch.zeros(8)])


def test_two_graphs_wait_once_at_the_end(order: list[str]) -> None:
    x = torch.randn(8)
    with building.built_together():
        first = compiled(0.25)
        second = compiled(0.75)
        order.append("end")
    assert order[0] == "end" and order.count("wait") == len(order) - 1 >= 2
    torch.testing.assert_close(first(x), (x + 0.25).exp() * x)
    torch.testing.assert_close(second(x), (x + 0.75).exp() * x)


def test_what_was_compiled_before_an_error_can_be_run(order: list[str]) -> None:
    made = []

    def failing() -> None:
        with building.built_together():
            made.append(compiled(1.25))
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        failing()
    assert set(order) == {"wait"}
    x = torch.randn(8)
    torch.testing.assert_close(made[0](x), (x + 1.25).exp() * x)
    assert not functorch_config.force_non_lazy_backward_lowering


def test_other_threads_wait_as_ever(order: list[str]) -> None:
    def aside() -> None:
        scope: dict[str, Any] = {}
        AsyncCompile().wait(scope)
        order.append("aside")

    with building.built_together():
        thread = threading.Thread(target=aside)
        thread.start()
        thread.join()
        order.append("end")
    assert order == ["wait", "aside", "end"]


def _step(lower: str, calls: list[str]) -> tuple[Tensor, Callable[[], object]]:
    torch._dynamo.reset()
    options = {"lower": lower, "mini_sequence": {"chunk_tokens": 8}, "lm_head": {"chunk_tokens": 8}}
    model = Tiny(dtype=torch.float32)
    loss = torch.compile(step(model), backend="mstc", options=options)(*inputs(dtype=torch.float32))
    calls.append("compiled")
    return loss, loss.backward


def test_a_step_is_built_whole_before_it_runs(order: list[str]) -> None:
    """Bodies, forward and backward: the first backward compiles nothing."""
    loss, backward = _step("inductor", order)
    at = order.index("compiled")
    assert at >= 4 and set(order[:at]) == {"wait"}  # two bodies, forward and backward at least
    backward()
    assert order[at:] == ["compiled"]
    assert torch.isfinite(loss)


def test_only_what_inductor_lowers_is_built_together(order: list[str]) -> None:
    with mock.patch.object(building, "built_together") as together:
        _step("aot_eager", order)
    assert not together.called and order == ["compiled"]


def test_old_objects_are_not_walked_and_come_back() -> None:
    class Old:
        pass

    old = Old()
    with building.old_objects_set_aside():
        assert gc.get_freeze_count() and not any(o is old for o in gc.get_objects())
        made = Old()
        assert any(o is made for o in gc.get_objects())
    assert gc.get_freeze_count() == 0 and any(o is old for o in gc.get_objects())


def test_garbage_of_the_block_is_collected_in_it() -> None:
    class Ring:
        def __init__(self) -> None:
            self.me = self

    with building.old_objects_set_aside():
        gone = weakref.ref(Ring())
        gc.collect()
        assert gone() is None


def test_what_others_froze_stays_frozen() -> None:
    class Object:
        pass

    theirs = Object()
    gc.freeze()
    try:
        # Counts say nothing here: a frozen object that another thread lets go of leaves the count.
        made = Object()
        with building.old_objects_set_aside():
            assert any(o is made for o in gc.get_objects())
        assert gc.get_freeze_count() and not any(o is theirs for o in gc.get_objects())
    finally:
        gc.unfreeze()


def test_the_backend_sets_old_objects_aside_and_brings_them_back() -> None:
    seen = []

    def noting(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(gc.get_freeze_count() > 0)
        return normalize(gm, inputs)

    with mock.patch("mstc.backend.normalize", noting):
        torch.compile(lambda x: x.exp().sum(), backend="mstc", options={"lower": "aot_eager"})(torch.randn(8))
    assert seen == [True] and gc.get_freeze_count() == 0
