"""The command line as a whole: commands, help, and one clear line on bad input."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner, Result

from mstc import __version__
from mstc.cli.main import main


def run(*args: str) -> Result:
    return CliRunner().invoke(main, args, prog_name="mstc")


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"mstc, version {__version__}\n")


@pytest.mark.parametrize("command", ["demo", "dump", "bench", "doctor", "plan", "calibrate"])
def test_help(command: str) -> None:
    assert command in run("--help").stdout
    result = run(command, "--help")
    assert result.exit_code == 0 and result.stdout.startswith(f"Usage: mstc {command}")


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; from mstc.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "Missing command"),
        (["plann"], "No such command 'plann'"),
        (["plan"], "Missing option '--model'"),
        (["calibrate", "extra"], "unexpected extra argument"),
        (["--nothing"], "No such option"),
        (["demo", "--steps", "1"], "'--steps'"),
        (["demo", "--systems", "eager,jax"], "'jax' is none of eager, inductor, mstc"),
        (["demo", "--options", '{"lm_haed": true}'], "did you mean 'lm_head'?"),
        (["bench", "--systems", ""], "'--systems'"),
        (["bench", "--seq", "512,0"], "whole numbers above 0"),
        (["bench", "--seq", "long"], "whole numbers above 0"),
        (["bench", "--rounds", "0"], "'--rounds'"),
        (["bench", "--model", "gpt"], "'--model'"),
        (["bench", "--options", "{"], "not JSON"),
        (["bench", "--options", "[1]"], "options must be a dict"),
        (["bench", "--options", '{"experts": true}'], "not built yet"),
        (["doctor", "extra"], "unexpected extra argument"),
    ],
)
def test_bad_input_is_one_line_and_status_2(args: list[str], says: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stderr.startswith("mstc") and result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize("package", ["matplotlib", "transformers"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for name in [m for m in sys.modules if m.startswith("mstc.cli.demo")]:
        monkeypatch.delitem(sys.modules, name)
    command = (
        ["demo", "--steps", "2"] if package == "matplotlib" else ["plan", "--model", "llama3-8b", "--device", "h200"]
    )
    result = run(*command)
    assert result.exit_code == 2
    assert result.stderr == f"mstc: this needs the package {package}: pip install 'mstc[demo]'\n"
