"""Answers with tool calls, in OpenAI's shape."""

from __future__ import annotations

import secrets

from .logprob_format import Json
from .tool_pieces import CallArguments, CallStart, Piece, Text, ToolParser

_SHORT_ID_CHARS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


class ToolReader:
    """Splits one answer, as its text arrives, into content and calls. ``has_calls``: whether there have been any."""

    def __init__(self, parser: ToolParser) -> None:
        self._parser = parser
        self.has_calls = False

    def read(self, text: str, *, is_last: bool) -> tuple[str, list[Json]]:
        """What more text says: content, and deltas of calls, one per call at most."""
        pieces = self._parser.feed(text)
        if is_last:
            pieces += self._parser.finish()
        content = "".join(piece.text for piece in pieces if isinstance(piece, Text))
        deltas = _call_deltas(pieces)
        self.has_calls = self.has_calls or bool(deltas)
        return content, deltas

    def finish_reason(self, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self.has_calls else reason


def message_of(text: str, reader: ToolReader | None) -> Json:
    """The message that a whole answer is."""
    content, calls = (text, []) if reader is None else reader.read(text, is_last=True)
    if not calls:
        return {"role": "assistant", "content": content, "refusal": None}
    for call in calls:
        del call["index"]
    return {"role": "assistant", "content": content or None, "refusal": None, "tool_calls": calls}


def _call_deltas(pieces: list[Piece]) -> list[Json]:
    deltas: dict[int, Json] = {}
    for piece in pieces:
        match piece:
            case CallStart(index, name):
                function = {"name": name, "arguments": ""}
                deltas[index] = {"index": index, "id": new_call_id(), "type": "function", "function": function}
            case CallArguments(index, text):
                delta = deltas.setdefault(index, {"index": index, "function": {"arguments": ""}})
                delta["function"]["arguments"] += text
    return list(deltas.values())


def new_call_id() -> str:
    """Nine letters and digits, which is what Mistral's templates insist on."""
    return "".join(secrets.choice(_SHORT_ID_CHARS) for _ in range(9))
