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
from collections.abc import Mapping, Sequence
from typing import Any

from .arguments import Argument, InexpressibleError, arguments_of, properties_of, takes_any
from .call_form import ANY_TEXT, SPACE_RULES, Call, Schema, WantedCalls, json_rule, opened_by
from .tool_pieces import CallArguments, CallStart, Piece, Text, num_held
from .xml_values import argument_of, ways_to_write

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


_TEXT_RULES = (
    r'any_argument: "<parameter=" /[^<>\n]{1,64}/ ">" any_text "\n"',
    "any_text[lazy]: ANY_TEXT",
    r"ANY_TEXT: /\n(?s:.*)<\/parameter>/ & ~/(?s:.*)(<parameter=|<\/tool_call>)(?s:.*)/",
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
    if set("<>\n") & set(argument.name):
        raise InexpressibleError("a name with angle brackets", argument.name)
    opening = json.dumps(f"<parameter={argument.name}>")
    ways = ways_to_write(argument.schema)
    if None in ways:
        return [rf'argument_{place}: {opening} any_text "\n"']
    literals = [way for way in ways if isinstance(way, str)]
    schemas = [way for way in ways if isinstance(way, Mapping)]
    if any(mark in literal for literal in literals for mark in ("<parameter=", "</parameter>", END)):
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


def read_xml_call(text: str, tools: Mapping[str, Schema]) -> tuple[str, dict[str, Any]] | None:
    """The function's name and arguments; ``None`` if the text is no call of one of the tools."""
    name, _, body = _between(text, "<function=", "</function>").partition(">")
    if name not in tools:
        return None
    schemas = properties_of(tools[name])
    arguments: dict[str, Any] = {}
    for member in body.split("<parameter=")[1:]:
        key, _, rest = member.partition(">")
        value = rest.partition("</parameter>")[0].removeprefix("\n").removesuffix("\n")
        arguments[key] = argument_of(value, schemas.get(key, {}))
    return name, arguments


def _between(text: str, begin: str, end: str) -> str:
    return text.partition(begin)[2].rpartition(end)[0]
