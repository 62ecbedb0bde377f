"""A function's arguments one by one, for families of models that do not write them as one JSON object."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .call_form import Schema

_DEFINITIONS = ("$defs", "definitions")
_REMARKS = {"title", "description", "default", "examples", "deprecated", "$schema", "$id", "$comment"}
_SAYS_NOTHING = _REMARKS | {*_DEFINITIONS}
_OF_AN_OBJECT = _SAYS_NOTHING | {"type", "properties", "required", "additionalProperties"}


class InexpressibleError(ValueError):
    """A family's form of calls has no place for what a schema demands."""

    def __init__(self, what: str, *details: str) -> None:
        named = f" ({', '.join(details)[:64]})" if details else ""
        super().__init__(f"the way this model writes calls has no place for {what}{named}")


@dataclass(frozen=True, slots=True)
class Argument:
    """``schema`` stands by itself: it has all definitions."""

    name: str
    schema: Schema
    is_required: bool


def arguments_of(schema: Schema) -> list[Argument]:
    """The arguments that a function's schema names, in its order.

    Raises:
        InexpressibleError: it demands more than a form for each argument.
    """
    if (more := sorted(demands(schema) - _OF_AN_OBJECT)) or schema.get("type", "object") != "object":
        raise InexpressibleError("parameters that are more than an object's properties", *more)
    for reference in _references(schema):
        if not reference.startswith(("#/$defs/", "#/definitions/")):
            raise InexpressibleError("a reference to anything but a definition", reference)
    properties, required = properties_of(schema), schema.get("required", [])
    if not isinstance(required, list) or not all(name in properties for name in required):
        raise InexpressibleError("required arguments that are none of its properties")
    return [Argument(name, each, name in required) for name, each in properties.items()]


def properties_of(schema: Schema) -> dict[str, Schema]:
    """The schemas of the arguments by name, as far as it tells them."""
    properties, definitions = schema.get("properties"), definitions_of(schema)
    if not isinstance(properties, dict):
        return {}
    return {name: {**as_object(each), **definitions} for name, each in properties.items()}


def takes_any(schema: Schema) -> bool:
    """Whether a function that names no arguments takes whatever it gets.

    Raises:
        InexpressibleError: it demands something of them nevertheless.
    """
    others = schema.get("additionalProperties", True)
    if others not in (True, False, {}):
        raise InexpressibleError("arguments of any name that are of some kind")
    return others is not False


def demands(schema: Schema) -> set[str]:
    """The keywords of a schema that are more than remarks."""
    return set(schema) - _SAYS_NOTHING


def as_object(schema: Any) -> Schema:
    """A schema that may be true or false as an object."""
    return schema if isinstance(schema, dict) else {} if schema is True else {"not": {}}


def definitions_of(schema: Schema) -> dict[str, Any]:
    return {key: schema[key] for key in _DEFINITIONS if key in schema}


def _references(schema: Any) -> Iterator[str]:
    children = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    if isinstance(schema, dict) and isinstance(reference := schema.get("$ref"), str):
        yield reference
    for child in children:
        yield from _references(child)
