"""A Responses request in the words of a chat, and a chat's errors in the words of a Responses request."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import msgspec

from cupy_engine.errors import InvalidRequestError

from .api_errors import ApiError, refuse, to_api_error
from .protocol import (
    AllowedToolChoice,
    AllowedTools,
    CalledFunction,
    ChatMessage,
    ChatRequest,
    ContentPart,
    FunctionDefinition,
    FunctionName,
    JsonSchemaFormat,
    NamedToolChoice,
    ResponseFormat,
    Tool,
    ToolCall,
    ToolChoice,
)
from .response_protocol import (
    InputItem,
    ResponseAllowedTools,
    ResponseRequest,
    ResponseTool,
    ResponseToolChoice,
    TextOptions,
)

_SAME_NAMES = frozenset(ResponseRequest.__struct_fields__) & frozenset(ChatRequest.__struct_fields__)
_OTHER_NAMES = (  # patterns of a chat's names and what a Responses request calls them
    (r"\bmessages(\[\d+\])?(\.(content|tool_calls)(\[\d+\])?(\.\w+)*)?", "input"),
    (r"\bmax_completion_tokens\b", "max_output_tokens"),
    (r"\bresponse_format(\.json_schema)?\b", "text.format"),
    (r"\b(tools\[\d+\])\.function\b", r"\1"),
)


def as_chat(fields: ResponseRequest) -> ChatRequest:
    """Raises ApiError for what a chat cannot say."""
    same = {name: getattr(fields, name) for name in _SAME_NAMES - {"tools", "tool_choice"}}
    return ChatRequest(
        **same,
        messages=_messages(fields),
        max_completion_tokens=fields.max_output_tokens,
        tools=None if fields.tools is None else [_tool(tool) for tool in fields.tools],
        tool_choice=_tool_choice(fields.tool_choice),
        response_format=_response_format(fields.text),
    )


@contextlib.contextmanager
def errors_renamed() -> Iterator[None]:
    """Let errors name the fields of a Responses request."""
    try:
        yield
    except (InvalidRequestError, ApiError) as error:
        named = to_api_error(error)
        named.param = None if named.param is None else _renamed(named.param)
        named.args = (_renamed(str(named)),)
        raise named from None


def _renamed(text: str) -> str:
    for pattern, name in _OTHER_NAMES:
        text = re.sub(pattern, name, text)
    return text


def _messages(fields: ResponseRequest) -> list[ChatMessage]:
    messages = [] if fields.instructions is None else [ChatMessage(role="system", content=fields.instructions)]
    if isinstance(fields.input, str):
        return [*messages, ChatMessage(role="user", content=fields.input)]
    for number, item in enumerate(fields.input):
        _add(item, f"input[{number}]", messages)
    return messages


def _add(item: InputItem, where: str, messages: list[ChatMessage]) -> None:
    match item.type:
        case "message":
            role = item.role
            if role is None:
                refuse(f"{where}.role", f"{where}.role is required")
            messages.append(ChatMessage(role=role, content=_parts(item.content)))
        case "function_call":
            _add_call(item, where, messages)
        case "function_call_output":
            if item.output is None:
                refuse(f"{where}.output", f"{where}.output is required")
            messages.append(ChatMessage(role="tool", content=_parts(item.output), tool_call_id=item.call_id))


def _add_call(item: InputItem, where: str, messages: list[ChatMessage]) -> None:
    """Calls in a row belong to one message."""
    if item.name is None:
        refuse(f"{where}.name", f"{where}.name is required")
    call = ToolCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments or ""))
    if not messages or messages[-1].role != "assistant":
        messages.append(ChatMessage(role="assistant"))
    messages[-1].tool_calls = [*(messages[-1].tool_calls or ()), call]


def _parts(content: str | list[ContentPart] | None) -> str | list[ContentPart] | None:
    if not isinstance(content, list):
        return content
    texts = ("input_text", "output_text")
    return [msgspec.structs.replace(part, type="text") if part.type in texts else part for part in content]


def _tool(tool: ResponseTool) -> Tool:
    given = {name: getattr(tool, name) for name in FunctionDefinition.__struct_fields__}
    return Tool(type="function", function=FunctionDefinition(**given))


def _tool_choice(choice: str | ResponseToolChoice | ResponseAllowedTools | None) -> ToolChoice | None:
    match choice:
        case ResponseToolChoice(name=name):
            return NamedToolChoice(function=FunctionName(name=name))
        case ResponseAllowedTools(mode=mode, tools=tools):
            named = [NamedToolChoice(function=FunctionName(name=tool.name)) for tool in tools]
            return AllowedToolChoice(allowed_tools=AllowedTools(mode=mode, tools=named))
    return choice  # type: ignore[return-value]


def _response_format(text: TextOptions | None) -> ResponseFormat | None:
    if text is None or text.format is None:
        return None
    wanted = text.format
    schema = JsonSchemaFormat(schema=wanted.schema) if wanted.type == "json_schema" else None
    return ResponseFormat(type=wanted.type, json_schema=schema)
