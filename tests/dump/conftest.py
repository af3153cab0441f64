"""A small model that every pass has something to do for, its dump, and a real browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mstc.dump import files
from mstc.dump.files import Drawn
from mstc.dump.model import Dump
from testkit.dumps import explain_tiny

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def tiny_dump() -> Dump:
    return explain_tiny()


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Any:
    """Compares a text with a golden file; ``--update-golden`` writes it."""

    def compare(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / name
        if request.config.getoption("--update-golden"):
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8"), f"{name} differs; look, then run with --update-golden"

    return compare


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(CHROMIUM)} is installed (make setup installs Debian's chromium)")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


SCRIPT = """
import json, resource, sys, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import mstc

config = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=131072, use_cache=False)
with torch.device("meta"):
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    ids = torch.zeros(1, 131072, dtype=torch.long)

def loss_fn(ids):
    return model(input_ids=ids, labels=ids).loss

started = time.process_time()
report = mstc.explain(loss_fn, ids)
seconds = time.process_time() - started
report.save(sys.argv[1])
loops = sum(bool(r.loop) for r in report.regions)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"seconds": seconds, "gib": peak, "loops": loops}))
"""


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The dump of Llama-3-8B, made in a process of its own, and what that took."""
    folder = tmp_path_factory.mktemp("llama")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def llama_dump(llama: tuple[Path, dict[str, Any]]) -> Dump:
    return files.read(llama[0])


class Opened:
    """A page opened from disk, with everything that it said and asked for."""

    def __init__(self, browser: Any, folder: Path) -> None:
        self.context = browser.new_context(viewport={"width": 1400, "height": 900}, reduced_motion="reduce")
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append("dialog") or dialog.dismiss())
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.url = (folder / "report.html").as_uri()
        self.page.goto(self.url)
        self.page.wait_for_selector("html[data-ready=true]", state="attached")

    def check(self) -> None:
        """Nothing was said on the console, and nothing but the page itself was asked for."""
        assert self.said == []
        assert self.asked and set(self.asked) == {self.url}
        self.context.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens the page of a dump, and holds it to silence when the test ends."""
    pages: list[Opened] = []

    def open_dump(dump: Dump, difference: Any = None) -> Any:
        Drawn(dump, difference).save(tmp_path)
        pages.append(Opened(browser, tmp_path))
        return pages[-1].page

    yield open_dump
    for page in pages:
        page.check()


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
