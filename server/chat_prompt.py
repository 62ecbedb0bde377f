"""From a conversation, its tools and its documents to the prompt's text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from cupy_engine.chat_template import ChatTemplate
from cupy_engine.frontend import FrontEnd

from .api_errors import refuse
from .call_form import CallForm
from .logprob_format import Json
from .protocol import ChatMessage, ContentPart, Tool, ToolCall
from .tool_prompt import introduce_tools, spell_out_calls

MAX_DOCUMENTS = 256
_RESERVED_TEMPLATE_KWARGS = {
    "messages",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
}


class TemplateFields(Protocol):
    """The fields of a request that concern its chat template."""

    add_generation_prompt: bool | None
    continue_final_message: bool | None
    chat_template_kwargs: dict[str, Any] | None
    documents: list[Json] | None


def render_chat(
    front_end: FrontEnd, messages: list[Json], tools: Sequence[Tool], fields: TemplateFields, form: CallForm
) -> str:
    """The prompt text of ``messages``, from :func:`messages_of`; ``form``: of calls, where the template knows of none.

    Raises:
        ApiError, InvalidRequestError: the options contradict each other, or the template refuses the messages.
    """
    continues = bool(fields.continue_final_message)
    if continues and fields.add_generation_prompt:
        refuse("continue_final_message", "continue_final_message excludes add_generation_prompt")
    if continues and messages[-1]["role"] != "assistant":
        refuse("continue_final_message", "continue_final_message needs a last message from the assistant")
    opens = not continues if fields.add_generation_prompt is None else fields.add_generation_prompt
    template = front_end.chat_template
    variables = template_kwargs_of(fields.chat_template_kwargs)
    if fields.documents:
        variables["documents"] = _documents(fields.documents, template)
    if template is None or template.takes("tools"):
        variables["tools"] = [_tool(tool) for tool in tools] or None
    else:
        messages = introduce_tools(messages, [_tool(tool) for tool in tools], form) if tools else messages
        messages = spell_out_calls(messages, form)
    return front_end.render_chat(messages, add_generation_prompt=opens, continue_final_message=continues, **variables)


def messages_of(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as a chat template takes them: text parts joined, ``developer`` said as ``system``.

    Raises:
        ApiError: no messages, or a message that is not text, a call that is none.
    """
    if not messages:
        refuse("messages", "messages is empty: give at least one message")
    return [_message(number, message) for number, message in enumerate(messages)]


def template_kwargs_of(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Raises ApiError for a name that the server sets itself."""
    for name in kwargs or {}:
        if name in _RESERVED_TEMPLATE_KWARGS or not name.isidentifier() or name.startswith("_"):
            param = "chat_template_kwargs." + name[:64]
            refuse(param, f"{param} cannot be set; it must be a variable of the model's chat template")
    return dict(kwargs or {})


def _documents(documents: list[Json], template: ChatTemplate | None) -> list[Json]:
    if len(documents) > MAX_DOCUMENTS:
        refuse("documents", f"documents must have at most {MAX_DOCUMENTS} entries, got {len(documents)}")
    if template is not None and not template.takes("documents"):
        refuse("documents", "documents are not supported by this model's chat template: put them into a message")
    return documents


def _tool(tool: Tool) -> Json:
    given: Json = msgspec.to_builtins(tool)
    given["function"] = {name: value for name, value in given["function"].items() if value is not None}
    return given


def _message(number: int, message: ChatMessage) -> Json:
    where = f"messages[{number}]"
    plain: Json = {"role": "system" if message.role == "developer" else message.role}
    plain["content"] = _content(f"{where}.content", message.content)
    if message.tool_calls:
        if message.role != "assistant":
            refuse(f"{where}.tool_calls", f"{where}.tool_calls belongs to messages of the assistant")
        plain["tool_calls"] = [_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(message.tool_calls)]
        plain["content"] = plain["content"] or ""
    if plain["content"] is None:
        refuse(f"{where}.content", f"{where}.content is required: give a text or a list of text parts")
    more = {"name": message.name, "tool_call_id": message.tool_call_id}
    return plain | {name: value for name, value in more.items() if value is not None}


def _content(param: str, content: str | list[ContentPart] | None) -> str | None:
    if not isinstance(content, list):
        return content
    for index, part in enumerate(content):
        if part.type != "text" or part.text is None:
            refuse(f"{param}[{index}].type", f"only parts of type text are supported, got {part.type[:32]!r}")
    return "".join(part.text or "" for part in content)


def _call(where: str, call: ToolCall) -> Json:
    """A call as templates take it: with its arguments as an object."""
    param = f"{where}.function.arguments"
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        refuse(param, f"{param} must be the text of a JSON object, got {call.function.arguments[:64]!r}")
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id or "", "type": "function", "function": function}
