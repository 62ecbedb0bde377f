"""Command-line options from configuration classes: names, types, defaults and help are said once, in the class."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

_ARGS_BLOCK = re.compile(r"^Args:\n(.*?)(?:\n\n|\Z)", re.DOTALL | re.MULTILINE)
_ENTRY = re.compile(r"^    ([\w, ]+): (.*(?:\n     +.*)*)", re.MULTILINE)


def add_options(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup,
    kind: type,
    *,
    only: Collection[str] | None = None,
    skip: Collection[str] = (),
    defaults: dict[str, Any] | None = None,
) -> None:
    """Add ``--field-name`` for every field of a dataclass or msgspec struct that a command line can express.

    What is not given is left out of the namespace, so that the class's own default holds. ``defaults`` are only shown.
    """
    help_of, hints = field_help(kind), get_type_hints(kind)
    for name, default in _fields(kind).items():
        if name in skip or (only is not None and name not in only):
            continue
        shown = (defaults or {}).get(name, default)
        text = help_of.get(name, "").replace("`", "").replace("%", "%%")
        if shown not in (None, (), ""):
            text += f" (default: {shown})"
        options = _options_for(hints[name])
        if options is not None:
            flag = "--" + name.replace("_", "-")
            parser.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=text, **options)


def chosen(arguments: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The fields of ``kind`` that were given on the command line."""
    return {name: value for name, value in vars(arguments).items() if name in _fields(kind)}


def as_arguments(values: Mapping[str, Any]) -> list[str]:
    """The command line that gives these values: the way back of :func:`chosen`.

    >>> as_arguments({"max_num_seqs": 8, "strict": False, "api_keys": ["a", "b"]})
    ['--max-num-seqs=8', '--no-strict', '--api-keys=a', '--api-keys=b']
    """
    arguments = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            items = value if isinstance(value, (list, tuple)) else [value]
            arguments += [f"--{flag}={item}" for item in items]
    return arguments


def _fields(kind: type) -> dict[str, Any]:
    if dataclasses.is_dataclass(kind):
        return {field.name: field.default for field in dataclasses.fields(kind)}
    return {field.name: field.default for field in msgspec.structs.fields(kind)}


def field_help(kind: type) -> dict[str, str]:
    """The entries of a class docstring's ``Args:`` block."""
    block = _ARGS_BLOCK.search(inspect.getdoc(kind) or "")
    found: dict[str, str] = {}
    for names, text in _ENTRY.findall(block[1] if block else ""):
        found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def _options_for(hint: Any) -> dict[str, Any] | None:
    """``add_argument``'s keywords for a type; ``None`` if a command line cannot express it."""
    kinds = [each for each in (get_args(hint) or (hint,)) if each is not type(None)]
    literal = hint if get_origin(hint) is Literal else kinds[0]
    if get_origin(literal) is Literal:
        return {"choices": get_args(literal)}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is tuple or (kinds and get_origin(kinds[0]) is list):
        item = str if get_origin(hint) is tuple else get_args(kinds[0])[0]
        return {"action": "append", "type": item, "metavar": _metavar(item)}
    if kinds[0] in (int, float, str):
        return {"type": kinds[0], "metavar": _metavar(kinds[0])}
    return None


def _metavar(kind: type) -> str:
    return {int: "N", float: "X", str: "TEXT"}[kind]
