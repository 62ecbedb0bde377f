"""Calls written as JSON objects with a name and arguments, which is how most families of models write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .call_form import ANY_TEXT, SPACE_RULES, Call, Schema, WantedCalls, json_rule, opened_by, text_rules
from .json_call_parser import JsonCallParser

_TEXT_THAT_IS_NO_CALL = r"\s*([^\s{\[](?s:.*))?"


@dataclass(frozen=True, slots=True)
class JsonForm:
    """What stands before, between and after calls: ``begin [ {call} , {call} ]`` or ``begin {call} end``.

    Args:
        begin: the mark before calls; the empty string if there is none.
        end: the mark after a call, which the next one begins anew; likewise.
        opens, between, closes: the brackets and commas of several calls after one mark.
        arguments: the name of the member next to ``name``.
        is_bare: an answer that begins with a brace or bracket is a call also without the mark.
        has_names_outside: a call may also be ``name[ARGS]{"argument": …}``, with a mark of its own.
    """

    begin: str
    end: str = ""
    opens: str = ""
    between: str = ""
    closes: str = ""
    arguments: str = "arguments"
    is_bare: bool = False
    has_names_outside: bool = False

    @property
    def marks(self) -> Sequence[str]:
        return [mark for mark in (self.begin, self.end) if mark]

    def write(self, calls: Sequence[Call]) -> str:
        objects = [json.dumps({"name": name, self.arguments: given}, ensure_ascii=False) for name, given in calls]
        if self.end:
            return "\n".join(f"{self.begin}\n{each}\n{self.end}" for each in objects)
        return self.begin + self.opens + f"{self.between} ".join(objects) + self.closes

    def parser(self, functions: Mapping[str, Schema], max_calls: int) -> JsonCallParser:
        return JsonCallParser(self, functions, max_calls)

    def rules(self, wanted: WantedCalls) -> list[str]:
        mark = wanted.mark(self.begin) if self.begin else ""
        optional = "?" if mark and self.is_bare else ""
        rules = [
            *SPACE_RULES,
            f"objects: {self._objects(wanted, mark)}",
            json_rule("call", self._call(wanted.functions)),
        ]
        named = _names_outside(wanted, mark) if self.has_names_outside else []
        body = "body: ws (objects | named_calls)" if named else "body: ws objects"
        return [f"calls: {mark}{optional} body", body, *rules, *named]

    def text_rules(self, wanted: WantedCalls) -> list[str]:
        text = _TEXT_THAT_IS_NO_CALL if self.is_bare else ANY_TEXT
        if not self.begin:
            return [*text_rules(text), "text_calls: body"]
        bare = " | body" if self.is_bare else ""
        return [*opened_by(wanted.mark(self.begin), text), f"text_calls: opening body{bare}"]

    def _objects(self, wanted: WantedCalls, mark: str) -> str:
        if self.end:
            one = f"call ws {wanted.mark(self.end)}"
            return f"{one} {wanted.further(f'ws {mark} ws {one}')}"
        opens, between, closes = (json.dumps(text) if text else "" for text in (self.opens, self.between, self.closes))
        calls = f"call {wanted.further(f'ws {between} ws call')}"
        return " ws ".join(filter(None, [opens, calls, closes]))

    def _call(self, functions: Mapping[str, Schema]) -> Schema:
        """The schema of any of the calls. Each function's has an id, so that references in it hold."""
        return {
            "anyOf": [
                _object({"name": {"const": name}, self.arguments: {**schema, "$id": f"function:///{i}"}})
                for i, (name, schema) in enumerate(functions.items())
            ]
        }


def _object(members: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": members, "required": list(members), "additionalProperties": False}


def _names_outside(wanted: WantedCalls, mark: str) -> list[str]:
    """Another way to write calls, for models whose tokens have a mark for it."""
    args, call_id = wanted.special_id("[ARGS]"), wanted.special_id("[CALL_ID]")
    if args is None:
        return []
    before = f"<[{args}]>" if call_id is None else f"(<[{call_id}]> CALL_ID)? <[{args}]>"
    rules = [] if call_id is None else ["CALL_ID: /[a-zA-Z0-9]{9}/"]
    for i, (name, schema) in enumerate(wanted.functions.items()):
        rules += [f"named_{i}: {json.dumps(name)} {before} ws arguments_{i}", json_rule(f"arguments_{i}", schema)]
    named = " | ".join(f"named_{i}" for i in range(len(wanted.functions)))
    return [f"named_calls: named {wanted.further(f'ws {mark} ws named')}", f"named: {named}", *rules]
