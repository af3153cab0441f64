"""The loop ops through the backend: who gets gradients, how often, in which shape, and what is refused."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mstc
import mstc.backend
from mstc.ops import program as programs
from testkit.exactness import chunked, compare, gradient_errors, gradients_of
from testkit.tiny import Tiny, inputs, mean_loss, step


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def compiled(fn: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(fn, backend="mstc", options=chunked(7, 5, **{"lower": "eager", **options}))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 8, 23])
def test_batches_and_odd_tails(batch: int, length: int) -> None:
    model = Tiny()
    compare(step(model), parameters(model), inputs(batch, length), chunked(7, 5)).check()


@pytest.mark.parametrize("chunk", [1, 2, 5, 22, 23, 46, 1000])
def test_chunk_sizes(chunk: int) -> None:
    """Among them: one token per chunk, a tail of one token, one chunk, more tokens per chunk than there are."""
    model = Tiny()
    compare(step(model), parameters(model), inputs(), chunked(chunk, chunk, "eager")).check()


@pytest.mark.parametrize("lower", ["eager", "aot_eager"])
def test_a_tail_of_one_token_with_a_value_of_each_text(lower: str) -> None:
    """Its gradient is the sum over a chunk's tokens: of one token, the very gradient that a product's weight needs."""
    model, (x, labels) = Tiny(), inputs(2, 23)
    context = torch.randn(2, 1, 24, dtype=x.dtype).requires_grad_()

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        hidden = x + model.downs[0](F.elu(model.ups[0](x) + context))
        return mean_loss(model.head(model.norms[1](hidden)), labels)

    result = compare(loss, {**parameters(model), "context": context}, (x, labels), chunked(4, 4, lower))
    result.check()
    assert result.loops >= 2, result.describe()


@pytest.mark.parametrize("length", [8, 24, 11, 2])
def test_length_equal_to_another_size(length: int) -> None:
    """S equal to the width, the inner width, the classes, the batch."""
    model = Tiny()
    result = compare(step(model), parameters(model), inputs(2, length), chunked(3, 3, "eager"))
    result.check()
    assert result.loops >= 2


def test_float32() -> None:
    model = Tiny(dtype=torch.float32)
    compare(step(model), parameters(model), inputs(dtype=torch.float32), chunked(7, 5, "eager")).check(torch.float32)


@pytest.mark.parametrize("lower", ["eager", "aot_eager"])
def test_gradients_of_the_inputs(lower: str) -> None:
    model, (x, labels) = Tiny(), inputs()
    leaves = {**parameters(model), "x": x.requires_grad_()}
    compare(step(model), leaves, (x, labels), chunked(7, 5, lower)).check()


def test_frozen_parameters_get_no_gradient() -> None:
    model = Tiny()
    for p in (model.ups[0].weight, model.downs[1].bias, model.head.weight, model.norms[0].weight):
        p.requires_grad_(False)
    compare(step(model), parameters(model), inputs(), chunked(7, 5, "eager")).check()


def test_only_the_input_needs_a_gradient() -> None:
    model, (x, labels) = Tiny().requires_grad_(False), inputs()
    compare(step(model), {"x": x.requires_grad_()}, (x, labels), chunked(7, 5, "eager")).check()


@pytest.mark.parametrize("lower", ["eager", "aot_eager"])
@pytest.mark.parametrize("shared", [True, False])
def test_what_stands_behind_a_detach_gets_no_gradient(lower: str, shared: bool) -> None:
    """A probe on a frozen trunk: None, not zeros, which an optimizer with weight decay would act on.

    shared: the trunk's last norm stands in one region with the probe; else a value in between is a result that only a
    number without gradient is made of.
    """
    model, probe = Tiny(), nn.Linear(8, 11, dtype=torch.float64)

    def run(x: Tensor, labels: Tensor) -> Tensor:
        h = model.features(x)
        if shared:
            return mean_loss(probe(model.norms[1](h).detach()), labels)
        aside = model.head(h)
        return mean_loss(probe(h.detach()), labels) + aside.square().mean().detach()

    leaves = {**parameters(model), **{f"probe.{n}": p for n, p in probe.named_parameters()}}
    result = compare(run, leaves, inputs(), chunked(7, 5, lower))
    result.check()
    assert result.loops >= 2


def test_low_rank_adapters_beside_frozen_weights() -> None:
    model, (x, labels) = Tiny().requires_grad_(False), inputs()
    a = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    b = torch.randn(24, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, labels: Tensor) -> Tensor:
        h = model.features(x)
        h = h + model.downs[0](F.gelu(model.ups[0](h) + F.linear(F.linear(h, a), b)))
        return mean_loss(model.head(h), labels)

    compare(run, {"a": a, "b": b}, (x, labels), chunked(7, 5, "eager")).check()


def test_tied_parameters() -> None:
    """One weight in two loops, and twice in one."""
    model = Tiny()
    model.ups[1].weight = model.ups[0].weight
    shared = model.ups[0].weight

    def run(x: Tensor, labels: Tensor) -> Tensor:
        return mean_loss(model(x + F.linear(F.linear(x, shared), shared.t())), labels)

    compare(run, parameters(model), inputs(), chunked(7, 5, "eager")).check()


def test_embedding_tied_to_the_head() -> None:
    table = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    model, (_, labels) = Tiny(), inputs()

    def run(ids: Tensor) -> Tensor:
        return mean_loss(F.linear(model.features(F.embedding(ids, table)), table), ids)

    compare(run, {**parameters(model), "table": table}, (labels,), chunked(7, 5, "eager")).check()


def test_two_micro_batches_accumulate() -> None:
    model, batches = Tiny(), [inputs(2, 23), inputs(2, 23)]
    batches[1] = (batches[1][0].flip(0), batches[1][1])
    fn = step(model)
    both = lambda f: lambda: f(*batches[0]) + f(*batches[1])  # noqa: E731
    _, expected = gradients_of(both(fn), parameters(model), ())
    fast = compiled(fn)
    for x, labels in batches:
        fast(x, labels).backward()
    got = {n: p.grad for n, p in model.named_parameters()}
    assert max(gradient_errors(got, expected).values()) <= 1e-9


def test_a_second_batch_of_another_length() -> None:
    """The same compiled function, compiled anew for another length: gradients of both add up as in eager."""
    model = Tiny()
    fast = compiled(step(model))
    batches = (inputs(2, 23), inputs(1, 14), inputs(2, 23))
    reference = Tiny()
    sum(step(reference)(*b) for b in batches).backward()
    for b in batches:
        fast(*b).backward()
    got = {n: p.grad for n, p in model.named_parameters()}
    assert max(gradient_errors(got, {n: p.grad for n, p in reference.named_parameters()}).values()) <= 1e-9


@pytest.mark.parametrize("incoming", [0.5, -3.0, 0.0])
def test_incoming_gradient(incoming: float) -> None:
    """Not only the inputs' gradients scale with it, the weights' do."""
    model = Tiny()
    fn, fast = step(model), compiled(step(model))
    _, expected = gradients_of(lambda: incoming * fn(*inputs()), parameters(model), ())
    _, got = gradients_of(lambda: incoming * fast(*inputs()), parameters(model), ())
    assert max(gradient_errors(got, expected, least=1e-9).values()) <= 1e-9
    assert all((g is None) == (expected[n] is None) for n, g in got.items())


@pytest.mark.parametrize("lower", ["eager", "aot_eager"])
def test_a_retained_graph_gives_the_same_gradients_again(lower: str) -> None:
    model = Tiny()
    loss = compiled(step(model), lower=lower)(*inputs())
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_runs_are_equal_to_each_other() -> None:
    model = Tiny(dtype=torch.float32)
    fast = compiled(step(model))
    results = [gradients_of(fast, parameters(model), inputs(dtype=torch.float32)) for _ in range(2)]
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][n], results[1][1][n]) for n in parameters(model))  # type: ignore[arg-type]


def test_deterministic_algorithms() -> None:
    model = Tiny()
    torch.use_deterministic_algorithms(True)
    try:
        compare(step(model), parameters(model), inputs(), chunked(7, 5, "eager")).check()
    finally:
        torch.use_deterministic_algorithms(False)


def test_inference_saves_nothing() -> None:
    """Without gradients the loops have no backward, and the results are the same."""
    model, (x, labels) = Tiny(), inputs()
    fast = compiled(step(model))
    with torch.no_grad():
        torch.testing.assert_close(fast(x, labels), step(model)(x, labels), rtol=1e-12, atol=0)
    made = list(programs._programs.values())
    assert made and all(p.backward is None for p in made)
    assert not fast(x, labels).requires_grad or len(programs._programs) > len(made), "gradients need other bodies"


def test_inference_mode() -> None:
    model, (x, labels) = Tiny(), inputs()
    with torch.inference_mode():
        torch.testing.assert_close(compiled(step(model))(x, labels), step(model)(x, labels), rtol=1e-12, atol=0)


def test_training_after_inference() -> None:
    model, (x, labels) = Tiny(), inputs()
    fast = compiled(step(model))
    with torch.no_grad():
        fast(x, labels)
    _, expected = gradients_of(step(model), parameters(model), (x, labels))
    _, got = gradients_of(fast, parameters(model), (x, labels))
    assert max(gradient_errors(got, expected).values()) <= 1e-9


def second_gradient(fn: Any, x: Tensor, labels: Tensor) -> Tensor:
    (first,) = torch.autograd.grad(fn(x, labels), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    return second


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("lower", ["eager", "aot_eager"])
def test_double_backward_raises(lower: str, head: bool) -> None:
    """A clear error, never a wrong number."""
    model, (x, labels) = Tiny(), inputs()
    loss = mean_loss if head else lambda logits, labels: logits.cumsum(1).square().mean()
    fast = compiled(step(model, loss), lower=lower)
    message = "gradient of a gradient|double backward|does not support create_graph"
    with pytest.raises((mstc.LoopError, RuntimeError), match=message):
        second_gradient(fast, x.requires_grad_(), labels)


def test_forward_mode_raises_or_is_right() -> None:
    model, (x, labels) = Tiny(), inputs()
    tangent = torch.ones_like(x)
    _, expected = torch.func.jvp(lambda x: step(model)(x, labels), (x,), (tangent,))
    fast = compiled(step(model), lower="eager")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        try:
            got = torch.autograd.forward_ad.unpack_dual(fast(dual, labels)).tangent
        except (RuntimeError, NotImplementedError):
            return
    assert got is not None, "the tangent was dropped without a word"
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_a_missing_body_is_a_clear_error() -> None:
    model = Tiny()
    fast = compiled(step(model), lower="eager")
    fast(*inputs())
    programs.clear()
    with pytest.raises(mstc.LoopError, match="no loop body is known"):
        fast(*inputs())


def test_reset_forgets_all_bodies() -> None:
    compiled(step(Tiny()), lower="eager")(*inputs())
    assert programs._programs
    torch._dynamo.reset()
    assert not programs._programs


def test_layers_share_their_bodies() -> None:
    """Two loops of equal structure are one program."""
    model = Tiny()
    x, _ = inputs()

    def run(x: Tensor) -> Tensor:
        for i in range(2):
            x = x + model.downs[i](F.gelu(model.ups[i](x)))
            x = x + x.cumsum(1)
        return x.square().mean()

    result = compare(run, parameters(model), (x,), chunked(7, 5, recompute=False))
    for name in ("norms.0.weight", "norms.0.bias"):
        assert name not in result.missing
    assert result.loops == 2
    assert len(programs._programs) == 2, "the first region differs from the second by its input alone"


def test_opcheck() -> None:
    """Schema, fake kernels and autograd registration of the ops, on the arguments of real calls."""
    calls: dict[Any, Any] = {}
    lowered: list[Any] = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "mstc":
                calls.setdefault(func, args)
            return func(*args, **(kwargs or {}))

    def keep(gm: Any, given: Any, *rest: Any) -> Any:
        lowered.append((gm, given))
        return gm.forward

    with mock.patch.object(mstc.backend, "lower", keep):
        compiled(step(Tiny()), lower="eager")(*inputs())
    gm, given = lowered[0]
    with Spy():
        gm(*given)[0].backward()
    assert {str(op) for op in calls} == {"mstc.loop.default", "mstc.loop_backward.default", "mstc.loss_loop.default"}
    for op, args in calls.items():
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


@pytest.mark.parametrize("lower", ["aot_eager", "inductor"])
def test_gradients_lie_in_memory_as_their_weights(lower: str) -> None:
    """Autograd copies a gradient that lies otherwise than its leaf: a head would pay with its largest tensor."""
    weight = torch.randn(96, 8, requires_grad=True)
    x, labels = torch.randn(40, 8), torch.randint(96, (40,))
    options = {**chunked(7, 5), "lower": lower}
    step = torch.compile(lambda: F.cross_entropy(x @ weight.t(), labels), backend="mstc", options=options)
    found = torch.autograd.grad(step(), weight)[0]
    assert any(r.loop for r in mstc.reports()[-1].regions)
    assert found.stride() == weight.stride()
    expected = torch.autograd.grad(F.cross_entropy(x @ weight.t(), labels), weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lower", ["eager", "aot_eager"])
def test_under_compiled_autograd(lower: str) -> None:
    """Bodies are traced with gradients of their own while it is on; it must not take those."""
    model = Tiny()
    fn, given = step(model), inputs()
    leaves = dict(model.named_parameters())
    _, expected = gradients_of(fn, leaves, given)
    torch._dynamo.reset()
    fast = torch.compile(fn, backend="mstc", options=chunked(7, 5, lower))
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        _, got = gradients_of(fast, leaves, given)
    assert max(gradient_errors(got, expected).values()) < 1e-9
