"""Everything that needs an NVIDIA GPU: the tests marked ``gpu`` and those of the Triton kernels, then the benchmarks.

``python tests/gpu/run.py [--out FOLDER]`` ends with a short table and writes ``gpu.json``. Without
a GPU it says "not measured", and runs the benchmarks once on tiny sizes on the CPU, so that
the commands themselves are known to work.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from mstc.cli.environment import describe_machine, describe_versions

SYSTEMS = "eager,ckpt,inductor,inductor-causal,mstc"
ON_GPU = ["--device", "cuda", "--dtype", "bfloat16", "--seq", "8192,32768", "--rounds", "2", "--steps", "5"]
WINDOW = ["--model", "mistral", "--systems", "eager,inductor,mstc", *ON_GPU]
# Layers of Llama3-8B with its head: each system up to where it runs out of memory, or to the last of these lengths.
LONG_SYSTEMS = "ckpt,inductor-ckpt,mini-sequence,liger,mstc"
LONG = ["--device", "cuda", "--dtype", "bfloat16", "--model", "llama3-8b", "--layers", "8"]
LONG_LENGTHS = (("16384,32768,65536", 3), ("131072,262144", 1))  # tokens, measured steps
KERNEL_TESTS = ["tests/kernels/test_triton.py", "tests/kernels/test_triton_delta.py"]
TINY = ["--device", "cpu", "--model", "llama-tiny", "--steps", "1"]
DRY_RUN = [*TINY, "--seq", "64", "--systems", "eager,ckpt"]
LONG_DRY_RUN = [*TINY, "--seq", "64", "--systems", "ckpt,mini-sequence"]


def run(*command: str) -> int:
    print("$", " ".join(command), flush=True)
    return subprocess.run([sys.executable, "-m", *command], check=False).returncode


def bench_kernels(out: Path) -> tuple[int, dict[str, Any]]:
    """The kernels beside flash attention and fla-core; the exit status and what was written."""
    path = out / "kernels.json"
    path.unlink(missing_ok=True)
    status = run("mstc.kernels.bench", "--gpu", "--json", str(path))
    return status, json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def bench(out: Path, arguments: list[str], name: str = "bench") -> tuple[int, dict[str, Any]]:
    """Run ``mstc bench``; its exit status and what it wrote."""
    path = out / f"{name}.json"
    path.unlink(missing_ok=True)
    status = run("mstc.cli.main", "bench", *arguments, "--out", str(path))
    return status, json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def long_benches(out: Path, gpu: bool) -> tuple[int, list[dict[str, Any]]]:
    """Tokens per second and peaks at great length; running out of memory is a result there, and no failure."""
    if not gpu:
        status, measured = bench(out, LONG_DRY_RUN, "long")
        return status, [measured]
    found = []
    for lengths, steps in LONG_LENGTHS:
        arguments = [*LONG, "--systems", LONG_SYSTEMS, "--seq", lengths, "--steps", str(steps)]
        found.append(bench(out, arguments, f"long-{lengths.split(',')[0]}")[1])
    return int(not all(measured.get("rows") for measured in found)), found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench_output/gpu"), help="folder for the JSON files")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.is_available()
    only_collect = [] if gpu else ["--collect-only", "-q"]
    tests = run("pytest", "-m", "gpu", "tests", *only_collect)
    kernel_tests = run("pytest", *KERNEL_TESTS, *only_collect)
    kernel_status, kernels = bench_kernels(out)
    status, measured = bench(out, ["--systems", SYSTEMS, *ON_GPU] if gpu else DRY_RUN)
    window_status, window = bench(out, WINDOW, "window") if gpu else (0, {})
    long_status, long = long_benches(out, gpu)
    report = {
        "versions": describe_versions(),
        "machine": describe_machine(),
        "tests": ("passed" if tests == 0 else "failed") if gpu else "not measured",
        "kernel_tests": ("passed" if kernel_tests == 0 else "failed") if gpu else "not measured",
        "bench": measured if gpu else "not measured",
        "window": window if gpu else "not measured",
        "long": long if gpu else "not measured",
        "kernels": kernels if gpu else "not measured",
        "dry_run": None if gpu else ("worked" if status == kernel_status == long_status == 0 else "failed"),
    }
    (out / "gpu.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_table(report)
    return int(any((tests, kernel_tests, kernel_status, status, window_status, long_status)))


def print_table(report: dict[str, Any]) -> None:
    print(f"\ntests on a GPU      {report['tests']}; of the kernels {report['kernel_tests']}")
    if report["bench"] == "not measured":
        print("benchmark on a GPU  not measured (no NVIDIA GPU here)")
        print(f"dry run on the CPU  {report['dry_run']}")
        return
    print_rows(report["bench"])
    print("\na Mistral with a window of 1024 tokens")
    print_rows(report["window"])
    print("\n8 layers of Llama3-8B with its head")
    for measured in report["long"]:
        print_rows(measured)


def print_rows(measured: dict[str, Any]) -> None:
    heading = f"{'system':<20} {'tokens':>7} {'step s':>8} {'tokens/s':>9} {'peak MB':>8} {'compile s':>10}"
    print(heading)
    for row in measured.get("rows", []):
        compiling = "-" if row["compile_s"] is None else f"{row['compile_s']:.1f}"
        figures = f"{row['step_s']:>8.3f} {row['tokens_per_s']:>9.0f} {row['peak_mb']:>8.0f} {compiling:>10}"
        print(f"{row['system']:<20} {row['seq']:>7} {figures}")
    for failure in measured.get("failures", []):
        print(f"{failure['system']:<20} {failure['seq']:>7} {failure['reason']}")


if __name__ == "__main__":
    sys.exit(main())
