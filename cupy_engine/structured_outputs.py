"""What a request may demand of its output's form, and the grammar that this becomes."""

from __future__ import annotations

import json
from typing import Any, NoReturn

import msgspec

from cupy_engine.errors import InvalidRequestError

MAX_SCHEMA_DEPTH = 64
MAX_GRAMMAR_CHARS = 256 << 10
MAX_CHOICES = 1024
FORMS = ("json", "json_object", "regex", "choice", "grammar")

# A space, or a new line with its indentation: an endless run of white space is a weak model's way never to end.
JSON_OPTIONS = {"whitespace_pattern": r"\x20|\n[\x20\t]{0,64}"}


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The form of the output, in exactly one way.

    Args:
        json: a JSON schema, as an object or as its text.
        json_object: any JSON object.
        regex: a regular expression (Rust's syntax: no look-around or back references) that the whole output matches.
        choice: the texts of which the output is one.
        grammar: a context-free grammar in Lark's or GBNF's syntax.
        param: the name of the request's field that asks for it, for errors.

    Raises:
        InvalidRequestError: none or several ways, or a value of the wrong type or size.
    """

    json: dict[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    param: str = "structured_outputs"

    def __post_init__(self) -> None:
        given = [name for name in FORMS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            listed = " and ".join(given) or "none"
            self._refuse(f"must have exactly one of {', '.join(FORMS)}, got {listed}")
        if self.choice is not None and not 0 < len(self.choice) <= MAX_CHOICES:
            self._refuse(f"must have 1 to {MAX_CHOICES} choices, got {len(self.choice)}")
        if not all(isinstance(text, str) and text for text in self.choice or ()):
            self._refuse("must have choices that are non-empty strings")

    def to_grammar(self) -> Grammar:
        """The same in the words of the grammar library; whether they make sense shows when it is compiled.

        Raises:
            InvalidRequestError: too large, too deep, or not readable at all.
        """
        from llguidance import LLMatcher, regex_to_lark

        if self.json is not None or self.json_object:
            schema = self._schema()
            text = LLMatcher.grammar_from_json_schema(schema, defaults=JSON_OPTIONS)  # type: ignore[arg-type]
        elif self.regex is not None:
            pattern = regex_to_lark(self._limited(self.regex), use_ascii="d")  # \d is 0 to 9
            text = LLMatcher.grammar_from_lark(f"start: /{pattern}/")
        elif self.choice is not None:
            options = " | ".join(json.dumps(each, ensure_ascii=False) for each in self.choice)
            text = LLMatcher.grammar_from_lark(f"start: {self._limited(options)}")
        else:
            text = LLMatcher.grammar_from_lark(self._as_lark(self._limited(self.grammar or "")))
        return Grammar(text, self.param)

    def _schema(self) -> str:
        schema: Any = {"type": "object"} if self.json_object else self.json
        if isinstance(schema, str):
            try:
                schema = json.loads(self._limited(schema))
            except (ValueError, RecursionError) as error:
                self._refuse(f"is not valid JSON: {error}")
        if not isinstance(schema, dict):
            self._refuse("must be a JSON schema, which is an object")
        check_schema_depth(schema, self.param)
        return self._limited(json.dumps(schema))

    def _as_lark(self, grammar: str) -> str:
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            return any_to_lark(grammar)
        except RecursionError:
            self._refuse("is nested too deeply")
        except Exception as error:  # the library raises nothing narrower
            self._refuse(f"is a grammar neither in Lark's nor in GBNF's syntax: {error}")

    def _limited(self, text: str) -> str:
        if len(text) > MAX_GRAMMAR_CHARS:
            self._refuse(f"must have at most {MAX_GRAMMAR_CHARS} characters, got {len(text)}")
        return text

    def _refuse(self, problem: str) -> NoReturn:
        raise InvalidRequestError(self.param, f"{self.param} {problem}")


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """A grammar for the engine to compile; ``param`` names the request's field it came from."""

    text: str
    param: str


def check_schema_depth(schema: Any, param: str) -> None:
    """Raises InvalidRequestError for a schema that is nested too deeply."""
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [child for each in level for child in _children(each)]
        if not level:
            return
    raise InvalidRequestError(param, f"{param} must be nested at most {MAX_SCHEMA_DEPTH} deep")


def _children(value: Any) -> list[Any]:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [child for child in children if isinstance(child, (dict, list))]
