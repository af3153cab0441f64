"""The masks pass on graphs as they come: what is rewritten, recorded and refused, and that the numbers stay."""

from __future__ import annotations

import copy
import resource
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from mstc.graph.attention import WINDOW_ATTENTION
from mstc.graph.normal_form import normalize
from mstc.options import Options
from mstc.passes.base import Context
from mstc.passes.masks import MASKS
from testkit.exactness import of_all_pairs
from testkit.mask_pass import Seen, attend, band, causal, compiled, queries, run_pass, same_numbers

aten = torch.ops.aten


# ------------------------------------------------------------------ what is rewritten


def test_a_causal_mask_becomes_is_causal() -> None:
    seen = compiled(attend(causal), queries(2, 4, 12, 8))
    (call,) = seen.attention
    assert call.args[3:] == (None, 0.0, True)
    assert seen.labels == ["causal"]
    assert not seen.refusals
    assert not any(n.target is aten.le.Tensor for n in seen.after.graph.nodes)
    same_numbers(seen)


def test_a_mask_that_is_all_true_goes() -> None:
    seen = compiled(attend(lambda q: torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool)), queries(2, 4, 12, 8))
    (call,) = seen.attention
    assert call.args[3:] == (None, 0.0, False)
    assert seen.labels == ["no mask"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_added_mask_in_the_dtype_of_the_scores(dtype: torch.dtype) -> None:
    def build(q: torch.Tensor) -> torch.Tensor:
        return (1.0 - causal(q).to(q.dtype)) * torch.finfo(q.dtype).min

    q = queries(1, 2, 16, 8, dtype=dtype)
    seen: list[Seen] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.append(run_pass(gm, inputs))
        return seen[-1].after

    torch._dynamo.reset()
    got = torch.compile(attend(build), backend=backend)(q)
    assert seen[0].sites
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, attend(build)(q), rtol=tolerance, atol=tolerance)


def test_scale_and_grouped_heads_are_kept() -> None:
    def fn(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, k, attn_mask=causal(q), scale=0.2, enable_gqa=True)

    seen = compiled(fn, queries(2, 4, 12, 8), queries(2, 2, 12, 8))
    (call,) = seen.attention
    assert dict(call.kwargs) == {"scale": 0.2, "enable_gqa": True}


def test_dropout_is_kept() -> None:
    fn = attend(causal, dropout_p=0.5)
    seen: list[Seen] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.append(run_pass(gm, inputs))
        return seen[-1].after

    torch._dynamo.reset()
    q = queries(2, 4, 12, 8)
    torch.manual_seed(3)
    got = torch.compile(fn, backend=backend)(q)
    torch.manual_seed(3)
    torch.testing.assert_close(got, fn(q))
    assert seen[0].attention[0].args[3:] == (None, 0.5, True)


def test_a_mask_shared_by_calls_and_expanded_to_heads() -> None:
    def fn(q: torch.Tensor) -> torch.Tensor:
        mask = causal(q)[None, None].expand(q.shape[0], q.shape[1], -1, -1)
        first = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        return F.scaled_dot_product_attention(first, q, q, attn_mask=mask)

    seen = compiled(fn, queries(2, 4, 12, 8))
    assert seen.labels == ["causal", "causal"]
    assert len(seen.sites) == 2


def test_gradients_stay() -> None:
    def fn(q: torch.Tensor) -> torch.Tensor:
        return attend(causal)(q).square().sum()

    q = queries(2, 4, 12, 8)
    first, second = q.clone().requires_grad_(), q.clone().requires_grad_()
    torch._dynamo.reset()
    torch.compile(fn, backend=lambda gm, inputs: run_pass(gm, inputs).after)(first).backward()
    fn(second).backward()
    torch.testing.assert_close(first.grad, second.grad)


def test_views_behind_the_call_still_work() -> None:
    """Another kernel may lay its result out in another order; what was a view of it must stay one."""

    def fn(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        out = F.scaled_dot_product_attention(q, k, k, attn_mask=causal(q)[None, None])
        return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)

    same_numbers(compiled(fn, queries(2, 4, 12, 8), queries(2, 1, 12, 8)))
    same_numbers(compiled(fn, queries(2, 4, 12, 8), queries(2, 4, 12, 8)))


