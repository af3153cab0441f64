"""Every Triton kernel, compiled ahead of time for its targets; needs no GPU.

``compile_all`` gives one row per kernel, dtype and target: shared memory as the compiler reports it
and, for NVIDIA targets, registers and spills as cuobjdump reports them. A kernel that needs more shared
memory than its target has, does not fit.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["KERNELS", "SHARED_LIMIT", "TARGETS", "Row", "compile_all", "to_text"]

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
KIB = 1024
SHARED_LIMIT = {"sm_80": 99 * KIB, "sm_90": 227 * KIB, "gfx942": 64 * KIB}
"""Shared memory of one program: 99 KiB is what every sm_8x part has (sm_80 itself 163), 227 KiB Hopper's,
64 KiB the LDS of gfx942."""

TILES = {"H": 4, "K": 128, "V": 128, "BT": 64}
TYPES = {"bf16": 64, "fp32": 32}
"""Input dtype and the tile width that the launchers of the recurrences give it."""
WHOLE = {"BK": 128, "BV": 128}
"""Softmax attention takes whole rows of K and V."""
STEPS = {"bf16": 32, "fp32": 16}
"""Keys per step of softmax attention."""
SCAN = {"D": 1024, "N": 16, "BD": 32, "BN": 16}
GATE = ("g:fp32",)
ALL_KEYS = {"bf16": {"BK": 128, "BV": 32, "BR": 32}, "fp32": {"BK": 128, "BV": 16, "BR": 16}}
WIDEST = {"K": 256, "V": 256, "BK": 256, "BV": 16, "BR": 16}
"""The delta rule and dplr walk the chunks with the whole of K, few columns of V and few rows at a time."""
PAIRS = {"BC": 16, "BK": 16}
"""Sub-chunks and columns of K of the pairs under a decay over K."""

KERNELS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "scalar_decay/states": (("x", "y", *GATE, "s:fp32", "h", "s:fp32", "i", "i", "i", "f"), {"REVERSE": False}),
    "scalar_decay/states reverse": (("x", "y", *GATE, "s:fp32", "h", "s:fp32", "i", "i", "i", "f"), {"REVERSE": True}),
    "scalar_decay/output": (("q", "k", "v", *GATE, "h", "o", "i", "i", "f"), {}),
    "scalar_decay/gradients": (
        ("q", "k", "v", *GATE, "do", "h", "dh", "dq", "dk", "dv", "dg:fp32", "i", "i", "f"),
        {},
    ),
    "delta_rule/lower": (("k", "b:fp32", *GATE, "l:fp32", "w:fp32", "i", "i"), {}),
    "delta_rule/inverse": (("l:fp32", "x"), {"BC": 16}),
    "delta_rule/apply": (("x", "y", "w:fp32", "o", "i", "i"), {"W": 128, "HAS_WEIGHT": True, "TURNED": False}),
    "delta_rule/apply turned": (("x", "y", "w:fp32", "o", "i", "i"), {"W": 128, "HAS_WEIGHT": False, "TURNED": True}),
    "delta_rule/states": (("k", "w", "y", *GATE, "s:fp32", "h", "u", "s:fp32", "i", "i", "i"), ALL_KEYS),
    "delta_rule/states wide": (("k", "w", "y", *GATE, "s:fp32", "h", "u", "s:fp32", "i", "i", "i"), WIDEST),
    "delta_rule/local": (("q", "k", *GATE, "do", "du", "i", "i", "f"), {}),
    "delta_rule/adjoints": (
        ("q", "k", "w", *GATE, "do", "du", "s:fp32", "dh", "s:fp32", "i", "i", "i", "f"),
        ALL_KEYS,
    ),
    "delta_rule/adjoints wide": (
        ("q", "k", "w", *GATE, "do", "du", "s:fp32", "dh", "s:fp32", "i", "i", "i", "f"),
        WIDEST,
    ),
    "delta_rule/solve": (
        ("k", "v", *GATE, "b:fp32", "u", "dr", "h", "dk", "dv", "dg:fp32", "db:fp32", "i", "i"),
        {},
    ),
    "vector_decay/states": (("x", "y", *GATE, "s:fp32", "h", "s:fp32", "i", "i", "i", "f"), {"REVERSE": False}),
    "vector_decay/states reverse": (("x", "y", *GATE, "s:fp32", "h", "s:fp32", "i", "i", "i", "f"), {"REVERSE": True}),
    "vector_decay/output": (("q", "v", *GATE, "a", "h", "o", "i", "i", "f"), {}),
    "vector_decay/values": (("k", *GATE, "do", "a", "dh", "dv", "i", "i"), {}),
    "vector_decay/scores": (("do", "v", "da:fp32", "i", "i", "f"), {}),
    "vector_decay/pairs": (("q", "k", *GATE, "u:fp32", "a", "i", "i", "f"), PAIRS),
    "vector_decay/pair_gradients": (
        ("q", "k", *GATE, "u:fp32", "da:fp32", "dq:fp32", "dk:fp32", "dg:fp32", "du:fp32", "i", "i"),
        PAIRS,
    ),
    "vector_decay/gradients": (
        (
            *("q", "k", "v", *GATE, "do", "h", "dh", "dq:fp32", "dk:fp32", "dg:fp32"),
            *("dq", "dk", "dg:fp32", "i", "i", "f"),
        ),
        {},
    ),
    "dplr/rows": (("q", "k", "a", "b", "g:fp32", "q", "k", "a", "b", "p:fp32", "i", "i", "f"), {}),
    "dplr/walk": (
        ("r", "y", "x", "z", "w", "p:fp32", "s:fp32", "h", "u", "s:fp32", "i", "i", "i"),
        {d: {**sizes, "REVERSE": False} for d, sizes in ALL_KEYS.items()},
    ),
    "dplr/walk wide": (
        ("r", "y", "x", "z", "w", "p:fp32", "s:fp32", "h", "u", "s:fp32", "i", "i", "i"),
        {**WIDEST, "REVERSE": True},
    ),
    "dplr/mix": (("a", "y", "a", "y", "x", "h", "o", "i", "i"), {"TURNED": False}),
    "dplr/mix turned": (("a", "y", "a", "y", "x", "h", "o", "i", "i"), {"TURNED": True}),
    "sliding_window/forward": (("q", "k", "v", "o", "l:fp32", "i", "i", "i", "n", "n", "f"), WHOLE),
    "sliding_window/dq": (("q", "k", "v", "do", "l:fp32", "s:fp32", "dq", "i", "i", "i", "n", "n", "f"), WHOLE),
    "sliding_window/dkv": (
        ("q", "k", "v", "do", "l:fp32", "s:fp32", "dk", "dv", "i", "i", "i", "i", "n", "n", "f"),
        WHOLE,
    ),
    "selective_scan/states": (
        ("x", "dt", "a:fp32", "b", "s:fp32", "h:fp32", "s:fp32", "i", "i", "i"),
        {**SCAN, "REVERSE": False},
    ),
    "selective_scan/states reverse": (
        ("x", "dt", "a:fp32", "b", "s:fp32", "h:fp32", "s:fp32", "i", "i", "i"),
        {**SCAN, "REVERSE": True},
    ),
    "selective_scan/output": (("x", "dt", "a:fp32", "b", "c", "h:fp32", "y", "i", "i"), SCAN),
    "selective_scan/gradients": (
        (
            *("x", "dt", "a:fp32", "b", "c", "dy", "h:fp32", "dh:fp32", "t:fp32", "dx", "ddt", "da:fp32"),
            *("db:fp32", "dc:fp32", "i", "i", "n", "n"),
        ),
        SCAN,
    ),
}
"""Class and kernel -> (arguments in order, further constants, or those of each dtype). An argument is a pointer of the
input's dtype, or of the dtype after the colon; i is a pointer to int64, n an integer, f a float."""


