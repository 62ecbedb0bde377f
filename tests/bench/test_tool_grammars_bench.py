"""The benchmark of tool grammars runs and prints what it says."""

from __future__ import annotations

import json

import pytest
from cupy_engine.bench import tool_grammars


def test_figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["tool_grammars", "--tools", "1", "3", "--repeats", "1"])
    assert tool_grammars.main() == 0
    one, three = map(json.loads, capsys.readouterr().out.splitlines())
    assert (one["num_tools"], three["num_tools"]) == (1, 3)
    assert three["grammar_kib"] > 2 * one["grammar_kib"] > 0
    assert all(figure > 0 for figure in one.values())
