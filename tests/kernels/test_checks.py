"""Every bad argument is an error that names it, what was given and what is allowed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import mstc.kernels
from mstc.errors import MstcError
from mstc.kernels import (
    KernelArgumentError,
    dplr_attention,
    linear_attention,
    selective_scan,
    sliding_window_attention,
)
from mstc.kernels.common import dispatch


def good() -> dict[str, Any]:
    return {"q": torch.randn(2, 6, 3, 4), "k": torch.randn(2, 6, 3, 4), "v": torch.randn(2, 6, 3, 5)}


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("q", {"q": torch.randn(6, 3, 4)}, "[B, T, H, K]"),
    ("q", {n: torch.randn(2, 0, 3, 4) for n in "qkv"}, "at least one token"),
    ("q", {n: torch.randn(1, 6, 1, 257) for n in "qkv"}, "1 to 256"),
    ("k", {"k": torch.randn(2, 6, 3, 5)}, "[B=2, T=6, H=3, K=4]"),
    ("k", {"k": torch.randn(2, 6, 3, 4).double()}, "the dtype of q, torch.float32"),
    ("k", {"k": torch.randn(2, 6, 3, 4, device="meta")}, "the device of q, cpu"),
    ("q", {"q": torch.ones(2, 6, 3, 4, dtype=torch.long)}, "torch.bfloat16"),
    ("v", {"v": torch.randn(2, 5, 3, 4)}, "T=6"),
    ("v", {"v": torch.randn(2, 6, 12)}, "[B, T, H, V]"),
    ("decay", {"decay": torch.randn(2, 6)}, "[H], [B, T, H] or [B, T, H, K]"),
    ("decay", {"decay": torch.randn(4)}, "[H=3]"),
    ("decay", {"decay": torch.randn(2, 6, 3, 5)}, "K=4"),
    ("beta", {"beta": torch.randn(2, 6)}, "[B=2, T=6, H=3]"),
    ("bonus", {"bonus": torch.randn(3, 4)}, "only with a decay"),
    ("initial_state", {"initial_state": torch.randn(2, 3, 5, 4)}, "[N=2, H=3, K=4, V=5]"),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 6])}, "B=1"),
    ("cu_seqlens", {"cu_seqlens": [0, 6]}, "a tensor or None"),
    ("k", {"k": None}, "a tensor"),
    ("decay", {"decay": -0.5}, "a tensor or None"),
    ("scale", {"scale": "small"}, "a number or None"),
    ("scale", {"scale": True}, "a number or None"),
    ("scale", {"scale": torch.tensor(0.5, requires_grad=True)}, "a number or None"),
]


@pytest.mark.parametrize(("name", "change", "allowed"), BAD)
def test_bad_arguments(name: str, change: dict[str, Any], allowed: str) -> None:
    with pytest.raises(KernelArgumentError) as error:
        linear_attention(**{**good(), **change})
    assert str(error.value).startswith(f"{name}: got ")
    assert allowed in str(error.value)


@pytest.mark.parametrize("window", [0, 2.5, None, torch.tensor(3)])
def test_a_window_that_is_no_number_of_keys(window: Any) -> None:
    with pytest.raises(KernelArgumentError, match="^window: got .*; allowed: an int, 1 or more"):
        sliding_window_attention(**good(), window=window)


def test_a_scale_of_the_other_functions() -> None:
    with pytest.raises(KernelArgumentError, match="^scale: got str; allowed: a number or None$"):
        sliding_window_attention(**good(), window=2, scale="small")  # type: ignore[call-overload]
    with pytest.raises(KernelArgumentError, match="^scale: got Tensor; allowed: a number or None$"):
        dplr_attention(*torch.randn(5, 1, 3, 2, 4), decay=-torch.rand(1, 3, 2, 4), scale=torch.ones(()))  # type: ignore[call-overload]


def test_a_missing_tensor_of_the_other_functions() -> None:
    x = torch.randn(1, 3, 4)
    with pytest.raises(KernelArgumentError, match="^B: got NoneType; allowed: a tensor$"):
        selective_scan(x, x, torch.randn(4, 2), None, torch.randn(1, 3, 2))  # type: ignore[arg-type]
    with pytest.raises(KernelArgumentError, match="^decay: got NoneType; allowed: a tensor$"):
        dplr_attention(*torch.randn(5, 1, 3, 2, 4), decay=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("offsets", [[1, 6], [0, 5], [0, 4, 3, 6], [0, 7]])
def test_offsets_that_do_not_add_up(offsets: list[int]) -> None:
    one = {n: t[:1] for n, t in good().items()}
    with pytest.raises(MstcError, match=r"cu_seqlens: got .*0 first, T=6 last, never falling"):
        linear_attention(**one, cu_seqlens=torch.tensor(offsets))


@pytest.mark.parametrize("offsets", [torch.tensor([0.0, 6.0]), torch.tensor([[0, 6]]), torch.tensor([0])])
def test_offsets_of_a_wrong_form(offsets: Tensor) -> None:
    one = {n: t[:1] for n, t in good().items()}
    with pytest.raises(KernelArgumentError, match="cu_seqlens: got "):
        linear_attention(**one, cu_seqlens=offsets)


def test_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        device = torch.device("cuda", 0)
        dtype = torch.float32

    monkeypatch.setattr(dispatch, "find_spec", lambda name: None if name == "triton" else name)
    with pytest.raises(KernelArgumentError, match="without Triton.*pip install triton"):
        dispatch.triton_form(OnGpu(), "scalar_decay")  # type: ignore[arg-type]
    with pytest.raises(KernelArgumentError, match="^x: got "):
        dispatch.triton_form(OnGpu(), "selective_scan")  # type: ignore[arg-type]


def test_float64_takes_the_chunked_form_on_a_gpu() -> None:
    class OnGpu:
        device = torch.device("cuda", 0)
        dtype = torch.float64

    assert dispatch.triton_form(OnGpu(), "scalar_decay") is None  # type: ignore[arg-type]


def test_names_of_the_package() -> None:
    assert "linear_attention" in dir(mstc.kernels)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mstc.kernels.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_importing_and_running_on_a_cpu_need_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import mstc; assert 'torch' not in sys.modules\n"
        "import torch, mstc.kernels\n"
        "from mstc.kernels import dplr_attention, linear_attention, merge, selective_scan, sliding_window_attention\n"
        "import mstc.kernels.split, mstc.kernels.feature_maps\n"
        "print(linear_attention(*torch.ones(3, 1, 70, 2, 4)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[1, 70, 2, 4]" in done.stdout
