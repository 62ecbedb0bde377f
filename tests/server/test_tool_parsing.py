"""Tool calls out of text, in every family's format, however it arrives; and text that only looks like calls."""

from __future__ import annotations

import json
import random
import time

import pytest
from cupy_engine.server.tool_answers import new_call_id
from cupy_engine.server.tool_formats import FORMS, detect_family
from cupy_engine.server.tool_pieces import CallArguments, CallStart, Text, ToolParser
from hypothesis import given
from hypothesis import strategies as st

F = '{"name": "f", "arguments": {"x": "a\\"}{", "y": [1, {"z": null}]}}'
F_ARGUMENTS = '{"x": "a\\"}{", "y": [1, {"z": null}]}'
FAMILIES = tuple(FORMS)
TOOLS = {"f": {"properties": {"n": {"type": "integer"}, "l": {"type": "array"}, "s": {"type": "string"}}}, "g": {}}
XML = "<tool_call>\n<function=f>\n{}</function>\n</tool_call>"
MEMBERS = {"n": "5", "s": "5", "l": "[1, {", "x": "a\nb"}
XML_ARGUMENTS = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in MEMBERS.items())


def read(parser: ToolParser, text: str, num_chars: int) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls of a text that arrives in pieces."""
    pieces = [piece for i in range(0, len(text), num_chars) for piece in parser.feed(text[i : i + num_chars])]
    pieces += parser.finish()
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        if isinstance(piece, CallStart):
            assert piece.index == len(calls)
            calls.append((piece.name, ""))
        elif isinstance(piece, CallArguments):
            name, arguments = calls[piece.index]
            calls[piece.index] = name, arguments + piece.text
    return "".join(piece.text for piece in pieces if isinstance(piece, Text)), calls


EXAMPLE = XML.format("<parameter=n>\n1\n</parameter>\n<parameter=x>\n2\n</parameter>\n")
MARKS = "a </parameter> b\n</function>\nc </tool_call> <parameter=n> d"


def xml_of(**values: str) -> str:
    members = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in values.items())
    return f"<tool_call>\n<function=f>\n{members}</function>\n</tool_call>"


def json_of(**values: object) -> str:
    return json.dumps(values, ensure_ascii=False)


CALLS = {
    "hermes": ("hermes", f"<tool_call>\n{F}\n</tool_call>", "", [("f", F_ARGUMENTS)]),
    "hermes after text": (
        "hermes",
        f'Let me see.\n\n<tool_call>{F}</tool_call>\n<tool_call>\n{{"arguments":{{}},"name":"g"}}</tool_call>\n',
        "Let me see.",
        [("f", F_ARGUMENTS), ("g", "{}")],
    ),
    "hermes without an end": ("hermes", '<tool_call>{"name": "g"}', "", [("g", "{}")]),
    "hermes with text behind": ("hermes", '<tool_call>{"name": "g"}</tool_call> done', " done", [("g", "{}")]),
    "arguments in a string": ("hermes", '<tool_call>{"name":"f","arguments":"{\\"x\\":1}"}', "", [("f", '{"x":1}')]),
    "arguments null": ("hermes", '<tool_call>{"name":"f","arguments":null}</tool_call>', "", [("f", "{}")]),
    "more members": ("hermes", '<tool_call>{"id": 3, "name": "g", "x": [1, "}"]}</tool_call>', "", [("g", "{}")]),
    "name with escapes": ("hermes", '<tool_call>{"name": "\\u0067"}</tool_call>', "", [("g", "{}")]),
    "cut off": ("hermes", '<tool_call>{"name":"f","arguments":{"x": [1', "", [("f", '{"x": [1')]),
    "broken after its name": ("hermes", '<tool_call>{"name":"f", oops</tool_call> so', " so", [("f", "")]),
    "llama": ("llama3_json", F.replace("arguments", "parameters"), "", [("f", F_ARGUMENTS)]),
    "llama two": ("llama3_json", f"<|python_tag|>{F}; {F}", "", [("f", F_ARGUMENTS)] * 2),
    "mistral": ("mistral", f"[TOOL_CALLS][{F}, {F}]", "", [("f", F_ARGUMENTS)] * 2),
    "mistral with names outside": (
        "mistral",
        'Hm.[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[CALL_ID]abc[ARGS]{}',
        "Hm.",
        [("f", '{"x": 1}'), ("g", "{}")],
    ),
    "granite": ("granite", f"<|tool_call|>[{F}]", "", [("f", F_ARGUMENTS)]),
    "phi": ("phi4_mini", f"functools[{F}]", "", [("f", F_ARGUMENTS)]),
    "list": ("json", f"[{F}, {F}]", "", [("f", F_ARGUMENTS)] * 2),
    "qwen coder": (
        "qwen3_coder",
        "Well.\n" + XML.format(XML_ARGUMENTS) + "\n" + XML.format("").replace("f>", "g>", 1) + "\n",
        "Well.",
        [("f", '{"n": 5, "s": "5", "l": "[1, {", "x": "a\\nb"}'), ("g", "{}")],
    ),
    "marks in a text": (
        "qwen3_coder",
        xml_of(s=MARKS, n="1") + xml_of(s=f"{MARKS}\n</parameter>"),
        "",
        [("f", json_of(s=MARKS, n=1)), ("f", json_of(s=f"{MARKS}\n</parameter>"))],
    ),
    "examples in a text": (
        "qwen3_coder",
        xml_of(s=f"Write\n{EXAMPLE}\n\nor {EXAMPLE}", n="1"),
        "",
        [("f", json_of(s=f"Write\n{EXAMPLE}\n\nor {EXAMPLE}", n=1))],
    ),
    "marks in JSON": (
        "qwen3_coder",
        xml_of(l=json.dumps([EXAMPLE, '\\"<function=g>', "</parameter></function></tool_call>"]), n="1"),
        "",
        [("f", json_of(l=[EXAMPLE, '\\"<function=g>', "</parameter></function></tool_call>"], n=1))],
    ),
    "values that are not closed": (
        "qwen3_coder",
        "<tool_call><function=f><parameter=s>\na\n<parameter=n>\n1\n<parameter=l>\n[2]\n</function></tool_call>",
        "",
        [("f", json_of(s="a", n=1, l=[2]))],
    ),
    "a function that is not closed": ("qwen3_coder", xml_of(n="1").replace("</function>", ""), "", [("f", '{"n": 1}')]),
    "an example without an end": (
        "qwen3_coder",
        xml_of(s="like <function=g> or", n="1") + xml_of(n="2") + " ",
        "",
        [("f", json_of(s="like <function=g> or", n=1)), ("f", '{"n": 2}')],
    ),
    "a string without an end": ("qwen3_coder", xml_of(l='["', n="1"), "", [("f", json_of(l='["', n=1))]),
    "a parameter twice": ("qwen3_coder", xml_of(n="1")[:-25] + xml_of(n="2")[25:], "", [("f", '{"n": 2}')]),
    "a broken call and another": (
        "qwen3_coder",
        "<tool_call><function=f><parameter=s>a</tool_call>" + xml_of(n="1"),
        "<tool_call><function=f><parameter=s>a</tool_call>",
        [("f", '{"n": 1}')],
    ),
    "pythonic": (
        "pythonic",
        "[f(x=1, y={'a': [None, True]}), g()]",
        "",
        [("f", '{"x": 1, "y": {"a": [null, true]}}'), ("g", "{}")],
    ),
}


@pytest.mark.parametrize("num_chars", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str, num_chars: int) -> None:
    family, text, content, calls = CALLS[name]
    assert read(FORMS[family].parser(TOOLS, 16), text, num_chars) == (content, calls)


NO_CALLS = {
    "unknown name": ("hermes", '<tool_call>{"name": "rm"}</tool_call> hi'),
    "no name": ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
    "no object": ("hermes", "<tool_call>f(1)</tool_call>"),
    "nothing": ("hermes", "a <tool_call></tool_call> b"),
    "half a mark": ("hermes", "1 <tool_cal 2 <"),
    "a number for a name": ("hermes", '<tool_call>{"name": 5}</tool_call>'),
    "unknown function": ("qwen3_coder", "so <tool_call><function=rm></function></tool_call> \n"),
    "unfinished function": ("qwen3_coder", "so <tool_call><function=f>"),
    "an answer in JSON": ("llama3_json", '{"name": "Bob", "age": 3}'),
    "a list": ("json", "[1, 2]"),
    "spaces": ("llama3_json", "  \n "),
    "code": ("pythonic", "[f(x=__import__('os').system('true'))]"),
    "positional": ("pythonic", "[f(1)]"),
    "comprehension": ("pythonic", "[f(x=y) for y in (1, 2)]"),
    "no JSON": ("pythonic", "[f(x={1, 2})]"),
    "attribute": ("pythonic", "[f.__class__(x=1)]"),
    "not Python": ("pythonic", "[f(x="),
}


@pytest.mark.parametrize("num_chars", [1, 2, 1000])
@pytest.mark.parametrize("name", NO_CALLS)
def test_what_is_no_call_is_text_to_the_last_character(name: str, num_chars: int) -> None:
    family, text = NO_CALLS[name]
    assert read(FORMS[family].parser(TOOLS, 16), text, num_chars) == (text, [])


def test_further_calls_are_passed_over() -> None:
    assert read(FORMS["mistral"].parser({"f": {}}, 1), f"[TOOL_CALLS][{F}, {F}]", 4) == ("", [("f", F_ARGUMENTS)])
    assert read(FORMS["pythonic"].parser({"f": {}}, 1), "[f(), f()]", 4) == ("", [("f", "{}")])


def test_an_answer_in_json_is_told_as_it_is_written() -> None:
    parser = FORMS["llama3_json"].parser({"f": {}}, 16)
    told = [parser.feed(piece) for piece in ('{"ans', 'wer": ', '"long', " text", '"}')]
    texts = ["".join(piece.text for piece in pieces if isinstance(piece, Text)) for pieces in told]
    assert texts == ["", '{"answer":', ' "long', " text", '"}']


def test_arguments_arrive_as_they_are_written() -> None:
    parser = FORMS["hermes"].parser({"f": {}}, 16)
    told = [parser.feed(piece) for piece in ("<tool_call>{", '"name": "f", "arg', 'uments": {"x"', ": 1}", "}")]
    assert told == [
        [],
        [CallStart(0, "f")],
        [CallArguments(0, '{"x"')],
        [CallArguments(0, ": 1}")],
        [],
    ]


SCRAPS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "functools", "<|python_tag|>", "<|tool_call|>", "text"),
    *("{", "}", "[", "]", '"', "\\", ",", ":", ";", "<", " ", "\n", "f", "g", "1", "null", "é🦥", "\0", "(", ")", "="),
    *("<function=f>", "</function>", "<parameter=n>", "</parameter>", "\n<parameter=s>", "<parameter=l>"),
    *('{"name": "f"', '"arguments": {', '"name"', '"x": 1', '{"name": "f", "arguments": {"x": 1}}', "f(x=1)", "[f("),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_mixture_is_read_alike_in_one_piece_and_in_many(family: str) -> None:
    chance = random.Random(family)
    for _ in range(2000):
        text = "".join(chance.choice(SCRAPS) for _ in range(chance.randrange(1, 14)))
        whole = read(FORMS[family].parser(TOOLS, 16), text, 1000)
        assert read(FORMS[family].parser(TOOLS, 16), text, chance.randrange(1, 9)) == whole, text
        content, calls = whole
        assert all(name in ("f", "g") for name, _ in calls)
        assert calls or content == text


INNOCENT = ("</parameter> a", "</function>\nb", "</tool_call>c", "d <parameter=n>", "<", '"', "\\", "\n\n,", EXAMPLE)
texts = st.lists(st.sampled_from(INNOCENT) | st.text(st.characters(exclude_characters="<"))).map("".join)
values = st.recursive(st.none() | st.booleans() | st.integers() | texts, st.lists)
arguments = st.fixed_dictionaries({}, optional={"n": st.integers(), "l": st.lists(values), "s": texts, "x": texts})


@given(st.lists(arguments, min_size=1, max_size=3), st.integers(1, 40))
def test_arguments_in_xml_may_hold_its_marks(all_given: list[dict[str, object]], num_chars: int) -> None:
    form, calls = FORMS["qwen3_coder"], [("f", each) for each in all_given]
    content, found = read(form.parser(TOOLS, 16), form.write(calls), num_chars)
    assert content == ""
    assert [(name, json.loads(text)) for name, text in found] == calls


FLOODS = {
    "marks": "<tool_call>" * 5000,
    "spaces": " " * 50_000,
    "brackets": "[" * 50_000,
    "braces": "{" * 50_000,
    "nesting": '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 10_000,
    "quotes": '"' * 50_000,
    "functions": "<tool_call>" + "<function=f>" * 5000,
    "parameters": "<tool_call><function=f>" + "<parameter=x>\n" * 4000,
    "closings": "<tool_call><function=f><parameter=x>" + "</parameter> " * 4000 + "</tool_call>" * 100,
    "names": "[TOOL_CALLS]" + "a" * 50_000,
    "escapes": '<tool_call>{"name": "' + "\\" * 50_000,
    "calls": "[" + "f()," * 10_000 + "]",
    "minus": "[f(x=" + "-" * 50_000 + "1)]",
}


@pytest.mark.parametrize("flood", FLOODS)
def test_floods_take_no_time(flood: str) -> None:
    for family in FAMILIES:
        start_s = time.perf_counter()
        read(FORMS[family].parser({"f": {}}, 16), FLOODS[flood], 4)
        assert time.perf_counter() - start_s < 2


def test_families_are_told_by_their_templates() -> None:
    assert detect_family("{% if tools %}[AVAILABLE_TOOLS] … [TOOL_CALLS]") == "mistral"
    assert detect_family("<tool_call>\n<function=example_function_name>") == "qwen3_coder"
    assert detect_family("return within <tool_call></tool_call> XML tags") == "hermes"
    assert detect_family('{"name": function name, "parameters": dictionary of argument name}') == "llama3_json"
    assert detect_family("") == "hermes"


def test_ids_are_what_mistral_takes() -> None:
    ids = {new_call_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(each) == 9 and each.isalnum() for each in ids)
    assert json.loads(F)["name"] == "f"
