"""What the README prints can be typed as it stands: its commands, its links, and its first Python."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from cupy_engine.server.commands import build_parser

from cupy_engine.model_source import ModelFiles

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^(?:\S+=\S+ )*cupy-engine (.*?)(?:\s+#.*)?$", README, re.MULTILINE)
BENCHMARKS = {"serve": "end_to_end", "memory": "memory_usage"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str) -> None:
    parsed, rest = build_parser().parse_known_args(shlex.split(command))
    if hasattr(parsed, "benchmark"):
        parser = argparse.ArgumentParser(allow_abbrev=False)
        import_module(f"cupy_engine.bench.{BENCHMARKS.get(parsed.benchmark, parsed.benchmark)}").add_arguments(parser)
        parser.parse_args(rest)
    else:
        assert rest == []


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_files_that_are_named_exist() -> None:
    """The map: names of files in code spans and in the figures."""
    folders = ("kernels", "cupy_engine", "models", "server", "bench")
    there = {path.name for folder in folders for path in (ROOT / folder).rglob("*")}
    named = set(re.findall(r"\b(\w+\.(?:py|cu))\b", README))
    assert len(named) > 15
    assert named <= there


def test_python_is_valid() -> None:
    assert len(SNIPPETS) >= 6
    for snippet in SNIPPETS:
        compile(snippet, "README.md", "exec")


def test_the_first_python_runs(default_model: ModelFiles) -> None:
    engine_snippets = [snippet for snippet in SNIPPETS if "with Engine(" in snippet]
    assert len(engine_snippets) == 2
    run = subprocess.run([sys.executable, "-c", "\n".join(engine_snippets)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert '"age"' in run.stdout
