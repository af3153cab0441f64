"""The doctor: what it prints, and that its self-check passes on this installation."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from mstc.cli.main import main


def test_doctor_passes_here() -> None:
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0, result.stdout
    for part in (torch.__version__.split("+")[0], "transformers", "registered", "passed"):
        assert part in result.stdout


def test_doctor_says_when_the_backend_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "list_backends", lambda: ["inductor"])
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "not registered" in result.stdout and "pip install" in result.stdout
