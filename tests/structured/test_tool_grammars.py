"""Grammars of tool calls: what each family's lets through, and that its parser reads whatever that is."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import time
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
from cupy_engine.server.api_errors import ApiError
from cupy_engine.server.protocol import ChatRequest
from cupy_engine.server.tool_answers import ToolReader
from cupy_engine.server.tool_formats import FORMS, LIST
from cupy_engine.server.tool_use import ToolUse, tool_use
from cupy_engine.server.xml_values import argument_of
from llguidance import LLMatcher

from cupy_engine.tokenizer import Tokenizer

EOS_IDS = (0, 2)
TRIP = {
    "type": "object",
    "properties": {
        "to": {"$ref": "#/$defs/city"},
        "days": {"type": "integer", "minimum": 1, "maximum": 99},
        "direct": {"type": "boolean"},
        "via": {"type": "array", "items": {"$ref": "#/$defs/city"}, "maxItems": 2},
        "note": {"type": ["string", "null"], "maxLength": 8},
    },
    "required": ["to", "days", "note"],
    "additionalProperties": False,
    "$defs": {"city": {"type": "string", "enum": ["Bern", "Zürich", 'the "Rock"']}},
}
LIGHT = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {"room": {"$ref": "#/definitions/city"}, "more": {"$ref": "#"}},
    "required": ["room"],
    "additionalProperties": False,
    "definitions": {"city": {"enum": ["kitchen", 5, None]}},
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "book_trip": TRIP,
    "light": LIGHT,
    "get_time": {"type": "object", "properties": {}, "additionalProperties": False},
}
PLAIN_SCHEMAS: dict[str, dict[str, Any]] = {  # what can be written argument by argument
    "book_trip": {
        **TRIP,
        "properties": {**TRIP["properties"], "note": {"type": ["string", "null"], "description": "?"}},
    },
    "light": {
        **LIGHT,
        "properties": {"room": {"$ref": "#/definitions/city"}, "level": {"type": ["string", "integer"]}},
    },
    "get_time": SCHEMAS["get_time"],
}
ANSWER = {
    "type": "object",
    "properties": {"answer": {"enum": [1, 2]}},
    "required": ["answer"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER}}
MARKS = {"[TOOL_CALLS]": 3, "<|tool_call|>": 4, "<|python_tag|>": 5, "[ARGS]": 6}  # special tokens stand in for them
FAMILIES = tuple(FORMS)


def schemas_for(family: str) -> dict[str, dict[str, Any]]:
    return PLAIN_SCHEMAS if family in ("qwen3_coder", "pythonic") else SCHEMAS


def use(family: str, marks: dict[str, int] | None = None, *, strict: bool = True, **fields: Any) -> ToolUse:
    """A family's tools in a request."""
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema, "strict": strict}}
        for name, schema in schemas_for(family).items()
    ]
    request = msgspec.convert({"messages": [], "tools": tools, **fields}, ChatRequest)
    found = tool_use(request, FORMS[family], (marks or {}).get)
    assert found is not None
    return found


