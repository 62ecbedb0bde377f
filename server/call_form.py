"""How a family of models writes calls: one object per family reads and writes them, and has the grammar they follow.

    start: calls                  an answer must be calls
    start: calls | answer         or else what the request wants of an answer
    start: text | text_calls      or else text, which may stand before them too

The rest is the family's, in Lark's syntax as llguidance has it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cupy_engine.structured_outputs import JSON_OPTIONS

from .tool_pieces import ToolParser

ANY_TEXT = "(?s:.*)"
SPACE_RULES = ("ws: WS?", r"WS: /[ \n]{1,2}/")

Schema = Mapping[str, Any]
Call = tuple[str, Mapping[str, Any]]  # the function's name, its arguments


@dataclass(frozen=True, slots=True)
class WantedCalls:
    """What the calls of one answer may be.

    Args:
        functions: by name the schema that their arguments follow.
        max_calls: in one answer.
        special_id: the id of the special token that is written so, if there is one.
    """

    functions: Mapping[str, Schema]
    max_calls: int
    special_id: Callable[[str], int | None]

    def mark(self, text: str) -> str:
        """A mark as grammars have it, where a special token is no text."""
        token_id = self.special_id(text)
        return json.dumps(text) if token_id is None else f"<[{token_id}]>"

    def further(self, rule: str) -> str:
        """``rule`` as often as there may be calls after the first."""
        return f"({rule}){{0,{self.max_calls - 1}}}" if self.max_calls > 1 else ""


class CallForm(Protocol):
    """One family's way to write calls."""

    @property
    def marks(self) -> Sequence[str]:
        """What shows where calls are, and so must not be skipped if it is a special token."""

    def write(self, calls: Sequence[Call]) -> str:
        """Calls as the model would write them."""

    def parser(self, functions: Mapping[str, Schema], max_calls: int) -> ToolParser:
        """For one answer; calls past ``max_calls`` are passed over."""

    def rules(self, wanted: WantedCalls) -> list[str]:
        """Rules for ``calls``. Raises InexpressibleError for what they cannot hold."""

    def text_rules(self, wanted: WantedCalls) -> list[str]:
        """Rules for ``text`` without calls and for ``text_calls``, next to :meth:`rules`."""


def call_grammar(
    form: CallForm, wanted: WantedCalls, answer: Schema | None = None, *, allows_text: bool = False
) -> str:
    """The grammar of calls, or of ``answer`` if given, or of text if allowed."""
    rules = ["%llguidance {}", *form.rules(wanted)]
    if answer is not None:
        rules += ["start: calls | answer", json_rule("answer", answer)]
    elif allows_text:
        rules += ["start: text | text_calls", *form.text_rules(wanted)]
    else:
        rules.append("start: calls")
    return "\n".join(rules)


def json_rule(name: str, schema: Schema) -> str:
    """JSON of a schema."""
    return f"{name}: %json {json.dumps({**schema, 'x-guidance': JSON_OPTIONS})}"


def text_rules(text: str) -> list[str]:
    """Text that matches a regular expression."""
    return ["text: TEXT", f"TEXT: /{text}/"]


def opened_by(mark: str, text: str) -> list[str]:
    """Text, and an ``opening``: text up to a mark, which ends it wherever it comes."""
    is_token = mark.startswith("<[")
    return [*text_rules(text), f"opening: TEXT? {mark}" if is_token else f"opening[lazy]: TEXT {mark}"]
