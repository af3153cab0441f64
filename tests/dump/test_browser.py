"""The page in a real browser, opened from disk: each test ends by holding it to silence (see conftest)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mstc.dump.diff import difference
from mstc.dump.model import Dump, Measured
from testkit.dumps import OPTIONS, WHOLE, explain, explain_tiny
from testkit.tiny import Tiny, inputs, mean_loss


def text_of(page: Any, selector: str) -> list[str]:
    return [t.strip() for t in page.locator(selector).all_inner_texts()]


def test_a_folded_layer_expands(opened: Any, llama_dump: Dump) -> None:
    page = opened(llama_dump)
    (fold,) = llama_dump.graphs[0].folds
    assert fold.count == 32
    assert text_of(page, ".frame > span") == [f"{fold.count} identical layers"]
    folded = page.locator(".card").count()
    page.click("text=Expand")
    assert page.locator(".frame").count() == fold.count
    assert page.locator(".card").count() == folded + (fold.count - 1) * fold.period
    page.click("text=Fold")
    assert page.locator(".card").count() == folded


def test_a_block_opens_down_to_its_nodes(opened: Any, llama_dump: Dump) -> None:
    page = opened(llama_dump)
    page.click(".card.chunked")
    assert page.locator('.op[data-node^="linear"]').count() == 4
    assert "gated MLP" in text_of(page, "#detail h2")[0]
    page.click("[aria-label='Next layer']")
    assert "layer 2 of 32" in page.locator(".crumbs").inner_text()
    page.click('.op[data-node^="linear"] >> nth=0')
    assert "modeling_llama.py" in page.locator("#detail .source").inner_text()
    assert "model.layers.1" in page.locator("#detail").inner_text()
    page.keyboard.press("Escape")
    assert page.locator(".crumbs").count() == 0


def test_search_finds_a_node(opened: Any, llama_dump: Dump) -> None:
    page = opened(llama_dump)
    page.keyboard.press("/")
    page.keyboard.type("layers.7.mlp.down_proj linear")
    assert len(text_of(page, "#hits li")) == 1
    page.keyboard.press("Enter")
    page.wait_for_selector(".op.found")
    assert page.locator(".op.found").inner_text().startswith("linear")
    assert "model.layers.7.mlp.down_proj" in page.locator("#detail").inner_text()
    page.keyboard.press("/")
    page.keyboard.type("nothing of the kind")
    assert text_of(page, "#hits li") == ["nothing found"]


def test_an_input_is_found_beside_its_reader(opened: Any, tiny_dump: Dump) -> None:
    page = opened(tiny_dump)
    page.fill("#search", "head.weight")
    page.press("#search", "Enter")
    page.wait_for_selector(".op.found")
    assert page.locator(".op.found").inner_text().startswith("head.weight")


def test_before_and_after_of_a_pass(opened: Any, tiny_dump: Dump) -> None:
    page = opened(tiny_dump)
    page.click("[data-tab=passes]")
    page.click(".pass:has-text('lm_head')")
    assert page.locator(".half").count() == 2
    page.click("[data-view=before]")
    assert page.locator(".half.before .op.removed").count() >= 3 and page.locator(".half.after").count() == 0
    page.click("[data-view=after]")
    assert "mstc.loss_loop" in page.locator(".half.after").inner_text() and page.locator(".half.before").count() == 0
    assert page.locator(".op.added").count() >= 1
    page.click("[data-view=text]")
    assert "+ loss_loop" in page.locator("pre.text").inner_text()


def test_a_refusal_says_why_and_what_would_help(opened: Any) -> None:
    page = opened(explain_tiny(WHOLE))
    assert page.locator(".card.refused").count() >= 2
    page.click("[data-tab=whynot]")
    said = page.locator(".refusal").first.inner_text()
    assert "chunks would not pay" in said and "What would make it work: a longer sequence" in said
    page.click(".refusal .link >> nth=0")
    page.wait_for_selector(".op.found")
    assert "left as it was" in page.locator("#detail").inner_text()


def test_memory_about_and_theme(opened: Any, tiny_dump: Dump) -> None:
    page = opened(tiny_dump)
    page.click("[data-tab=memory]")
    assert page.locator("svg.plot").count() == 2 and page.locator("path.area").count() == 8
    page.hover("svg.plot >> nth=1")
    assert "parameters" in page.locator(".tip >> nth=1").inner_text()
    assert "mstc dump --measure" in page.locator("section.page").inner_text()
    page.click("[data-tab=about]")
    assert "python explain.py" in page.locator(".command").inner_text()
    assert "chunk_tokens" in page.locator(".boxes").inner_text()
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light


def test_measured_memory(opened: Any, tiny_dump: Dump) -> None:
    eager = Measured("eager", "cpu", 3 << 20, ((0.0, 0), (0.1, 3 << 20)))
    page = opened(replace(tiny_dump, measured=(eager, replace(eager, system="mstc", peak=1 << 20))))
    page.click("[data-tab=memory]")
    assert page.locator("path.line").count() == 2
    assert "eager, cpu: peak 3.0 MiB above rest" in page.locator(".measured").inner_text()


def test_keys_zoom_and_move(opened: Any, tiny_dump: Dump) -> None:
    page = opened(tiny_dump)
    moved = [page.evaluate("document.querySelector('.plane').style.transform")]
    page.focus(".canvas")
    for key in ("+", "ArrowLeft", "ArrowDown", "-", "0"):
        page.keyboard.press(key)
        page.wait_for_timeout(50)
        moved.append(page.evaluate("document.querySelector('.plane').style.transform"))
    assert len(set(moved[:5])) == 5 and moved[-1] == moved[0]
    page.focus("[data-tab=model]")
    page.keyboard.press("ArrowRight")
    assert page.locator("[data-tab=passes][aria-selected=true]").count() == 1


def test_graph_breaks_show_all_graphs(opened: Any) -> None:
    model = Tiny()

    def broken(x: Tensor, labels: Tensor) -> Tensor:
        features = model.features(x)
        torch._dynamo.graph_break()
        return mean_loss(model.head(features), labels)

    page = opened(explain(broken, *inputs(), options=OPTIONS))
    assert text_of(page, "#graphs button") == ["graph 0", "graph 1"]
    assert "Graph break" in page.locator(".broken").inner_text()
    page.click("text=graph 1")
    assert page.locator(".broken").count() == 0 and page.locator(".card.loss").count() == 1


def test_no_graph_says_so(opened: Any) -> None:
    assert "No graph was captured" in opened(explain(lambda: 3, options={})).locator("main").inner_text()


def test_two_dumps_compared(opened: Any, tiny_dump: Dump) -> None:
    page = opened(tiny_dump, difference(explain_tiny(WHOLE), tiny_dump, ("whole", "chunked")))
    page.click("[data-tab=compare]")
    said = page.locator("section.page").inner_text()
    assert "options.mini_sequence" in said and "A: whole" in said and "+loss_loop" in said


HOSTILE = "<img src=x onerror=alert(1)>\"'`&</script><script>alert(2)</script>{{7*7}}"


def test_hostile_names_stay_text(opened: Any) -> None:
    class Sneaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(HOSTILE.replace(".", ""), nn.Linear(4, 4))
            self.add_module("long" * 250_000, nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            for child in self.children():
                x = child(x)
            return x.sum()

    Sneaky.__name__ = HOSTILE
    dump = explain(Sneaky(), torch.randn(3, 4), options=WHOLE)
    page = opened(dump)
    assert page.content().count("</script>") == page.locator("script").count()
    assert page.locator("h1").inner_text() == HOSTILE
    assert len(page.content()) < 1_000_000
    for tab in ("passes", "whynot", "memory", "about", "model"):
        page.click(f"[data-tab={tab}]")
    page.fill("#search", "<img")
    page.press("#search", "Enter")
    page.wait_for_selector(".op.found")
    assert "<img src=x onerror=alert(1)>" in page.locator("#detail").inner_text()
    assert page.locator("img").count() == 0


def test_a_large_page_is_small(opened: Any, llama_dump: Dump, tmp_path: Any) -> None:
    opened(llama_dump)
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


@pytest.mark.slow
def test_a_large_page_opens_fast(opened: Any, llama_dump: Dump) -> None:
    """A timed test belongs on an idle machine."""
    times = []
    for _ in range(3):
        page = opened(llama_dump)
        times.append(page.evaluate("performance.timing.loadEventEnd - performance.timing.navigationStart"))
    assert min(times) < 2000, times


def test_two_thousand_nodes_stay_usable(opened: Any) -> None:
    def long(x: Tensor) -> Tensor:
        for i in range(1000):
            x = x.sin() * (i + 1)
        return x

    dump = explain(long, torch.randn(4), options=WHOLE)
    assert len(dump.graphs[0].first) > 2000
    page = opened(dump)
    page.click(".card >> nth=0")
    assert page.locator(".op").count() <= 260
    assert "nodes 1 to 240" in page.locator(".crumbs").inner_text()
    page.click("[aria-label='Later nodes']")
    assert "nodes 241 to 480" in page.locator(".crumbs").inner_text()
    page.fill("#search", "sin_900")
    page.press("#search", "Enter")
    page.wait_for_selector(".op.found[data-node=sin_900]")
    click = "document.querySelector('[data-tab=passes]').click()"
    assert page.evaluate(f"(() => {{ const t = performance.now(); {click}; return performance.now() - t; }})()") < 1000
