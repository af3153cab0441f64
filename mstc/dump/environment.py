"""What a dump depends on: versions, and the command that reproduces it."""

from __future__ import annotations

import platform
import shlex
import sys

import torch

from mstc import __version__


def versions() -> dict[str, str]:
    return {"mstc": __version__, "torch": torch.__version__, "python": platform.python_version()}


def command_line() -> str:
    """The command that runs this process again."""
    return shlex.join(["python", *sys.orig_argv[1:]])
