"""Calls as Qwen3-Coder writes them, told once each is complete.

<tool_call>
<function=get_weather>
<parameter=city>
Bern
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .call_form import Schema, WantedCalls
from .tool_pieces import CallArguments, CallStart, Piece, Text, num_held

BEGIN, END = "<tool_call>", "</tool_call>"

Parameters = Mapping[str, Any]


class XmlForm:
    """The form above."""

    marks = (BEGIN, END)

    def parser(self, functions: Mapping[str, Schema], max_calls: int) -> XmlCallParser:
        return XmlCallParser(functions, max_calls)

    def problem(self, name: str, schema: Schema) -> str | None:
        return "this model writes calls as XML"

    def rules(self, wanted: WantedCalls) -> list[str]:
        raise AssertionError

    def text_rules(self, wanted: WantedCalls) -> list[str]:
        raise AssertionError


class XmlCallParser:
    """Reads such calls; a parameter that is not text by its schema is JSON.

    Args:
        tools: the request's tools, by name the JSON schema of their parameters.
        max_calls: further calls are passed over.
    """

    def __init__(self, tools: Mapping[str, Parameters], max_calls: int) -> None:
        self._tools = tools
        self._max_calls = max_calls
        self._buffer = ""
        self._space = ""  # before it: dropped if a call follows
        self._num_searched = 0  # of the buffer, for the end of a call
        self._num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        self._buffer += text
        pieces: list[Piece] = []
        while self._buffer.startswith(BEGIN) or self._skip_text(pieces):
            place = self._buffer.find(END, self._num_searched)
            if place < 0:
                self._num_searched = max(len(BEGIN), len(self._buffer) - len(END))
                break
            self._take_call(place + len(END), pieces)
        return pieces

    def finish(self) -> list[Piece]:
        rest, self._space, self._buffer = self._space + self._buffer, "", ""
        return [Text(rest)] if rest.strip() or (rest and not self._num_calls) else []

    def _skip_text(self, pieces: list[Piece]) -> bool:
        """Let text go, up to the next call; false if there is none."""
        place = self._buffer.find(BEGIN)
        end = place if place >= 0 else len(self._buffer) - num_held(self._buffer, BEGIN)
        text, self._buffer = self._space + self._buffer[:end], self._buffer[end:]
        said = text.rstrip()
        self._space = text[len(said) :]
        if said:
            pieces.append(Text(said))
        return place >= 0

    def _take_call(self, end: int, pieces: list[Piece]) -> None:
        text, self._buffer, self._num_searched = self._buffer[:end], self._buffer[end:], 0
        call = read_xml_call(text, self._tools)
        if call is None:
            pieces.append(Text(self._space + text))
            self._space = ""
            return
        self._space = ""
        self._num_calls += 1
        if self._num_calls <= self._max_calls:
            name, arguments = call
            index = self._num_calls - 1
            pieces += [CallStart(index, name), CallArguments(index, json.dumps(arguments, ensure_ascii=False))]


def read_xml_call(text: str, tools: Mapping[str, Parameters]) -> tuple[str, dict[str, Any]] | None:
    """The function's name and arguments; ``None`` if the text is no call of one of the tools."""
    name, _, body = _between(text, "<function=", "</function>").partition(">")
    if name not in tools:
        return None
    arguments: dict[str, Any] = {}
    for member in body.split("<parameter=")[1:]:
        key, _, rest = member.partition(">")
        value = rest.partition("</parameter>")[0].removeprefix("\n").removesuffix("\n")
        arguments[key] = _converted(value, tools[name].get("properties", {}).get(key))
    return name, arguments


def _between(text: str, begin: str, end: str) -> str:
    return text.partition(begin)[2].rpartition(end)[0]


def _converted(value: str, schema: Any) -> Any:
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind in (None, "string"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
