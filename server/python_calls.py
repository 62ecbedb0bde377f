"""Calls written as Python: ``[f(x=1), g()]``, alone in their answer. The text is parsed, never run."""

from __future__ import annotations

import ast
import json
import keyword
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .arguments import Argument, InexpressibleError, arguments_of, demands, takes_any
from .call_form import SPACE_RULES, Call, Schema, WantedCalls, json_rule, text_rules
from .tool_pieces import MAX_HELD_SPACES, CallArguments, CallStart, Piece, Text

_MAX_CHARS = 64 << 10
_JSON_NAMES = {"true": True, "false": False, "null": None}


class PythonForm:
    """The form above, with JSON for values: as literals they are the same but for true, false and null."""

    @property
    def marks(self) -> Sequence[str]:
        return ()

    def write(self, calls: Sequence[Call]) -> str:
        return f"[{', '.join(_written(name, given) for name, given in calls)}]"

    def parser(self, functions: Mapping[str, Schema], max_calls: int) -> PythonCallParser:
        return PythonCallParser(functions, max_calls)

    def rules(self, wanted: WantedCalls) -> list[str]:
        more = wanted.further('"," ws call')
        rules = [f'calls: "[" call {more} "]"', *SPACE_RULES]
        rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(wanted.functions))))
        for i, (name, schema) in enumerate(wanted.functions.items()):
            rules += _call_rules(i, name, schema)
        return rules

    def text_rules(self, wanted: WantedCalls) -> list[str]:
        return [*text_rules(r"\s*([^\s\[](?s:.*))?"), "text_calls: calls"]


def _written(name: str, given: Mapping[str, Any]) -> str:
    values = {key: str(v) if isinstance(v, bool) else json.dumps(v, ensure_ascii=False) for key, v in given.items()}
    return f"{name}({', '.join(f'{key}={value}' for key, value in values.items())})"


def _call_rules(i: int, name: str, schema: Schema) -> list[str]:
    _check_name(*name.split("."))
    arguments = arguments_of(schema)
    if not arguments and takes_any(schema):
        return [
            f'call_{i}: "{name}(" (any_{i} ("," ws any_{i})*)? ")"',
            f'any_{i}: NAME_{i} "=" value_{i}',
            f"NAME_{i}: /[a-zA-Z_][a-zA-Z0-9_]*/ & ~/{'|'.join(keyword.kwlist)}/",
            json_rule(f"value_{i}", {}),
        ]
    _check_name(*(argument.name for argument in arguments))
    rules = [f'call_{i}: "{name}(" first_{i}_0 ")"']
    for k, argument in enumerate(arguments):
        rules += _argument_rules(f"{i}_{k}", f"{i}_{k + 1}", argument)
    return [*rules, f'first_{i}_{len(arguments)}: ""', f'more_{i}_{len(arguments)}: ""']


def _argument_rules(here: str, after: str, argument: Argument) -> list[str]:
    """An argument and those after it: with commas between them, whichever are left out."""
    left_out = ("", "") if argument.is_required else (f" | first_{after}", f" | more_{after}")
    is_boolean = argument.schema.get("type") == "boolean" and demands(argument.schema) == {"type"}
    value = f'value_{here}: "True" | "False"' if is_boolean else json_rule(f"value_{here}", argument.schema)
    return [
        f"first_{here}: argument_{here} more_{after}{left_out[0]}",
        f'more_{here}: "," ws argument_{here} more_{after}{left_out[1]}',
        f'argument_{here}: "{argument.name}=" value_{here}',
        value,
    ]


def _check_name(*names: str) -> None:
    for name in names:
        if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name):
            raise InexpressibleError("a name that is none in Python", name)


class PythonCallParser:
    """Reads such calls once they are all there: only literal arguments make a call."""

    def __init__(self, names: Collection[str], max_calls: int) -> None:
        self._names = names
        self._max_calls = max_calls
        self._buffer = ""
        self._is_text = False

    def feed(self, text: str) -> list[Piece]:
        self._buffer += text
        start = self._buffer[: MAX_HELD_SPACES + 1].lstrip()[:1]
        self._is_text = self._is_text or (start != "[" and (start != "" or len(self._buffer) > MAX_HELD_SPACES))
        return self._flush() if self._is_text else []

    def finish(self) -> list[Piece]:
        calls = [] if self._is_text else read_python_calls(self._buffer, self._names)
        if not calls:
            return self._flush()
        pieces: list[Piece] = []
        for index, (name, arguments) in enumerate(calls[: self._max_calls]):
            pieces += [CallStart(index, name), CallArguments(index, json.dumps(arguments, ensure_ascii=False))]
        return pieces

    def _flush(self) -> list[Piece]:
        text, self._buffer = self._buffer, ""
        return [Text(text)] if text else []


def read_python_calls(text: str, names: Collection[str]) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments; empty unless the text is a list of calls of ``names`` with literal keyword arguments."""
    if len(text) > _MAX_CHARS:
        return []
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if not isinstance(tree, ast.List):
            return []
        calls = [_read_call(node) for node in tree.elts]
        json.dumps(calls)  # a set or bytes are literals, but no JSON
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return []
    return calls if all(name in names for name, _ in calls) else []


def _read_call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call with keywords only")
    arguments = {}
    for argument in node.keywords:
        if argument.arg is None:
            raise ValueError("** is no literal")
        arguments[argument.arg] = ast.literal_eval(_JsonNames().visit(argument.value))
    return ast.unparse(node.func), arguments


class _JsonNames(ast.NodeTransformer):
    """Has true, false and null for literals, which they are in JSON."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_JSON_NAMES[node.id]) if node.id in _JSON_NAMES else node
