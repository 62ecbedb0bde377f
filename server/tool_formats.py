"""Which families of models write their calls how, and which of them a chat template belongs to."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from . import xml_calls
from .tool_parsing import JsonCallParser, PythonCallParser, ToolFormat
from .tool_pieces import ToolParser

_FORMATS = {
    "hermes": ToolFormat(begin="<tool_call>", end="</tool_call>"),
    "llama3_json": ToolFormat(begin="<|python_tag|>", is_bare=True),
    "mistral": ToolFormat(begin="[TOOL_CALLS]", has_names_outside=True),
    "granite": ToolFormat(begin="<|tool_call|>", is_bare=True),
    "phi4_mini": ToolFormat(begin="functools"),
    "json": ToolFormat(begin="", is_bare=True),
}
_MARKS = {family: form.begin for family, form in _FORMATS.items()} | {"qwen3_coder": xml_calls.BEGIN}
TOOL_PARSERS = ("auto", *_FORMATS, "qwen3_coder", "pythonic")

_SIGNS = {  # what only a family's chat template says
    "[TOOL_CALLS]": "mistral",
    "functools[": "phi4_mini",
    "<|tool_call|>": "granite",
    "<function=": "qwen3_coder",
    "<tool_call>": "hermes",
    "<|python_tag|>": "llama3_json",
    '"parameters": dictionary': "llama3_json",
    "[func_name1(": "pythonic",
}
_SHORT_ID_CHARS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def detect_family(template: str) -> str:
    """The family that a chat template belongs to; hermes, the most common one, if it does not say."""
    return next((family for sign, family in _SIGNS.items() if sign in template), "hermes")


def mark_of(family: str) -> str:
    """The mark before calls; empty if there is none."""
    return _MARKS.get(family, "")


def new_parser(family: str, tools: Mapping[str, xml_calls.Parameters], max_calls: int) -> ToolParser:
    """A parser for one answer; ``tools``: by name the JSON schema of their parameters."""
    if family == "pythonic":
        return PythonCallParser(tools, max_calls)
    if family == "qwen3_coder":
        return xml_calls.XmlCallParser(tools, max_calls)
    return JsonCallParser(_FORMATS[family], tools, max_calls)


def new_call_id() -> str:
    """Nine letters and digits, which is what Mistral's templates insist on."""
    return "".join(secrets.choice(_SHORT_ID_CHARS) for _ in range(9))
