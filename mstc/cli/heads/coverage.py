"""The coverage table: what each system makes of each program.

    python -m mstc.cli.heads.coverage --out docs/coverage.json --page docs/coverage.md

Results and every gradient are compared with eager's in float32. Liger's kernels run in Triton's interpreter
where there is no GPU. The page's table stands between two marks and is replaced; the rest of the page stays.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import torch

from mstc.cli.arguments import file_option, names_option
from mstc.cli.environment import describe_versions
from mstc.cli.heads.programs import PROGRAMS
from mstc.cli.heads.systems import SYSTEMS

__all__ = ["coverage", "table"]

COMPARED = ("mstc-aot", "auto_chunker", "linear_ce", "liger", "cce")
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
Records = dict[str, dict[str, dict[str, str]]]


@click.command()
@names_option("--systems", COMPARED, COMPARED, show_default=True)
@names_option("--programs", PROGRAMS, PROGRAMS)
@file_option("--out", required=True, help="JSON file; kept and added to.")
@click.option("--page", type=click.Path(dir_okay=False, path_type=Path), help="Page whose table is replaced.")
def coverage(systems: tuple[str, ...], programs: tuple[str, ...], out: Path, page: Path | None) -> None:
    """Run every program on every system; write the outcomes as JSON and as a table."""
    data = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"records": {}}
    data["versions"] = describe_versions()
    records: Records = data["records"]
    for system in systems:
        if not SYSTEMS[system].there:
            click.echo(f"{system}: needs the package {SYSTEMS[system].needs}, which is not installed", err=True)
            continue
        left = list(programs)
        while left:
            for record in _run(system, left):
                records.setdefault(record["program"], {})[system] = record
                left.remove(record["program"])
            out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    text = table(records)
    click.echo(text)
    if page is not None:
        write_between(page, text)


def _run(system: str, programs: list[str]) -> list[dict[str, str]]:
    """Records up to the first error, which is a record too."""
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}  # a cached graph tells nothing
    if system == "liger" and not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "mstc.cli.heads.worker", system, *programs]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RECORD ")]
    if done.returncode != 0:
        name, reason = programs[len(found)], _reason(done.stderr)
        click.echo(f"{system}, {name}: {reason}", err=True)
        # What Triton's interpreter cannot run may well run on a GPU.
        outcome, how = ("no form", "an option, not run here") if "InterpreterError" in reason else ("fails", reason)
        found.append({"system": system, "program": name, "outcome": outcome, "how": how})
    return found


def _reason(printed: str) -> str:
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0] or "Exception" in line.split(":")[0]]
    return (errors or lines or ["no output"])[-1][:160]


def table(records: Records) -> str:
    """The outcomes as a markdown table, a row per program."""
    shown = [s for s in COMPARED if any(s in r for r in records.values())]
    lines = [
        "| head and loss | " + " | ".join(SYSTEMS[s].about for s in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for name in PROGRAMS:
        if name in records:
            cells = [_cell(records[name].get(s)) for s in shown]
            lines.append(f"| {PROGRAMS[name].about} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(record: dict[str, str] | None) -> str:
    if record is None:
        return "not run"
    outcome, how = record["outcome"], record["how"].replace("|", "\\|")
    if outcome == "right":
        return how or "right"
    if outcome == "no form":
        return how or "no form"
    return f"**{outcome}**: {how}"


def write_between(page: Path, text: str) -> None:
    """Replace what stands between the marks."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    coverage()