@pytest.mark.parametrize("shape", [(2, 8, 8, 8), (2, 16, 16, 4), (1, 1, 1, 4), (4, 4, 4, 4)])
def test_a_length_that_equals_other_sizes(shape: tuple[int, ...]) -> None:
    seen = compiled(attend(causal), queries(*shape))
    assert len(seen.sites) == 1
    assert seen.sites[0].fact.kind == ("causal" if shape[-2] > 1 else "all_true")


# ------------------------------------------------------------------ lengths that are symbols


def test_symbolic_lengths_need_no_guard() -> None:
    seen: list[Seen] = []
    guards: list[int] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        form = normalize(copy.deepcopy(gm), inputs)
        values = [n.meta["val"] for n in form.gm.graph.find_nodes(op="placeholder")]
        env = next(v.node.shape_env for v in values if isinstance(v, torch.SymInt))
        guards.append(len(env.guards))
        list(MASKS.find(form.gm, Context(Options(), form.training)))
        guards.append(len(env.guards))
        seen.append(run_pass(gm, inputs))
        guards.append(len(env.guards))
        return seen[-1].after

    torch._dynamo.reset()
    fn = torch.compile(attend(causal), backend=backend, dynamic=True)
    for length in (12, 17, 31):
        q = queries(2, 4, length, 8)
        torch.testing.assert_close(fn(q), attend(causal)(q), rtol=1e-5, atol=1e-5)
    assert len(seen) == 1
    assert seen[0].labels == ["causal"]
    assert guards[0] == guards[1] == guards[2]


def test_a_window_of_a_symbolic_length() -> None:
    def window(q: torch.Tensor) -> torch.Tensor:
        i = torch.arange(q.shape[-2])
        return (i <= i[:, None]) & (i[:, None] - i < 5)

    seen = compiled(attend(window), queries(2, 4, 12, 8), dynamic=True)
    assert seen.labels == ["causal, window 5"]
    assert seen.attention[0].args[3:] == (5, True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.25])
def test_a_window_becomes_attention_to_a_window(causal: bool, scale: float | None) -> None:
    """On both sides too, with heads that share keys, and nothing of all pairs is left."""

    def fn(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        distance = torch.arange(31)[:, None] - torch.arange(31)
        mask = (distance < 5) & ((distance >= 0) if causal else (distance > -5))
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask, scale=scale, enable_gqa=True)

    seen = compiled(fn, queries(2, 4, 31, 8), queries(2, 2, 31, 8))
    (call,) = seen.attention
    assert (call.target, call.args[3:], call.kwargs) == (WINDOW_ATTENTION, (5, causal), {"scale": scale})
    assert of_all_pairs(seen.after.graph, 31) == []
    same_numbers(seen)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda q: F.scaled_dot_product_attention(q, q, q, band(q), dropout_p=1e-9), "dropout"),
        (lambda q: F.scaled_dot_product_attention(q[:, :, :9], q, q, band(q[:, :, :9], 12)), "as many queries"),
        (lambda q: F.scaled_dot_product_attention(q[0], q[0], q[0], band(q)), "dimensions"),
        (lambda q: F.scaled_dot_product_attention(q, q[:, :1], q[:, :1], band(q)), ""),
    ],
)
def test_windows_that_stay(fn: Callable[..., torch.Tensor], reason: str) -> None:
    """Heads that are repeated without being asked to are taken as shared ones; the others are refused."""
    seen = compiled(fn, queries(2, 4, 12, 8))
    assert bool(seen.sites) == (not reason)
    assert not reason or reason in seen.refusals[0].reason


def test_queries_and_keys_of_different_lengths() -> None:
    def fn(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(k.shape[-2]) <= torch.arange(q.shape[-2])[:, None]
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)

    for dynamic in (False, True):
        seen = compiled(fn, queries(1, 2, 6, 8), queries(1, 2, 10, 8), dynamic=dynamic)
        assert not seen.sites
        assert "as many queries as keys" in seen.refusals[0].reason


# ------------------------------------------------------------------ what stays


@pytest.mark.parametrize(
    ("build", "label"),
    [
        (lambda q, d: causal(q) & (d[:, None] == d), "causal, documents"),
        (lambda q, d: causal(q) & (d != 0), "causal, padding"),
    ],
)
def test_a_short_mask_that_comes_at_run_time_is_recorded_and_refused(build: Any, label: str) -> None:
    seen = compiled(attend(build), queries(2, 4, 6, 8), torch.tensor([1, 1, 1, 0, 0, 0]))
    assert seen.labels == [label]
    assert not seen.sites
    (refusal,) = seen.refusals
    assert label in refusal.reason
    assert "fewer than 1024 tokens" in refusal.reason
    assert refusal.remedy
    assert "mask_pass.py" in refusal.source


