"""Makes the pictures in docs/pictures from the page itself: ``python tests/support/pictures.py``."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from playwright.sync_api import Browser, Page, sync_playwright
from torch import Tensor

from mstc.dump.explain import explained
from mstc.dump.files import Drawn
from mstc.options import parse_options

OUT = Path(__file__).resolve().parents[2] / "docs" / "pictures"
D, V, S = 64, 512, 256


@dataclass(frozen=True)
class Example:
    """A small function for which one pass has something to do."""

    name: str
    fn: Callable[..., Any]
    args: tuple[Tensor, ...]
    options: dict[str, Any] = field(default_factory=dict)
    height: int = 760


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta").requires_grad_()


def _labels(*shape: int) -> Tensor:
    return torch.zeros(shape, device="meta", dtype=torch.long)


def _loss_and_logits(x: Tensor, w: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(x, w)
    return F.cross_entropy(logits, labels), logits


def _masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    positions = torch.arange(q.shape[-2], device=q.device)
    mask = positions[None, :] <= positions[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
    return torch.softmax((q @ k.transpose(-1, -2) * 0.25).masked_fill(hidden, float("-inf")), -1) @ v


def _softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
    scores = 30 * torch.tanh(q @ k.transpose(-1, -2) / 30)
    return torch.softmax(scores.masked_fill(hidden, float("-inf")), -1) @ v


def _shifted(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(x, w)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _loss(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), labels)


def _layer(x: Tensor, qkv: Tensor, o: Tensor, up: Tensor, down: Tensor, up2: Tensor, qkv2: Tensor) -> Tensor:
    def attend(x: Tensor, w: Tensor) -> Tensor:
        q, k, v = (F.linear(x, part).unflatten(-1, (4, -1)).transpose(1, 2) for part in w.unbind(0))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    x = x + F.linear(attend(x, qkv), o)
    x = x + F.linear(F.silu(F.linear(x, up)) * F.linear(x, up2), down)
    return attend(x, qkv2)


def _mlp(x: Tensor, up: Tensor, down: Tensor, gate: Tensor) -> Tensor:
    x = x.cumsum(1)
    x = x + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    return x.cumsum(1)


_HEADS = (_meta(1, 4, S, 16), _meta(1, 4, S, 16), _meta(1, 4, S, 16))
_HEAD = (_meta(S, D), _meta(V, D), _labels(S))
_WIDE = (_meta(2 * D, D), _meta(D, 2 * D), _meta(2 * D, D))
_LAYER = (_meta(1, S, D), _meta(3, D, D), _meta(D, D), *_WIDE, _meta(3, D, D))
_CHUNKS: dict[str, Any] = {"mini_sequence": {"chunk_tokens": 64}, "lm_head": {"chunk_tokens": 64}}
EXAMPLES = (
    Example("unused_outputs", _loss_and_logits, _HEAD, {"unused_outputs": [1]}, 520),
    Example("masks", _masked, _HEADS, {}, 700),
    Example("written_attention", _written, _HEADS, {}, 760),
    Example("triangles", _softcapped, _HEADS, {}, 700),
    Example("query_chunks", _softcapped, _HEADS, {"query_chunks": {"chunk_tokens": 64}}, 800),
    Example("select", _shifted, (_meta(2, S, D), _meta(V, D), _labels(2, S)), {}, 640),
    Example("token_losses", _loss, _HEAD, {}, 820),
    Example("lm_head", _loss, _HEAD, _CHUNKS, 560),
    Example("mini_sequence", _mlp, (_meta(1, S, D), *_WIDE), _CHUNKS, 700),
    Example("recompute", _layer, _LAYER, _CHUNKS, 520),
)


def _open(browser: Browser, folder: Path, size: tuple[int, int], theme: Any = "light") -> Page:
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme=theme,
        reduced_motion="reduce",
        device_scale_factor=1.5,
    )
    page = context.new_page()
    page.goto((folder / "report.html").as_uri())
    page.wait_for_selector("html[data-ready=true]", state="attached")
    return page


def _pass_picture(browser: Browser, example: Example, folder: Path) -> None:
    torch._dynamo.reset()
    dump = explained(example.fn, example.args, {}, parse_options({"lower": "eager", **example.options}), "")[1]
    Drawn(dump).save(folder)
    page = _open(browser, folder, (1180, example.height))
    page.click("[data-tab=passes]")
    page.click(f".pass:has-text('{example.name}')")
    page.wait_for_timeout(300)
    page.locator(".halves").screenshot(path=OUT / f"{example.name}.png")
    page.context.close()


def _llama(folder: Path) -> None:
    """Llama-3-8B's shapes, on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=131072, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        ids = torch.zeros(1, 131072, dtype=torch.long)

    def llama_3_8b(ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

    Drawn(explained(llama_3_8b, (ids,), {}, parse_options({}), "mstc dump llama.py:build --seq 131072")[1]).save(folder)


def main(names: Sequence[str]) -> None:
    """All pictures, or those of the passes named (and of ``model``)."""
    OUT.mkdir(parents=True, exist_ok=True)
    found = next(path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name)))
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as temporary:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        folder = Path(temporary)
        for example in EXAMPLES:
            if not names or example.name in names:
                _pass_picture(browser, example, folder)
        if not names or "model" in names:
            _model_pictures(browser, folder)
        browser.close()


def _model_pictures(browser: Browser, folder: Path) -> None:
    _llama(folder)
    page = _open(browser, folder, (1360, 860))
    page.wait_for_timeout(300)
    page.screenshot(path=OUT / "model.png")
    page.click("[data-tab=memory]")
    page.wait_for_timeout(300)
    page.locator(".halves").screenshot(path=OUT / "memory.png")


if __name__ == "__main__":
    main(sys.argv[1:])
