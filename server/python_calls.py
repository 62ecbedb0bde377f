"""Calls written as Python: ``[f(x=1), g()]``. The text is parsed, never run."""

from __future__ import annotations

import ast
import json
from collections.abc import Collection
from typing import Any

_MAX_CHARS = 64 << 10


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