def test_a_mask_given_as_an_input_is_refused() -> None:
    def fn(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    for mask in (torch.ones(12, 12).tril().bool(), torch.zeros(12, 12), torch.randn(12, 12, requires_grad=True)):
        seen = compiled(fn, queries(2, 4, 12, 8), mask)
        assert not seen.sites
        assert len(seen.refusals) == 1


def test_calls_without_a_mask_are_recorded() -> None:
    assert compiled(attend(lambda q: None), queries(1, 2, 6, 8)).labels == ["no mask"]
    assert compiled(attend(lambda q: None, is_causal=True), queries(1, 2, 6, 8)).labels == ["causal"]


# ------------------------------------------------------------------ buffers


class Buffered(nn.Module):
    """Attention whose mask is a buffer, as nanoGPT keeps it."""

    bias: torch.Tensor

    def __init__(self, form: str = "bool", writes: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.form, self.writes = form, writes
        self.register_buffer("bias", torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        q, k, v = (t.view(x.shape[0], length, 2, 4).transpose(1, 2) for t in self.qkv(x).split(8, dim=-1))
        mask = self.bias[:, :, :length, :length]
        if self.form == "bool":
            mask = mask.bool()
        elif self.form == "fill":
            mask = torch.zeros_like(mask).masked_fill(mask == 0, float("-inf"))
        if self.writes:
            self.bias.mul_(1.0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("form", ["bool", "fill"])
def test_a_buffer_that_the_pipeline_offers(form: str) -> None:
    torch.manual_seed(0)
    model = Buffered(form)
    seen = compiled(model, queries(2, 16, 8), offer_buffers=True)
    assert seen.labels == ["causal"]
    assert len(seen.sites) == 1
    ((buffer, assumed),) = seen.assumed.items()
    assert "bias" in buffer.meta["user_name"]
    assert assumed.holds(model.bias)
    assert not assumed.holds(model.bias.clone())
    model.bias.mul_(1.0)
    assert not assumed.holds(model.bias)


def test_a_buffer_that_is_not_offered_is_refused() -> None:
    seen = compiled(Buffered(), queries(2, 16, 8))
    assert not seen.sites
    assert "bias" in seen.refusals[0].reason


def test_a_buffer_that_the_graph_changes_is_refused() -> None:
    seen = compiled(Buffered(writes=True), queries(2, 16, 8), offer_buffers=True)
    assert not seen.sites
    assert not seen.assumed


def test_a_buffer_that_is_no_triangle_is_refused() -> None:
    model = Buffered()
    model.bias[0, 0, 9, 3] = 0
    seen = compiled(model, queries(2, 16, 8), offer_buffers=True)
    assert not seen.sites


# ------------------------------------------------------------------ models


def test_transformer_encoder() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def fn(x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        result: torch.Tensor = encoder(x, mask=mask, is_causal=False)
        return result

    x = queries(2, 16, 16).requires_grad_()
    seen = compiled(fn, x)
    assert seen.labels == ["causal", "causal"]
    assert len(seen.sites) == 2


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "use_cache": False,
}
LAYERS = {"n_embd": 32, "n_layer": 2, "n_head": 4}
ALTERNATING = {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
CAUSAL = ["causal", "causal"]
WINDOW = ["causal, window 8", "causal, window 8"]
MODELS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "Llama": ({}, CAUSAL),
    "Mistral": ({"sliding_window": 8}, WINDOW),
    "ModernBert": (
        {"local_attention": 12, "global_attn_every_n_layers": 2, "pad_token_id": 0},
        ["no mask", "window 7"],
    ),
    "Gemma2": (ALTERNATING, []),  # written-out attention
    "Gemma3Text": (ALTERNATING, ["causal, window 8", "causal"]),
    "Qwen2": ({}, CAUSAL),
    "Qwen3": ({"head_dim": 8}, CAUSAL),
    "GPT2": (LAYERS, CAUSAL),
    "Phi3": ({"pad_token_id": 0}, CAUSAL),
    "Olmo2": ({}, CAUSAL),
    "GPTNeoX": ({}, CAUSAL),
    "Falcon": ({"alibi": False}, CAUSAL),
    "OPT": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, CAUSAL),  # is_causal by itself
}
CLASSES = {"ModernBert": "ModernBertForMaskedLM", "GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}
WRITTEN_OUT = ("Gemma2",)


def hugging_face(name: str, **config: Any) -> nn.Module:
    """A tiny random model."""
    transformers = pytest.importorskip("transformers")
    made = getattr(transformers, f"{name}Config")(**{**SMALL, **config})
    made._attn_implementation = "eager" if name in WRITTEN_OUT else "sdpa"
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, CLASSES.get(name, f"{name}ForCausalLM"))(made)
    return model.eval()


def loss_of(model: nn.Module, *names: str) -> Callable[..., torch.Tensor]:
    """The loss as a function of ids and of further inputs by name."""

    def fn(ids: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=ids, labels=ids, **dict(zip(names, more, strict=True))).loss
        return loss

    return fn


def token_ids(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(0))


MORE = ("Gemma2", "Qwen3", "Phi3", "Olmo2", "OPT")  # masks of the same forms


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in MORE)) for n in MODELS])
def test_models(name: str) -> None:
    config, labels = MODELS[name]
    seen: list[Seen] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.append(run_pass(gm, inputs))
        return seen[-1].after

    torch._dynamo.reset()
    fn = loss_of(hugging_face(name, **config))
    got = torch.compile(fn, backend=backend)(token_ids())
    torch.testing.assert_close(got, fn(token_ids()), rtol=1e-5, atol=1e-5)
    assert [label for s in seen for label in s.labels] == labels
    assert not any(s.refusals for s in seen)


