"""The ``mstc`` command: a group whose commands are imported when they are called."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from mstc import __version__
from mstc.errors import MstcError

__all__ = ["main"]

_COMMANDS = {
    "bench": ("mstc.cli.bench.command", "Compare step time, peak memory and compile time."),
    "calibrate": ("mstc.cli.calibrate", "Measure this machine for the cost model."),
    "demo": ("mstc.cli.demo.command", "Train a small Llama on long text, side by side."),
    "dump": ("mstc.cli.dump", "Show what is rewritten and why, as a page, text or JSON."),
    "plan": ("mstc.cli.plan.command", "Tell what a step will need and take on a device."),
    "doctor": ("mstc.cli.doctor", "Check the installation."),
}
_OF_DEMO = ("matplotlib", "transformers")  # the packages of the extra "demo"


class LazyGroup(click.Group):
    """A group that imports a command's module on use, and says what is wrong in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _ = _COMMANDS[cmd_name]
        command = getattr(import_module(module), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in _COMMANDS.items()])

    def main(self, args: Sequence[str] | None = None, *rest: Any, **settings: Any) -> Any:
        """Run and exit: status 2 and one line on bad input, 130 when interrupted."""
        try:
            status = super().main(args, *rest, **{**settings, "standalone_mode": False})
        except click.ClickException as error:
            _complain(error)
            status = error.exit_code
        except MstcError as error:
            click.echo(f"mstc: {error}", err=True)
            status = 2
        except ModuleNotFoundError as error:
            if error.name not in _OF_DEMO:
                raise
            click.echo(f"mstc: this needs the package {error.name}: pip install 'mstc[demo]'", err=True)
            status = 2
        except click.Abort:
            click.echo("mstc: interrupted", err=True)
            status = 130
        sys.exit(status if isinstance(status, int) else 0)


def _complain(error: click.ClickException) -> None:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "mstc"
    hint = f" (see {command} --help)" if isinstance(error, click.UsageError) else ""
    click.echo(f"{command}: {' '.join(error.format_message().split())}{hint}", err=True)


@click.group(cls=LazyGroup, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mstc")
def main() -> None:
    """Long sequences made cheap: a torch.compile backend, and what goes with it."""


if __name__ == "__main__":
    main(prog_name="mstc")
