"""Values of arguments in XML, where texts stand as they are and everything else is JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from .arguments import InexpressibleError, as_object, definitions_of, demands
from .call_form import Schema

_SCALARS = ("null", "boolean", "integer", "number")
_PYTHON_S: dict[str, Any] = {"True": True, "False": False, "None": None}  # as some chat templates write them
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def ways_to_write(schema: Schema) -> list[str | Schema | None]:
    """An argument as this text, as JSON of this schema, or as any text (``None``).

    Raises:
        InexpressibleError: some of what it may be could not be told from something else.
    """
    if not may_be_text(schema):
        return [schema]
    ways: list[str | Schema | None] = []
    for branch in _branches(schema, ("anyOf",)):
        if values := _choices(branch):
            ways += [value if isinstance(value, str) else json.dumps(value) for value in values]
        elif branch.get("type", "string") != "string":
            ways.append({**branch, **definitions_of(schema)})
        elif more := sorted(demands(branch) - {"type"}):
            raise InexpressibleError("a text of which more is said than its choices", *more)
        else:
            ways.append(None)
    if None in ways and not all(_is_plain(way) for way in ways if isinstance(way, dict)):
        raise InexpressibleError("what may be any text or else follows a schema")
    return ways


def may_be_text(schema: Schema) -> bool:
    types = types_of(schema)
    return not types or "string" in types


def argument_of(text: str, schema: Schema) -> Any:
    """The value that is written as ``text``: JSON, unless it is a text by its schema, or by that may well be one."""
    types = types_of(schema)
    if not types or types == {"string"}:
        return text
    try:
        value = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        value = _PYTHON_S.get(text, text)
    fits = _type_of(value) in types or (_type_of(value) == "integer" and "number" in types)
    return value if fits or "string" not in types else text


def types_of(schema: Schema) -> set[str]:
    """The types of what follows a schema; empty if it may be anything, or cannot be told."""
    found: set[str] = set()
    for branch in _branches(schema, ("anyOf", "oneOf")):
        if values := _choices(branch):
            found.update(map(_type_of, values))
        elif isinstance(kind := branch.get("type"), str):
            found.add(kind)
        else:
            return set()
    return found


def _branches(schema: Schema, keywords: Sequence[str]) -> Iterator[Schema]:
    """What a schema allows one of, each once: references followed, lists of types and of ``keywords`` taken apart."""
    todo: list[Schema] = [schema]
    seen: dict[int, Schema] = {}
    while todo:
        each = todo.pop()
        if id(each) in seen:
            continue
        seen[id(each)] = each
        choices = next((each[keyword] for keyword in keywords if demands(each) == {keyword}), None)
        if demands(each) == {"$ref"}:
            todo.append(_referred(str(each["$ref"]), schema))
        elif isinstance(choices, list):
            todo += map(as_object, reversed(choices))
        elif isinstance(kinds := each.get("type"), list) and not _choices(each):
            yield from ({**each, "type": kind} for kind in kinds)
        else:
            yield each


def _referred(reference: str, root: Schema) -> Schema:
    found: Any = root
    for name in reference.removeprefix("#/").split("/"):
        found = found.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
    return as_object(found)


def _choices(schema: Schema) -> list[Any]:
    """The values that a schema lists, if it does."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return values if isinstance(values, list) else []


def _is_plain(schema: Schema) -> bool:
    """Whether all of a simple type follows a schema."""
    return demands(schema) == {"type"} and schema["type"] in _SCALARS


def _type_of(value: Any) -> str:
    return _TYPES.get(type(value), "null")


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
