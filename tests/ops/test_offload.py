"""Bytes that wait elsewhere come back as they went, in any layout, and take no memory meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mstc.graph.editor import Editor
from mstc.graph.normal_form import normalize
from mstc.lower import lower
from mstc.ops import offload as _registered  # noqa: F401

MIB = 2**20
ops = torch.ops.mstc


def _back(x: Tensor, handle: Tensor) -> Tensor:
    found: Tensor = ops.fetch(handle, [], list(x.shape), list(x.stride()), x.dtype, x.device)
    return found


def _values() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 7, generator=generator)
    return [
        x,
        x.to(torch.bfloat16),
        x.to(torch.float16).transpose(0, 1),
        x.permute(2, 0, 1),
        x[1:],  # in the middle of its memory
        torch.randint(0, 9, (11,), generator=generator),
        torch.tensor(float("nan")),
        x > 0,
    ]


@pytest.mark.parametrize("x", _values(), ids=lambda x: f"{x.dtype}{list(x.shape)}")
def test_the_bytes_come_back(x: Tensor) -> None:
    handle = ops.offload(x, list(x.stride()))
    assert handle.dtype == torch.uint8 and handle.numel() == x.numel() * x.element_size()
    for _ in range(2):  # a graph that is kept is run backward twice
        found = _back(x, handle)
        assert found.stride() == x.stride() and torch.equal(found.nan_to_num(7), x.nan_to_num(7))


def test_other_strides_than_the_compiler_promised_are_put_right() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    handle = ops.offload(x.t().contiguous().t(), [6, 1])
    assert torch.equal(_back(x, handle), x)


def _resident() -> int:
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def _files(folder: Path) -> int:
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_what_waits_is_no_part_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSTC_OFFLOAD_DIR", str(tmp_path))
    gc.collect()
    before = _resident()
    handles = [ops.offload(torch.full((16 * MIB,), float(i)), [1]) for i in range(3)]
    assert _resident() - before < 16 * MIB
    x = torch.empty(16 * MIB)
    assert all(torch.equal(_back(x, h), torch.full_like(x, i)) for i, h in enumerate(handles))
    del x
    gc.collect()
    assert _resident() - before < 16 * MIB
    assert _files(tmp_path) == 3 and not list(tmp_path.iterdir())
    del handles
    gc.collect()
    assert not _files(tmp_path)


class _Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).sin().t().contiguous().t()
        return x.square().sum()


def _compiled(tagged: bool, name: str) -> Callable[[Tensor], Tensor]:
    """The chain, the results of its products offloaded where ``tagged``."""

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        form = normalize(gm, inputs)
        editor = Editor(form.gm)
        for node in form.gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
            if tagged:
                editor.offload(node, (0,), "by hand")
        return lower(form.gm, inputs, name)

    torch._dynamo.reset()
    return torch.compile(_Chain(), backend=backend, dynamic=False)


@pytest.mark.parametrize("name", ["aot_eager", "inductor"])
def test_compiled_graphs_save_handles_and_give_the_same_gradients(name: str) -> None:
    """Also where the same graph was compiled and cached without offloading."""
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    gradients, fetched = [], []
    for tagged in (False, True):
        fn = _compiled(tagged, name)
        given = x.clone().requires_grad_()
        fn(given).backward()
        given.grad = None
        with profile(activities=[ProfilerActivity.CPU]) as run:
            fn(given).backward()
        assert given.grad is not None
        gradients.append(given.grad)
        fetched.append(sum(e.count for e in run.key_averages() if e.key == "mstc::fetch"))
    assert fetched == [0, 3]
    assert torch.equal(*gradients)
