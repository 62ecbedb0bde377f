"""Calls as Qwen3-Coder writes them, told once each is complete. What its marks mean within values: see xml_reader.

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
from collections.abc import Mapping, Sequence
from typing import Any

from .arguments import Argument, InexpressibleError, arguments_of, takes_any
from .call_form import ANY_TEXT, SPACE_RULES, Call, Schema, WantedCalls, json_rule, opened_by
from .tool_pieces import CallArguments, CallStart, Piece, Text, num_held
from .xml_reader import MAX_NAME, CallReader
from .xml_values import ways_to_write

BEGIN, END = "<tool_call>", "</tool_call>"


class XmlForm:
    """The form above: texts as they are, other values as JSON."""

    @property
    def marks(self) -> Sequence[str]:
        return (BEGIN, END)

    def write(self, calls: Sequence[Call]) -> str:
        return "\n".join(_written(name, given) for name, given in calls)

    def parser(self, functions: Mapping[str, Schema], max_calls: int) -> XmlCallParser:
        return XmlCallParser(functions, max_calls)

    def rules(self, wanted: WantedCalls) -> list[str]:
        begin, end = wanted.mark(BEGIN), wanted.mark(END)
        rules = [f"calls: {begin} body", f"body: call {wanted.further(f'ws {begin} call')}", *SPACE_RULES, *_TEXT_RULES]
        functions = " | ".join(f"function_{i}" for i in range(len(wanted.functions)))
        rules.append(f"call: ws ({functions}) ws {end}")
        for i, (name, schema) in enumerate(wanted.functions.items()):
            rules += _function_rules(i, name, schema)
        return rules

    def text_rules(self, wanted: WantedCalls) -> list[str]:
        return [*opened_by(wanted.mark(BEGIN), ANY_TEXT), "text_calls: opening body"]


def _written(name: str, given: Mapping[str, Any]) -> str:
    values = {key: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for key, v in given.items()}
    members = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"{BEGIN}\n<function={name}>\n{members}</function>\n{END}"


_KEPT_OUT = ("<parameter=", "</parameter>", "<function=", END)  # of texts, see xml_reader
_TEXT_RULES = (
    r'any_argument: "<parameter=" /[^<>\n]{1,64}/ ">" any_text "\n"',
    "any_text[lazy]: ANY_TEXT",
    r"ANY_TEXT: /\n(?s:.*)<\/parameter>/ & ~/(?s:.*)(<(parameter|function)=|<\/tool_call>)(?s:.*)/",
)


def _function_rules(i: int, name: str, schema: Schema) -> list[str]:
    arguments = arguments_of(schema)
    if not arguments and takes_any(schema):
        return [rf'function_{i}: "<function={name}>\n" any_argument* "</function>"']
    places = " ".join(f"argument_{i}_{k}" + "?" * (not each.is_required) for k, each in enumerate(arguments))
    rules = [rf'function_{i}: "<function={name}>\n" {places} "</function>"']
    for k, argument in enumerate(arguments):
        rules += _argument_rules(f"{i}_{k}", argument)
    return rules


def _argument_rules(place: str, argument: Argument) -> list[str]:
    if set("<>\n") & set(argument.name) or len(argument.name) > MAX_NAME:
        raise InexpressibleError("a name with angle brackets, or so long", argument.name)
    opening = json.dumps(f"<parameter={argument.name}>")
    ways = ways_to_write(argument.schema)
    if None in ways:
        return [rf'argument_{place}: {opening} any_text "\n"']
    literals = [way for way in ways if isinstance(way, str)]
    schemas = [way for way in ways if isinstance(way, Mapping)]
    if any(mark in literal for literal in literals for mark in _KEPT_OUT):
        raise InexpressibleError("texts that look like its marks")
    values = [json.dumps(literal) for literal in literals] + [f"value_{place}_{j}" for j in range(len(schemas))]
    rules = [json_rule(f"value_{place}_{j}", schema) for j, schema in enumerate(schemas)]
    return [rf'argument_{place}: {opening} "\n" ({" | ".join(values)}) "\n</parameter>\n"', *rules]


class XmlCallParser:
    """Reads such calls; a parameter that is not text by its schema is JSON.

    Args:
        tools: the request's tools, by name the JSON schema of their parameters.
        max_calls: further calls are passed over.
    """

    def __init__(self, tools: Mapping[str, Schema], max_calls: int) -> None:
        self._tools = tools
        self._max_calls = max_calls
        self._buffer = ""
        self._space = ""  # before it: dropped if a call follows
        self._num_calls = 0
        self._is_plain = False
        self._reader = self._new_reader()

    def feed(self, text: str) -> list[Piece]:
        self._buffer += text
        pieces: list[Piece] = []
        while self._buffer.startswith(BEGIN) or self._skip_text(pieces):
            end = self._reader.end_in(self._buffer)
            if end is None:
                break
            self._take_call(end, pieces)
        return pieces

    def finish(self) -> list[Piece]:
        self._is_plain = True
        self._reader = self._new_reader()
        pieces = self.feed("")
        rest, self._space, self._buffer = self._space + self._buffer, "", ""
        return [*pieces, Text(rest)] if rest.strip() or (rest and not self._num_calls) else pieces

    def _new_reader(self) -> CallReader:
        return CallReader(self._tools, is_plain=self._is_plain)

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
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        call, self._reader = self._reader.call, self._new_reader()
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
