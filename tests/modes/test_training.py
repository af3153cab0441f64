"""Ways of training: adapters, checkpointing, hooks, graph breaks, stretches without gradients, compiled modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mstc
from testkit.exactness import (
    Comparison,
    chunked,
    compare,
    gradient_errors,
    gradients_of,
    products_outside,
)
from testkit.float64 import true_float64
from testkit.hf_models import causal, tokens
from testkit.tiny import Tiny, inputs, mean_loss, step


def loss_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def loss(ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

    return loss


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def compared(model: nn.Module, loops: int) -> Comparison:
    """One graph, all products with weights in loops."""
    with true_float64():
        result = compare(loss_of(model), dict(model.named_parameters()), (tokens(),), chunked(lower="aot_eager"))
    print(result.describe())
    result.check()
    assert len(result.graphs) == 1 and not products_outside(result.graphs[0])
    assert result.loops >= loops
    return result


# ------------------------------------------------------------------ adapters


def with_adapters(model: nn.Module, **settings: Any) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0, **settings)
    made: nn.Module = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_B" in name:  # zero at first, so that nothing would reach lora_A
                p.normal_(generator=torch.Generator().manual_seed(0))
    return made.double()


def test_adapters_of_peft() -> None:
    """LoRA on every linear layer: the frozen weights get no gradient, the adapters' are exact."""
    model = with_adapters(causal("llama"))
    compared(model, 4)
    assert 0 < sum(p.numel() for p in trained(model).values()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_kinds_of_adapters(settings: Mapping[str, Any]) -> None:
    compared(with_adapters(causal("llama"), **settings), 4)


@pytest.mark.slow
def test_adapters_with_norms_of_weights() -> None:
    """DoRA divides by a norm of the weight: a product whose weight is made in the graph."""
    model = with_adapters(causal("llama", torch.float32), use_dora=True).float()
    result = compare(loss_of(model), dict(model.named_parameters()), (tokens(),), chunked())
    print(result.describe())
    result.check(torch.float32)
    assert result.loops >= 4


# ------------------------------------------------------------------ recomputation by the user


def check_checkpointed(model: nn.Module) -> None:
    """In float32: neither a recomputation nor a checkpoint's own graph runs under the mode of `true_float64`."""
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    result = compare(loss_of(model), dict(model.named_parameters()), (tokens(),), chunked())
    print(result.describe())
    result.check(torch.float32)
    assert len(result.graphs) == 1 and result.loops >= 4 and not products_outside(result.graphs[0])


@pytest.mark.parametrize("kind", ["llama", *(pytest.param(k, marks=pytest.mark.slow) for k in ("gemma2", "gpt2"))])
def test_gradient_checkpointing_of_a_model(kind: str) -> None:
    check_checkpointed(causal(kind, torch.float32))


def test_a_checkpoint_around_the_head() -> None:
    model = Tiny()

    def run(x: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = checkpoint(lambda h: mean_loss(model.head(h), labels), model.features(x), use_reentrant=False)
        return loss

    compare(run, dict(model.named_parameters()), inputs(), chunked(7, 5)).check()


# ------------------------------------------------------------------ stretches, breaks, hooks


def test_stretches_without_gradients() -> None:
    """A teacher, and a first layer, under no_grad; a value cut off in between."""
    model, teacher = Tiny(), Tiny(inner=16)

    def run(x: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(x).log_softmax(-1)
            x = model.norms[0](x)
        logits = model(x)
        soft = F.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="batchmean")
        return mean_loss(logits, labels) + 0.1 * soft + logits.detach().square().mean()

    leaves = {**dict(model.named_parameters()), **{f"teacher.{n}": p for n, p in teacher.named_parameters()}}
    result = compare(run, leaves, inputs(), chunked(7, 5, "eager"))
    result.check()
    assert result.loops >= 4


def test_graph_breaks() -> None:
    """Each graph is treated by itself."""
    model = Tiny()

    def run(x: Tensor, labels: Tensor) -> Tensor:
        hidden = model.features(x)
        torch._dynamo.graph_break()
        logits = model.head(hidden)
        torch._dynamo.graph_break()
        return mean_loss(logits, labels)

    result = compare(run, dict(model.named_parameters()), inputs(), chunked(7, 5))
    result.check()
    assert len(result.graphs) == 3
    assert result.loops >= 3


def test_a_break_between_head_and_loss_keeps_the_head_in_a_loop() -> None:
    model = Tiny()

    def run(x: Tensor, labels: Tensor) -> Tensor:
        logits = model(x)
        print(float(logits.detach().mean()))
        return mean_loss(logits, labels)

    result = compare(run, dict(model.named_parameters()), inputs(), chunked(7, 5))
    result.check()
    assert len(result.graphs) == 2


def test_several_inputs_with_gradients() -> None:
    model, (x, labels) = Tiny(), inputs()
    generator = torch.Generator().manual_seed(5)
    scale = torch.randn(2, 23, 1, dtype=torch.float64, generator=generator).requires_grad_()
    shift = torch.randn(8, dtype=torch.float64, generator=generator).requires_grad_()
    prompt = torch.randn(2, 23, 8, dtype=torch.float64, generator=generator).requires_grad_()

    def run(x: Tensor, scale: Tensor, shift: Tensor, prompt: Tensor, labels: Tensor) -> Tensor:
        return mean_loss(model(x * scale + shift + prompt), labels)

    leaves = {
        **dict(model.named_parameters()),
        "x": x.requires_grad_(),
        "scale": scale,
        "shift": shift,
        "prompt": prompt,
    }
    compare(run, leaves, (x, scale, shift, prompt, labels), chunked(7, 5)).check()


def test_soft_prompts() -> None:
    """Learned tokens before the text, everything else frozen."""
    model, (x, labels) = Tiny().requires_grad_(False), inputs()
    prompt = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()

    def run(x: Tensor, labels: Tensor) -> Tensor:
        whole = torch.cat([prompt.expand(x.shape[0], -1, -1), x], 1)
        return mean_loss(model(whole)[:, 4:], labels)

    compare(run, {"prompt": prompt, **dict(model.named_parameters())}, (x, labels), chunked(7, 5)).check()


def test_forward_hooks() -> None:
    """Hooks that look, and hooks that change what passes."""
    model = Tiny()
    seen: list[Tensor] = []
    model.ups[0].register_forward_hook(lambda module, args, out: seen.append(out))
    model.downs[1].register_forward_hook(lambda module, args, out: out * 1.5)
    model.head.register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    def run(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        seen.clear()
        loss = mean_loss(model(x), labels)
        return loss, seen[0]

    def total(fn: Any) -> Callable[..., Tensor]:
        def both(*given: Tensor) -> Tensor:
            loss, between = fn(*given)
            return loss + between.square().mean()  # type: ignore[no-any-return]

        return both

    torch._dynamo.reset()
    fast = torch.compile(run, backend="mstc", options=chunked(7, 5))
    leaves = dict(model.named_parameters())
    (_, got), (_, expected) = (gradients_of(total(fn), leaves, inputs()) for fn in (fast, run))
    assert max(gradient_errors(got, expected).values()) <= 1e-9


def test_hooks_on_gradients() -> None:
    """Hooks of parameters run once per backward, on the whole gradient."""
    model = Tiny()
    calls: list[Tensor] = []
    model.head.weight.register_hook(lambda g: calls.append(g) or g * 2)
    compare(step(model), dict(model.named_parameters()), inputs(), chunked(7, 5)).check()
    assert len(calls) == 2 and all(c.shape == model.head.weight.shape for c in calls)


def test_gradient_accumulation_and_an_optimizer() -> None:
    """Two optimizer steps of three micro-batches each end at eager's parameters."""
    ends = []
    for compile_it in (False, True):
        model = Tiny()
        fn = step(model)
        if compile_it:
            torch._dynamo.reset()
            fn = torch.compile(fn, backend="mstc", options=chunked(7, 5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            for shift in range(3):
                x, labels = inputs()
                (fn(x.roll(shift, 1), labels) / 3).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*ends, strict=True))


# ------------------------------------------------------------------ compiled modules


def logits_and_loss(model: nn.Module, how: str, unused: bool) -> Any:
    options = chunked(**({"unused_outputs": [1]} if unused else {}))
    if how == "step":
        return torch.compile(lambda **given: model(**given), backend="mstc", options=options)
    if how == "in place":
        model.compile(backend="mstc", options=options)
        return model
    if how == "wrap":
        return mstc.wrap(model, options)
    return torch.compile(model, backend="mstc", options=options)


@pytest.mark.parametrize(
    "how", ["module", "wrap", *(pytest.param(h, marks=pytest.mark.slow) for h in ("step", "in place"))]
)
def test_a_compiled_model_with_its_logits_unused(how: str) -> None:
    """The model returns loss and logits; nobody reads the logits, so they become an expanded nan."""
    ids, leaves = tokens(), {}
    with true_float64():
        reference = causal("llama")
        leaves = dict(reference.named_parameters())
        expected_loss, expected = gradients_of(loss_of(reference), leaves, (ids,))
        torch._dynamo.reset()
        model = causal("llama")
        fast = logits_and_loss(model, how, unused=True)
        out = fast(input_ids=ids, labels=ids)
        out.loss.backward()
    assert bool(out.logits.isnan().all())
    assert out.logits.shape == (2, 50, 96) and out.logits.untyped_storage().nbytes() <= 8
    torch.testing.assert_close(out.loss.detach(), expected_loss, rtol=1e-9, atol=0)
    got = {n: p.grad for n, p in model.named_parameters()}
    assert max(gradient_errors(got, expected).values()) <= 1e-9


def test_a_compiled_model_keeps_its_logits() -> None:
    ids = tokens()
    with true_float64():
        model = causal("llama")
        expected = model(input_ids=ids, labels=ids)
        torch._dynamo.reset()
        got = logits_and_loss(model, "module", unused=False)(input_ids=ids, labels=ids)
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(got.loss, expected.loss, rtol=1e-9, atol=0)


def test_unused_half_precision_outputs_survive_a_cast_to_float32() -> None:
    """Accelerate casts all half-precision outputs to float32, which would write the whole of an expanded tensor."""
    from accelerate.utils import operations

    model = Tiny(dtype=torch.bfloat16)

    def both(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x)
        return mean_loss(logits, labels), logits

    torch._dynamo.reset()
    fast = torch.compile(both, backend="mstc", options=chunked(7, 5, unused_outputs=[1]))
    loss, logits = operations.convert_outputs_to_fp32(fast)(*inputs(dtype=torch.bfloat16))
    loss.backward()
    assert loss.dtype == logits.dtype == torch.float32
    assert logits.untyped_storage().nbytes() == 4 and bool(logits.isnan().all())


# ------------------------------------------------------------------ inference


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_prefill_of_a_long_prompt(mode: Callable[[], Any]) -> None:
    """Logits and cache of a prompt: the trunk runs in loops."""
    ids = tokens(1, 200)
    with true_float64(), mode():
        model = causal("llama").eval()
        expected = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        torch._dynamo.reset()
        mstc.clear_reports()
        fast = torch.compile(model, backend="mstc", options=chunked())
        got = fast(input_ids=ids, use_cache=True, logits_to_keep=1)
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-9, atol=1e-12)
        for a, b in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
            torch.testing.assert_close(a.keys, b.keys, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(a.values, b.values, rtol=1e-9, atol=1e-12)
    assert any("chunks" in e.what for r in mstc.reports() for e in r.edits)


def test_generation() -> None:
    """`generate` of a model that was compiled in place: the same tokens."""
    ids = tokens(1, 60)
    with torch.no_grad():
        model = causal("llama").eval()
        expected = model.generate(ids, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
        torch._dynamo.reset()
        model.compile(backend="mstc", options=chunked(lower="eager"))
        got = model.generate(ids, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    assert torch.equal(got, expected)


def test_evaluation_beside_training() -> None:
    """One compiled function, with and without gradients, in both modes of the module."""
    model = Tiny()
    torch._dynamo.reset()
    fast = torch.compile(step(model), backend="mstc", options=chunked(7, 5))
    for _ in range(2):
        _, expected = gradients_of(step(model.train()), dict(model.named_parameters()), inputs())
        _, got = gradients_of(fast, dict(model.named_parameters()), inputs())
        assert max(gradient_errors(got, expected).values()) <= 1e-9
        with torch.no_grad():
            model.eval()
            torch.testing.assert_close(fast(*inputs()), step(model)(*inputs()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_half_precision_parameters_of_a_model(dtype: torch.dtype) -> None:
    """No further from float64 than eager is."""
    ids = tokens()
    distance: dict[str, float] = {}
    reference = causal("llama", dtype).double()
    with true_float64():
        _, exact = gradients_of(loss_of(reference), dict(reference.named_parameters()), (ids,))
    for system in ("eager", "mstc"):
        model = causal("llama", dtype)
        fn: Any = loss_of(model)
        if system == "mstc":
            torch._dynamo.reset()
            fn = torch.compile(fn, backend="mstc", options=chunked())
        _, got = gradients_of(fn, dict(model.named_parameters()), (ids,))
        assert all(g is not None and g.dtype == dtype for g in got.values())
        errors = gradient_errors(got, exact)
        distance[system] = (sum(e**2 for e in errors.values()) / len(errors)) ** 0.5
    print(distance)
    assert distance["mstc"] <= 1.05 * distance["eager"]
