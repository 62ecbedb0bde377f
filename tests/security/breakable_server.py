"""A server that can be broken on purpose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from live_server import LiveServer

FAULTS = str(Path(__file__).parent / "faults")


@dataclass
class Breakable:
    """A server on a tiny Llama of random weights, and how to break its engine."""

    server: LiveServer
    file: Path

    def arm(self, kind: str, step: int) -> None:
        """``step`` 1 is the next one."""
        draft = self.file.with_suffix(".draft")
        draft.write_text(f"{kind} {step}")
        draft.rename(self.file)
