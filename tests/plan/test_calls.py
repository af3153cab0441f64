"""What a step's calls are read as."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mstc.cli.plan.draft import capture
from mstc.plan.calls import Call
from mstc.plan.devices import Device, device

A100 = device("a100-80g")
CPU = Device("cpu", "a CPU", 1 << 36, {"float32": 1e11}, 2e10, 2e9)
B, T, H, D = 2, 1000, 4, 72


class Attention(nn.Module):
    def __init__(self, shared: int) -> None:
        super().__init__()
        self.shared = shared
        self.layers = nn.ModuleList(nn.Linear(H * D, (H + 2 * H // shared) * D) for _ in range(2))
        self.out = nn.Linear(H * D, H * D)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = layer(x).unflatten(-1, (-1, D)).transpose(1, 2).split([H, H // self.shared, H // self.shared], 1)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x.square().mean()


def _attention(dtype: torch.dtype, shared: int, where: Device) -> list[Call]:
    with torch.device("meta"):
        module, x = Attention(shared).to(dtype), torch.zeros(B, T, H * D, dtype=dtype)
    return [c for c in capture(module, [x], where).step.calls if c.kind == "mixer"]


@pytest.mark.parametrize(
    ("dtype", "shared", "held"),
    [
        (torch.float32, 1, 4 * B * H * 1024),
        (torch.bfloat16, 1, 4 * B * H * 1024 * (1 + 96)),
        (torch.bfloat16, 2, 4 * B * H * 1024 * (1 + 96) + 2 * (2 * B * H * T * D)),
    ],
)
def test_attention_of_a_gpu_holds_its_accumulators_in_the_backward(dtype: torch.dtype, shared: int, held: int) -> None:
    """Rows are rounded up to 128, widths to 32; of shared heads each has gradients of its own."""
    assert [c.cost.work for c in _attention(dtype, shared, A100)] == [(0, held)] * 2


def test_the_device_that_is_planned_for_tells_whose_kernels_run() -> None:
    """Not that of the tensors, which are on none."""
    forward, backward = _attention(torch.float32, 1, CPU)[0].cost.work
    assert forward == 4 * torch.get_num_threads() * 256 * (512 + 2 + D)
    assert backward >= 4 * torch.get_num_threads() * 2 * 256 * 512


def test_calls_know_their_layer_and_what_ranks_exchange() -> None:
    calls = _attention(torch.bfloat16, 2, A100)
    assert [c.exchanged for c in calls] == [2 * 2 * B * T * D * H // 2] * 2


def test_scans_are_a_kind_of_their_own() -> None:
    from mstc.kernels import linear_attention

    class Scan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                q, k, v = (p.unflatten(-1, (2, 16)) for p in layer(x).chunk(3, -1))
                x = x + linear_attention(q, k, v).flatten(-2)
            return x.square().mean()

    with torch.device("meta"):
        module, x = Scan(), torch.zeros(B, T, 32)
    calls = capture(module, [x], A100).step.calls
    scans = [c for c in calls if c.kind == "scan"]
    assert [(c.label, c.exchanged) for c in scans] == [("scalar decay", 4 * B * 2 * 16 * 16)] * 2
    assert [c.layer for c in calls if c.kind == "loop"] == [0, 1]