@pytest.mark.parametrize("length", [32, 4])
def test_a_model_whose_length_equals_other_sizes(length: int) -> None:
    seen = compiled(loss_of(hugging_face("Llama")), token_ids(length=length))
    assert seen.labels == CAUSAL


def test_a_model_of_symbolic_length() -> None:
    seen = compiled(loss_of(hugging_face("Llama")), token_ids(), dynamic=True)
    assert seen.labels == CAUSAL


def test_a_window_as_long_as_the_row_is_causal() -> None:
    seen = compiled(loss_of(hugging_face("Mistral", sliding_window=24)), token_ids())
    assert seen.labels == CAUSAL
    assert len(seen.sites) == 2


@pytest.mark.parametrize(("window", "label"), [(None, "causal, documents"), (8, "causal, window 8, documents")])
def test_packed_documents(window: int | None, label: str) -> None:
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None].expand(2, 24).contiguous()
    model = hugging_face("Mistral", sliding_window=window)
    seen = compiled(loss_of(model, "position_ids"), token_ids(), positions)
    assert seen.labels == [label, label]
    assert not seen.sites
    assert all("position_ids" in r.reason or "more" in r.reason for r in seen.refusals)


def test_padding_does_not_become_causal() -> None:
    attention_mask = torch.ones(2, 24, dtype=torch.long)
    attention_mask[0, 20:] = 0
    seen = compiled(loss_of(hugging_face("Llama"), "attention_mask"), token_ids(), attention_mask)
    assert seen.labels == ["causal, padding", "causal, padding"]
    assert not seen.sites


def test_biased_scores_are_refused() -> None:
    seen = compiled(loss_of(hugging_face("Falcon", alibi=True)), token_ids())
    assert not seen.sites
    assert len(seen.refusals) == 2


# ------------------------------------------------------------------ cost


def test_a_long_row_costs_as_little_as_a_short_one() -> None:
    """S = 65536: the mask would take 4 GiB; nothing of that size is made when the pass runs."""
    seen: list[Seen] = []
    spent: list[float] = []
    grown: list[int] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.process_time()
        seen.append(run_pass(gm, inputs))
        spent.append(time.process_time() - started)
        grown.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss)
        return gm.forward

    model = hugging_face("Llama", max_position_embeddings=65536).to("meta")
    torch._dynamo.reset()
    torch.compile(loss_of(model), backend=backend)(torch.empty(1, 65536, dtype=torch.long, device="meta"))
    assert seen[0].labels == CAUSAL
    assert len(seen[0].sites) == 2
    assert spent[0] < 20
    assert grown[0] < 200 * 1024  # KiB
