"""What parsers of tool calls make of a text, and what they hold back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

MAX_HELD_SPACES = 256


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """Call number ``index`` of the answer begins."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, which are JSON as the model wrote it."""

    index: int
    text: str


Piece = Text | CallStart | CallArguments


class ToolParser(Protocol):
    """Reads one answer."""

    def feed(self, text: str) -> list[Piece]:
        """What more text says for certain."""

    def finish(self) -> list[Piece]:
        """What was held back, when the answer has ended."""


def num_held(buffer: str, mark: str) -> int:
    """Characters at the end that may belong to a mark: its beginning, and white space before it."""
    rest = next(
        (buffer[:-n] for n in range(min(len(mark), len(buffer)), 0, -1) if mark.startswith(buffer[-n:])), buffer
    )
    num_spaces = len(rest) - len(rest.rstrip())
    return len(buffer) - len(rest) + min(num_spaces, MAX_HELD_SPACES)
