"""Which families of models write their calls how, and which of them a chat template belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .call_form import CallForm
from .json_calls import JsonForm
from .python_calls import PythonForm
from .xml_calls import XmlForm

if TYPE_CHECKING:
    from cupy_engine.chat_template import ChatTemplate  # heavy; the command line's help needs only the names below

LIST = JsonForm(begin="", opens="[", between=",", closes="]", is_bare=True)
FORMS: dict[str, CallForm] = {
    "hermes": JsonForm(begin="<tool_call>", end="</tool_call>"),
    "llama3_json": JsonForm(begin="<|python_tag|>", between=";", arguments="parameters", is_bare=True),
    "mistral": JsonForm(begin="[TOOL_CALLS]", opens="[", between=",", closes="]", has_names_outside=True),
    "granite": JsonForm(begin="<|tool_call|>", opens="[", between=",", closes="]", is_bare=True),
    "phi4_mini": JsonForm(begin="functools[", between=",", closes="]"),
    "json": LIST,
    "qwen3_coder": XmlForm(),
    "pythonic": PythonForm(),
}
TOOL_PARSERS = ("auto", *FORMS)

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


def form_of(chosen: str, template: ChatTemplate | None) -> CallForm:
    """The form of calls of the family ``chosen``, one of ``TOOL_PARSERS``; ``auto`` goes by the chat template."""
    return FORMS[detect_family("" if template is None else template.text_with_tools) if chosen == "auto" else chosen]


def detect_family(template: str) -> str:
    """The family that a chat template belongs to; hermes, the most common one, if it does not say."""
    return next((family for sign, family in _SIGNS.items() if sign in template), "hermes")
