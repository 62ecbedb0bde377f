"""From a model's text to content and tool calls, piece by piece as the text arrives. Nothing in it is ever evaluated.

    "Let me see. <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>"
     └─ Text ──┘             └ CallStart ┘              └ CallArguments

What looks like a call and turns out to be none is text after all; only names of the request's own tools make a call.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from .call_object import CallObject
from .tool_pieces import MAX_HELD_SPACES, CallArguments, CallStart, Piece, Text, num_held

if TYPE_CHECKING:
    from .json_calls import JsonForm

_MAX_NAME_CHARS = 256
_BETWEEN_CALLS = " \t\r\n,;[]"


class JsonCallParser:
    """Reads calls in a :class:`.json_calls.JsonForm`.

    Args:
        names: of the request's tools.
        max_calls: further calls are passed over.
    """

    def __init__(self, form: JsonForm, names: Collection[str], max_calls: int) -> None:
        self._form = form
        self._names = names
        self._max_calls = max_calls
        self._buffer = ""  # not understood yet
        self._raw = ""  # understood as part of a call, and text if that turns out to be none
        self._step = self._read_text
        self._object: CallObject | None = None
        self._num_calls = 0
        self._num_calls_before = 0  # the present mark
        self._has_started = False  # the present call is known to be one
        self._has_text = False

    def feed(self, text: str) -> list[Piece]:
        self._buffer += text
        pieces: list[Piece] = []
        while self._buffer and self._step(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        rest, self._raw, self._buffer = self._raw + self._buffer, "", ""
        if self._has_started or (self._num_calls and not rest.strip(_BETWEEN_CALLS)):
            return []
        return [Text(rest)] if rest else []

    # Steps: each takes what it understands from the buffer; false if it needs more.

    def _read_text(self, pieces: list[Piece]) -> bool:
        begin = self._form.begin
        if self._form.is_bare and not self._has_text and not self._num_calls:
            start = self._buffer.lstrip()
            if not start and len(self._buffer) <= MAX_HELD_SPACES:
                return False
            if start and start[0] in "{[":
                self._step = self._read_between
                return True
        place = self._buffer.find(begin) if begin else -1
        if place >= 0:
            before = self._buffer[:place].rstrip()
            self._say(before, pieces)
            self._consume(len(before), is_raw=False)
            self._consume(place - len(before) + len(begin))
            self._step, self._num_calls_before = self._read_between, self._num_calls
            return True
        num_sure = len(self._buffer) - num_held(self._buffer, begin)
        self._say(self._buffer[:num_sure], pieces)
        self._consume(num_sure, is_raw=False)
        return False

    def _read_between(self, pieces: list[Piece]) -> bool:
        for mark in filter(None, (self._form.end, self._form.begin)):
            if self._buffer.startswith(mark):
                self._consume(len(mark))
                if mark == self._form.end:
                    self._end_section(pieces)
                return True
            if mark.startswith(self._buffer):
                return False
        if self._buffer[0] in _BETWEEN_CALLS:
            self._consume(1)
        elif self._buffer[0] == "{":
            self._object, self._step = CallObject(), self._read_object
        elif self._form.has_names_outside:
            return self._read_name(pieces)
        else:
            self._give_up(pieces)
        return True

    def _read_name(self, pieces: list[Piece]) -> bool:
        place = self._buffer.find("{")
        if place < 0 and len(self._buffer) <= _MAX_NAME_CHARS:
            return False
        name = self._buffer[: max(0, place)].partition("[")[0].strip()  # marks of ids and arguments may follow
        if name not in self._names:
            self._give_up(pieces)
            return True
        self._consume(place)
        self._object, self._step = CallObject(name), self._read_object
        return True

    def _read_object(self, pieces: list[Piece]) -> bool:
        call = self._object
        assert call is not None
        self._consume(call.feed(self._buffer))
        if call.name is not None and call.name in self._names and not self._has_started:
            self._has_started = True
            self._num_calls += 1
            self._report(CallStart(self._num_calls - 1, call.name), pieces)
        if self._has_started and (arguments := call.take_arguments()):
            self._report(CallArguments(self._num_calls - 1, arguments), pieces)
        if call.is_broken or (call.name is not None and not self._has_started) or (call.is_done and call.name is None):
            self._give_up(pieces)
            return True
        if not call.is_done:
            return False
        self._raw, self._has_started, self._step = "", False, self._read_between
        return True

    def _read_lost(self, pieces: list[Piece]) -> bool:
        """Pass over the rest of a call that broke when it was told already."""
        end = self._form.end
        place = self._buffer.find(end) if end else -1
        if place < 0:
            self._buffer = self._buffer[len(self._buffer) - num_held(self._buffer, end) :]
            return False
        self._consume(place + len(end), is_raw=False)
        self._has_started, self._step = False, self._read_text
        return True

    def _end_section(self, pieces: list[Piece]) -> None:
        if self._num_calls == self._num_calls_before:
            self._give_up(pieces)
        self._raw, self._step = "", self._read_text

    def _give_up(self, pieces: list[Piece]) -> None:
        """What was taken for a call is none."""
        if self._has_started:
            self._raw, self._step = "", self._read_lost
            return
        self._say(self._raw, pieces)
        self._raw, self._step, self._has_text = "", self._read_text, True

    def _consume(self, num_chars: int, *, is_raw: bool = True) -> None:
        if is_raw:
            self._raw += self._buffer[:num_chars]
        self._buffer = self._buffer[num_chars:]

    def _say(self, text: str, pieces: list[Piece]) -> None:
        if text:
            self._has_text = True
            pieces.append(Text(text))

    def _report(self, piece: Piece, pieces: list[Piece]) -> None:
        if self._num_calls <= self._max_calls:
            pieces.append(piece)