@dataclass(frozen=True)
class Row:
    """What one kernel needs on one target; None where the target's tools do not say."""

    kernel: str
    dtype: str
    target: str
    shared: int
    registers: int | None
    spills: int | None

    @property
    def fits(self) -> bool:
        return self.shared <= SHARED_LIMIT[self.target]


def compile_all() -> Iterator[Row]:
    """Compile each kernel for each dtype and target."""
    for name in KERNELS:
        for dtype in TYPES:
            for target in TARGETS:
                yield compile_one(name, dtype, target)


def compile_one(name: str, dtype: str, target: str) -> Row:
    """Compile kernel ``name``, with decay and state: K = V = 128 (wide: 256), or D = 1024 and N = 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments, constants = KERNELS[name]
    folder, kernel = name.split()[0].split("/")
    module = import_module(f"mstc.kernels.{folder}.triton")
    function = getattr(module, kernel + "_kernel")
    given = {
        **TILES,
        "BK": TYPES[dtype],
        "BV": TYPES[dtype],
        "HAS_G": True,
        "HAS_U": True,
        "HAS_LAST": True,
        "HAS_STATE": True,
        "BS": STEPS[dtype],
        "BW": TYPES[dtype],
        **constants.get(dtype, constants),
    }
    constexprs = {n: given[n] for n in function.arg_names if n in given}
    plain = [n for n in function.arg_names if n not in given]
    signature = {n: _type_of(a, dtype) for n, a in zip(plain, arguments, strict=True)}
    source = ASTSource(function, {**signature, **dict.fromkeys(constexprs, "constexpr")}, constexprs)
    options = {"num_warps": module.WARPS[kernel], "num_stages": getattr(module, "STAGES", 3)}
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    registers, spills = _resources(compiled.asm.get("cubin"))
    return Row(name, dtype, target, compiled.metadata.shared, registers, spills)


def _type_of(argument: str, dtype: str) -> str:
    if argument in ("i", "n", "f"):
        return {"i": "*i64", "n": "i32", "f": "fp32"}[argument]
    return "*" + (argument.partition(":")[2] or dtype)


def _resources(cubin: bytes | None) -> tuple[int | None, int | None]:
    """(registers, bytes of stack) of a program's binary; a Triton kernel uses its stack for spilled registers only."""
    if cubin is None:
        return None, None
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        said = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (None, None)


def to_text(rows: list[Row]) -> str:
    """A table of the rows."""
    lines = [f"{'kernel':34}{'dtype':7}{'target':8}{'shared KiB':>11}{'registers':>11}{'spills B':>10}  fits"]
    for row in rows:
        registers, spills = ("-" if n is None else str(n) for n in (row.registers, row.spills))
        shared = f"{row.shared / KIB:.1f}"
        lines.append(
            f"{row.kernel:34}{row.dtype:7}{row.target:8}{shared:>11}{registers:>11}{spills:>10}  "
            + ("yes" if row.fits else "NO")
        )
    return "\n".join(lines)
