"""What a request's tools mean: the form that its answer must have, and how it is read.

tool_choice          the answer is
none                 what response_format wants, if anything
auto                 text with calls; or either calls, or what response_format wants
required, a name     calls, whatever response_format says
allowed_tools        as with auto or required, but that some tools cannot be called

Calls that must be follow their function's schema, and so do those of functions that are strict. Only where nothing of
this applies is the model free to write what it likes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cupy_engine.structured_outputs import StructuredOutputs, check_schema_depth

from .api_errors import refuse
from .arguments import InexpressibleError
from .call_form import CallForm, Schema, WantedCalls, call_grammar
from .output_form import answer_schema
from .protocol import AllowedToolChoice, ChatRequest, FunctionDefinition, NamedToolChoice, Tool, ToolChoice
from .tool_formats import LIST
from .tool_pieces import ToolParser

MAX_TOOLS = 128
MAX_CALLS = 16  # in one answer
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_ANY_OBJECT = {"type": "object"}
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}

SpecialId = Callable[[str], int | None]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request and how they may be used.

    Args:
        tools: all of them, for the prompt.
        functions: those that may be called.
        form: how calls are written.
        max_calls: in one answer.
        grammar: what the answer must follow, if it is not free.
        has_special_marks: whether calls are among special tokens.
    """

    tools: Sequence[Tool]
    functions: Sequence[FunctionDefinition]
    form: CallForm
    max_calls: int
    grammar: StructuredOutputs | None
    has_special_marks: bool

    def parser(self) -> ToolParser:
        """For one answer."""
        return self.form.parser({each.name: each.parameters or {} for each in self.functions}, self.max_calls)

    def sampling_changes(self, fields: ChatRequest) -> dict[str, Any]:
        """What tools make of the sampling parameters: a form, or marks that must not be skipped."""
        changes: dict[str, Any] = {} if self.grammar is None else {"structured_outputs": self.grammar}
        if self.has_special_marks and (changes or fields.skip_special_tokens is None):
            changes["skip_special_tokens"] = False
        return changes


def tool_use(fields: ChatRequest, form: CallForm, special_id: SpecialId) -> ToolUse | None:
    """``None`` if the request has no tools or wants no calls.

    Args:
        form: in which the model writes calls of its own accord.
        special_id: the id of the special token that is written so, if there is one.

    Raises:
        ApiError, InvalidRequestError: a contradiction, or a tool that cannot be; names the field.
    """
    tools, choice = fields.tools or [], fields.tool_choice
    _check(tools)
    if not tools and choice not in (None, "none", "auto"):
        refuse("tool_choice", f"tool_choice {_shown(choice)} needs tools")
    if not tools or choice == "none":
        return None
    functions, must_call = _callable(tools, choice)
    max_calls = 1 if isinstance(choice, NamedToolChoice) or fields.parallel_tool_calls is False else MAX_CALLS
    answer = None if must_call else _answer(fields)
    grammar, has_limits = None, len(functions) < len(tools) or any(function.strict for function in functions)
    if must_call or answer is not None or has_limits:
        schemas = {each.name: _parameters(each) if must_call or each.strict else _ANY_OBJECT for each in functions}
        wanted = WantedCalls(schemas, max_calls, special_id)
        form, grammar = _constrained(form, wanted, answer, tools, allows_text=not must_call and answer is None)
    has_special_marks = any(special_id(mark) is not None for mark in form.marks)
    return ToolUse(tools, functions, form, max_calls, grammar, has_special_marks)


def _callable(tools: Sequence[Tool], choice: ToolChoice | None) -> tuple[list[FunctionDefinition], bool]:
    """The functions that may be called, and whether one of them must be."""
    match choice:
        case NamedToolChoice(function=chosen):
            return [_named(tools, chosen.name)], True
        case AllowedToolChoice(allowed_tools=allowed):
            if not allowed.tools:
                refuse("tool_choice.allowed_tools.tools", "tool_choice.allowed_tools.tools must not be empty")
            names = dict.fromkeys(each.function.name for each in allowed.tools)
            return [_named(tools, name) for name in names], allowed.mode == "required"
    return [tool.function for tool in tools], choice == "required"


def _constrained(
    form: CallForm, wanted: WantedCalls, answer: Schema | None, tools: Sequence[Tool], *, allows_text: bool
) -> tuple[CallForm, StructuredOutputs]:
    """Calls in the family's form, or in a JSON list if that cannot hold them to their schemas and calls stand alone."""
    try:
        text = call_grammar(form, wanted, answer, allows_text=allows_text)
    except InexpressibleError:
        if allows_text:
            _refuse_strict(form, wanted, tools)
        form, text = LIST, call_grammar(LIST, wanted, answer)
    return form, StructuredOutputs(grammar=text, param="tools" if answer is None else "tools with response_format")


def _refuse_strict(form: CallForm, wanted: WantedCalls, tools: Sequence[Tool]) -> None:
    """Raises ApiError naming the function that no grammar can hold to its schema."""
    for i, tool in enumerate(tools):
        name = tool.function.name
        try:
            form.rules(replace(wanted, functions={name: wanted.functions.get(name, _ANY_OBJECT)}))
        except InexpressibleError as error:
            param = f"tools[{i}].function"
            refuse(param, f"{param} cannot be strict, or one of allowed_tools, unless a call is required: {error}")


def _answer(fields: ChatRequest) -> Schema | None:
    """What response_format wants."""
    answer = answer_schema(fields.response_format)
    check_schema_depth(answer, "response_format")
    return answer


def _check(tools: Sequence[Tool]) -> None:
    if len(tools) > MAX_TOOLS:
        refuse("tools", f"tools must have at most {MAX_TOOLS} entries, got {len(tools)}")
    for i, tool in enumerate(tools):
        if not _NAME.fullmatch(tool.function.name):
            param = f"tools[{i}].function.name"
            refuse(param, f"{param} must be 1 to 64 letters, digits or any of _ . -, got {tool.function.name[:64]!r}")
        check_schema_depth(tool.function.parameters, f"tools[{i}].function.parameters")
    if len({tool.function.name for tool in tools}) < len(tools):
        refuse("tools", "tools must have names that differ")


def _named(tools: Sequence[Tool], name: str) -> FunctionDefinition:
    found = [tool.function for tool in tools if tool.function.name == name]
    if not found:
        refuse("tool_choice", f"tool_choice names {name[:64]!r}, which is none of the tools")
    return found[0]


def _parameters(function: FunctionDefinition) -> Schema:
    return _NO_ARGUMENTS if function.parameters is None else {**_ANY_OBJECT, **function.parameters}


def _shown(choice: object) -> str:
    return repr(choice) if isinstance(choice, str) else "of a function"
