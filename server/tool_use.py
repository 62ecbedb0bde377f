"""What a request's tools mean: how the answer is constrained, and how it is read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cupy_engine.structured_outputs import JSON_OPTIONS, StructuredOutputs, check_schema_depth

from .api_errors import refuse
from .protocol import ChatRequest, FunctionDefinition, NamedToolChoice, Tool
from .tool_formats import new_parser
from .tool_parsing import ArgumentsParser
from .tool_pieces import ToolParser

MAX_TOOLS = 128
MAX_CALLS = 16  # in one answer
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request and how they may be used.

    ``forced``: the function that must be called, if the request names one. ``is_required``: some function must be.
    ``family``: how the model writes calls of its own accord.
    """

    tools: Sequence[Tool]
    family: str
    forced: FunctionDefinition | None = None
    is_required: bool = False
    max_calls: int = MAX_CALLS

    @property
    def form(self) -> StructuredOutputs | None:
        """The form of an answer that must have calls: arguments alone, or a list of calls."""
        if self.forced is not None:
            return StructuredOutputs(json=_parameters(self.forced), param="tools")
        return StructuredOutputs(grammar=self._grammar(), param="tools") if self.is_required else None

    def parser(self) -> ToolParser:
        """For one answer."""
        if self.forced is not None:
            return ArgumentsParser(self.forced.name)
        tools = {tool.function.name: tool.function.parameters or {} for tool in self.tools}
        return new_parser("json" if self.is_required else self.family, tools, self.max_calls)

    def _grammar(self) -> str:
        """``[call, call, ...]``, where each schema stands by itself, so that its references hold."""
        functions = [tool.function for tool in self.tools]
        more = f'(", " call){{0,{self.max_calls - 1}}} ' if self.max_calls > 1 else ""
        rules = [
            "%llguidance {}",
            f'start: "[" call {more}"]"',
            "call: " + " | ".join(f"call_{i}" for i in range(len(functions))),
        ]
        for i, function in enumerate(functions):
            opening = json.dumps(f'{{"name": {json.dumps(function.name)}, "arguments": ')
            schema = json.dumps({**_parameters(function), "x-guidance": JSON_OPTIONS})
            rules.append(f'call_{i}: {opening} arguments_{i} "}}"\narguments_{i}: %json {schema}')
        return "\n".join(rules)


def tool_use(fields: ChatRequest, family: str) -> ToolUse | None:
    """``None`` if the request has no tools or wants no calls.

    Raises:
        ApiError: a contradiction, or a tool that cannot be; names the field.
    """
    tools, choice = fields.tools or [], fields.tool_choice
    _check(tools)
    if not tools and choice not in (None, "none", "auto"):
        refuse("tool_choice", f"tool_choice {_shown(choice)} needs tools")
    if not tools or choice == "none":
        return None
    if fields.response_format is not None and fields.response_format.type != "text":
        refuse("response_format", "response_format cannot go with tools: set tool_choice to none, or leave one out")
    forced = _named(tools, choice.function.name) if isinstance(choice, NamedToolChoice) else None
    max_calls = 1 if fields.parallel_tool_calls is False else MAX_CALLS
    return ToolUse(tools, family, forced, choice == "required", max_calls)


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


def _parameters(function: FunctionDefinition) -> dict[str, Any]:
    return {**_ANY_OBJECT, **(function.parameters or {})}


def _shown(choice: object) -> str:
    return repr(choice) if isinstance(choice, str) else "of a function"
