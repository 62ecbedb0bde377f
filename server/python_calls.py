"""Calls written as Python: ``[f(x=1), g()]``. The text is parsed, never run."""

from __future__ import annotations

import ast
import json
from collections.abc import Collection, Mapping
from typing import Any

from .call_form import Schema, WantedCalls
from .tool_pieces import MAX_HELD_SPACES, CallArguments, CallStart, Piece, Text

_MAX_CHARS = 64 << 10


class PythonForm:
    """The form ``[f(x=1), g()]``, alone in its answer."""

    marks = ()

    def parser(self, functions: Mapping[str, Schema], max_calls: int) -> PythonCallParser:
        return PythonCallParser(functions, max_calls)

    def problem(self, name: str, schema: Schema) -> str | None:
        return "this model writes calls as Python"

    def rules(self, wanted: WantedCalls) -> list[str]:
        raise AssertionError

    def text_rules(self, wanted: WantedCalls) -> list[str]:
        raise AssertionError


class PythonCallParser:
    """Reads ``[f(x=1), g()]``, once it is all there: only literal arguments make a call."""

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
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("** is no literal")
        arguments[keyword.arg] = ast.literal_eval(keyword.value)
    return ast.unparse(node.func), arguments