class Walk:
    """An answer in the making, with what its grammar allows next."""

    def __init__(self, vocabulary: object, tokenizer: Tokenizer, wanted: ToolUse, marks: dict[str, int]) -> None:
        assert wanted.grammar is not None
        self._matcher = LLMatcher(vocabulary, wanted.grammar.to_grammar().text, log_level=0)
        self._tokenizer = tokenizer
        self._texts = {token_id: mark for mark, token_id in marks.items()}
        self._ids = marks
        self._data = b""

    @property
    def text(self) -> str:
        return self._data.decode()

    def _mask(self) -> bytes:
        mask = self._matcher.compute_bitmask()
        assert not self._matcher.is_error(), self._matcher.get_error()
        return mask

    def allows(self, token_id: int) -> bool:
        return bool(self._mask()[token_id // 8] >> token_id % 8 & 1)

    @property
    def can_end(self) -> bool:
        return any(map(self.allows, EOS_IDS))

    def take(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        mark = self._texts.get(token_id)
        self._data += self._tokenizer.token_bytes(token_id) if mark is None else mark.encode()

    def say(self, text: str) -> bool:
        """Whether the text is allowed."""
        marks = "|".join(map(re.escape, self._ids))
        return all(self._say(part) for part in (re.split(f"({marks})", text) if marks else [text]) if part)

    def _say(self, part: str) -> bool:
        mark = self._ids.get(part)
        for token_id in self._tokenizer.encode(part, add_special_tokens=False) if mark is None else [mark]:
            if not self.allows(token_id):
                return False
            self.take(token_id)
        return True

    def end_somehow(self, chance: random.Random) -> bool:
        """Go on at random, mostly with characters that close something; whether it came to an end."""
        for _ in range(400):
            bits = np.unpackbits(np.frombuffer(self._mask(), np.uint8), bitorder="little")
            can_end = bits[list(EOS_IDS)].any()
            bits[list(EOS_IDS)] = 0
            allowed = np.flatnonzero(bits)
            if can_end and (not allowed.size or chance.random() < 0.5):
                return True
            if chance.random() >= 0.3 or not self._closes_something():
                self.take(int(allowed[chance.randrange(allowed.size)]))
        return False

    def _closes_something(self) -> bool:
        for text in ("\n</parameter>", '"'):
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            if self._matcher.validate_tokens(ids) == len(ids):
                return self.say(text)
        return False


def read(wanted: ToolUse, text: str) -> tuple[str, list[tuple[str, Any]]]:
    content, deltas = ToolReader(wanted.parser()).read(text, is_last=True)
    return content, [(each["function"]["name"], json.loads(each["function"]["arguments"])) for each in deltas]


def check(calls: list[tuple[str, Any]], family: str) -> None:
    for name, arguments in calls:
        jsonschema.validate(arguments, schemas_for(family)[name])


VARIANTS = [(family, marks) for family in FAMILIES for marks in ({}, MARKS)]


@pytest.mark.parametrize(("family", "marks"), VARIANTS, ids=str)
def test_what_must_be_calls_is_read_as_calls_of_the_schema(
    family: str, marks: dict[str, int], vocabulary: object, tokenizer: Tokenizer
) -> None:
    chance, num_calls = random.Random(family), 0
    wanted = use(family, marks, tool_choice="required", response_format=FORMAT)
    assert wanted.form is FORMS[family]
    for _ in range(12):
        walk = Walk(vocabulary, tokenizer, wanted, marks)
        if walk.end_somehow(chance):
            content, calls = read(wanted, walk.text)
            assert content == "", walk.text
            assert calls, walk.text
            check(calls, family)
            num_calls += len(calls)
    assert num_calls > 6


@pytest.mark.parametrize(("family", "marks"), VARIANTS, ids=str)
def test_calls_or_an_answer(family: str, marks: dict[str, int], vocabulary: object, tokenizer: Tokenizer) -> None:
    chance, kinds = random.Random(family), set()
    wanted = use(family, marks, response_format=FORMAT)
    for _ in range(12):
        walk = Walk(vocabulary, tokenizer, wanted, marks)
        if walk.end_somehow(chance):
            content, calls = read(wanted, walk.text)
            assert bool(content) != bool(calls), walk.text
            check(calls, family)
            if content:
                jsonschema.validate(json.loads(content), ANSWER)
            kinds.add(bool(calls))
    walk = Walk(vocabulary, tokenizer, wanted, marks)
    assert walk.say('{"answer": 1}')
    assert walk.can_end
    assert read(wanted, walk.text) == ('{"answer": 1}', [])
    assert True in kinds


@pytest.mark.parametrize(("family", "marks"), VARIANTS, ids=str)
def test_calls_are_written_as_they_are_read_and_constrained(
    family: str, marks: dict[str, int], vocabulary: object, tokenizer: Tokenizer
) -> None:
    trip = {"to": "Bern", "days": 3, "direct": True, "via": ["Bern", "Zürich"], "note": "a é🦥"}
    calls = [("book_trip", trip), ("get_time", {}), ("book_trip", {"to": "Bern", "days": 99, "note": None})]
    wanted = use(family, marks, tool_choice="required")
    walk = Walk(vocabulary, tokenizer, wanted, marks)
    assert walk.say(FORMS[family].write(calls)), walk.text
    assert walk.can_end
    assert read(wanted, walk.text) == ("", calls)


@pytest.mark.parametrize("marks", [{}, {"<tool_call>": 3, "</tool_call>": 4}], ids=str)
def test_marks_in_xml_are_let_through_only_where_they_are_read_right(
    marks: dict[str, int], vocabulary: object, tokenizer: Tokenizer
) -> None:
    properties = {"list": {"type": "array", "items": {"type": "string"}}, "text": {"type": "string"}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}
    request = msgspec.convert({"messages": [], "tools": [tool], "tool_choice": "required"}, ChatRequest)
    wanted = tool_use(request, FORMS["qwen3_coder"], marks.get)
    assert wanted is not None
    for mark in ("</parameter>", "<parameter=text>", "<function=f>", "</parameter></function>"):
        calls = [("f", {"list": [mark, f'"{mark}', "\\"], "text": "a </b> </function> é\n"})]
        walk = Walk(vocabulary, tokenizer, wanted, marks)
        assert walk.say(FORMS["qwen3_coder"].write(calls)), walk.text
        assert read(wanted, walk.text) == ("", calls)
        walk = Walk(vocabulary, tokenizer, wanted, marks)
        assert not walk.say(FORMS["qwen3_coder"].write([("f", {"text": f"a {mark} b"})]))


TRIP_ARGUMENTS = '{"to": "Zürich", "days": 3, "note": null}'
TRIP_CALL = '{"name": "book_trip", "arguments": ' + TRIP_ARGUMENTS + "}"
TIME_CALL = '{"name": "get_time", "arguments": {}}'
AS_TRAINED = {  # one call and two, as the families' templates have them in conversations
    "hermes": (f"<tool_call>\n{TRIP_CALL}\n</tool_call>", f"\n<tool_call>\n{TIME_CALL}\n</tool_call>"),
    "llama3_json": (TRIP_CALL.replace("arguments", "parameters"), "; " + TIME_CALL.replace("arguments", "parameters")),
    "mistral": (f"[TOOL_CALLS] [{TRIP_CALL}", f", {TIME_CALL}", "]"),
    "granite": (f"<|tool_call|>[{TRIP_CALL}", f", {TIME_CALL}", "]"),
    "phi4_mini": (f"functools[{TRIP_CALL}", f", {TIME_CALL}", "]"),
    "json": (f"[{TRIP_CALL}", f", {TIME_CALL}", "]"),
    "qwen3_coder": (
        "<tool_call>\n<function=book_trip>\n<parameter=to>\nZürich\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "<parameter=note>\nnull\n</parameter>\n</function>\n</tool_call>",
        "\n<tool_call>\n<function=get_time>\n</function>\n</tool_call>",
    ),
    "pythonic": ('[book_trip(to="Zürich", days=3, note=null', "), get_time(", ")]"),
}
WITH_A_MARK = {
    "llama3_json": ("<|python_tag|>" + AS_TRAINED["llama3_json"][0],),
    "mistral": (f"[TOOL_CALLS]book_trip[ARGS]{TRIP_ARGUMENTS}", "[TOOL_CALLS]get_time[ARGS]{}"),
}


@pytest.mark.parametrize("said", ["", "Let me see.\n\n"])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize(("family", "parts"), [*AS_TRAINED.items(), *WITH_A_MARK.items()])
def test_strict_functions_in_free_text(
    family: str, parts: tuple[str, ...], parallel: bool, said: str, vocabulary: object, tokenizer: Tokenizer
) -> None:
    """One call, then another one unless that is forbidden, then the end."""
    first, second, last = (*parts, "", "")[:3]
    wanted = use(family, MARKS, parallel_tool_calls=parallel)
    is_marked = "<" in first or first.startswith(("[TOOL", "functools"))
    if said and not is_marked:
        return  # such a family's calls begin the answer, or are none
    walk = Walk(vocabulary, tokenizer, wanted, MARKS)
    assert walk.can_end, "nothing must be said"
    assert walk.say(said + first)
    if second:
        assert walk.say(second) == parallel
    if parallel:
        assert walk.say(last)
        assert walk.can_end
        content, calls = read(wanted, walk.text)
        assert content == said.strip()
        assert calls[0] == ("book_trip", json.loads(TRIP_ARGUMENTS))
        assert calls[1:] == ([("get_time", {})] if second else [])
    assert not walk.say("x")


@pytest.mark.parametrize("family", AS_TRAINED)
def test_what_begins_as_a_call_becomes_one(family: str, vocabulary: object, tokenizer: Tokenizer) -> None:
    wanted = use(family, MARKS)
    opening = AS_TRAINED[family][0].partition("book_trip")[0]
    for wrong in ("rm", '","', 'light", "arguments": {"x', "light(x", "light>\n<parameter=x"):
        walk = Walk(vocabulary, tokenizer, wanted, MARKS)
        assert walk.say(opening)
        assert not walk.can_end
        assert not walk.say(wrong)


@pytest.mark.parametrize("family", AS_TRAINED)
def test_text_is_free(family: str, vocabulary: object, tokenizer: Tokenizer) -> None:
    text = 'A list [1, 2], {"name": "light"}, 1 < 2 and <tool_cal> or functools.partial 🦥\n'
    walk = Walk(vocabulary, tokenizer, use(family, MARKS), MARKS)
    assert walk.say(text)
    assert walk.can_end
    assert read(use(family, MARKS), walk.text) == (text, [])


@pytest.mark.parametrize("family", FAMILIES)
def test_only_strict_functions_are_held_to_their_schema(family: str, vocabulary: object, tokenizer: Tokenizer) -> None:
    assert use(family, strict=False).grammar is None
    chance, wanted = random.Random(3), use(family, strict=False, response_format=FORMAT)
    for _ in range(100):
        walk = Walk(vocabulary, tokenizer, wanted, MARKS)
        if walk.end_somehow(chance):
            content, calls = read(wanted, walk.text)
            assert bool(content) != bool(calls), walk.text
            if any(given.keys() - schemas_for(family)[name]["properties"].keys() for name, given in calls):
                break
    else:
        pytest.fail("no call with an argument of another name")


NO_FORM = {
    "recursion": {"properties": {"more": {"$ref": "#"}}},
    "alternatives": {"anyOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
    "unknown required": {"required": ["x"]},
}
NO_XML = {
    "pattern": {"properties": {"zip": {"type": "string", "pattern": "^[0-9]+$"}}},
    "object or text": {"properties": {"x": {"anyOf": [{"type": "string"}, {"type": "object"}]}}},
    "small number or text": {"properties": {"x": {"anyOf": [{"type": "string"}, {"type": "integer", "maximum": 5}]}}},
    "end in a choice": {"properties": {"x": {"enum": ["</tool_call>"]}}},
    "beginning in a choice": {"properties": {"x": {"enum": ["<function=g>"]}}},
    "name": {"properties": {"a>b": {}}},
    "long name": {"properties": {"a" * 257: {}}},
}
NO_PYTHON = {"keyword": {"properties": {"class": {}}}, "dash": {"properties": {"a-b": {}}}}
CANNOT_HOLD = [("qwen3_coder", schema) for schema in (NO_FORM | NO_XML).values()]
CANNOT_HOLD += [("pythonic", schema) for schema in (NO_FORM | NO_PYTHON).values()]


@pytest.mark.parametrize(("family", "schema"), CANNOT_HOLD, ids=str)
def test_what_a_form_cannot_hold_becomes_a_json_list_or_is_refused(family: str, schema: dict[str, Any]) -> None:
    function = {"name": "f", "parameters": schema, "strict": True}
    fields = {"messages": [], "tools": [{"type": "function", "function": function}]}
    forced = tool_use(msgspec.convert({**fields, "tool_choice": "required"}, ChatRequest), FORMS[family], {}.get)
    assert forced is not None
    assert forced.form is LIST
    with pytest.raises(ApiError, match=r"tools\[0\].function cannot be strict, .* has no place for") as caught:
        tool_use(msgspec.convert(fields, ChatRequest), FORMS[family], {}.get)
    assert caught.value.param == "tools[0].function"


NONSENSE: list[Any] = [
    5,
    None,
    "x",
    [],
    {},
    [5],
    {"x": 5},
    {"$ref": "#/$defs/a"},
    {"enum": 5},
    {"type": {}},
    {"anyOf": 5},
]


@pytest.mark.parametrize("keyword", ["type", "properties", "required", "enum", "anyOf", "$ref", "$defs", "$id"])
def test_schemas_that_make_no_sense_do_no_harm(keyword: str) -> None:
    """Whether they are refused here or by the grammar library: nothing else happens, and answers can be read."""
    text = "<tool_call><function=f><parameter=x>5</parameter></function></tool_call>"
    for value, family in itertools.product(NONSENSE, FAMILIES):
        for schema in ({keyword: value}, {"properties": {"x": {keyword: value}}}):
            tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
            for choice in ("auto", "required"):
                fields = {"messages": [], "tools": [tool], "tool_choice": choice}
                with contextlib.suppress(ApiError):
                    tool_use(msgspec.convert(fields, ChatRequest), FORMS[family], {}.get)
            FORMS[family].parser({"f": schema}, 1).feed(text)


def test_schemas_that_refer_to_themselves_many_times_take_no_time() -> None:
    definitions = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{(i + 1) % 60}"}] * 50} for i in range(60)}
    schema = {"properties": {"x": {"$ref": "#/$defs/a0"}}, "$defs": definitions}
    start_s = time.perf_counter()
    assert argument_of("5", {**schema["properties"]["x"], "$defs": definitions}) == "5"
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    fields = {"messages": [], "tools": [tool], "tool_choice": "required"}
    assert tool_use(msgspec.convert(fields, ChatRequest), FORMS["qwen3_coder"], {}.get) is not None
    assert time.perf_counter() - start_s < 1


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({}, "5", "5"),
        ({"type": "string"}, "null", "null"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "5", "5"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "5", 5),
        ({"enum": ["1", None]}, "1", "1"),
        ({"type": "boolean"}, "True", True),
        ({"type": ["integer", "null"]}, "None", None),
        ({"type": ["string", "integer"]}, "True", "True"),
        ({"type": "integer"}, "five", "five"),
        ({"type": "number"}, "5", 5),
        ({"type": "number"}, "NaN", "NaN"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "array"}}}, "[1]", [1]),
    ],
    ids=str,
)
def test_text_in_xml_is_what_its_schema_says(schema: dict[str, Any], text: str, value: Any) -> None:
    assert argument_of(text, schema) == value
