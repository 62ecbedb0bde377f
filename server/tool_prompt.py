"""Conversations with tools, for chat templates that know of none: told in words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .call_form import CallForm

Message = dict[str, Any]

_INTRODUCTION = """You may call functions to help with the user's request. Here they are, one JSON object a line:
<tools>
{tools}
</tools>
To call one, answer with its name and arguments, written like this:
{example}"""
_EXAMPLE = ("function_name", {"argument": "value"})


def introduce_tools(messages: Sequence[Message], tools: Sequence[Message], form: CallForm) -> list[Message]:
    """The messages with the tools described in the system message."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    words = _INTRODUCTION.format(tools=lines, example=form.write([_EXAMPLE]))
    first, rest = messages[0], list(messages[1:])
    if first["role"] != "system":
        return [{"role": "system", "content": words}, first, *rest]
    return [{**first, "content": f"{first['content']}\n\n{words}"}, *rest]


def spell_out_calls(messages: Sequence[Message], form: CallForm) -> list[Message]:
    """The messages with calls and their results as text."""
    return [_spelled_out(message, form) for message in messages]


def _spelled_out(message: Message, form: CallForm) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    calls = form.write([(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]])
    return {"role": message["role"], "content": "\n".join(filter(None, (message["content"], calls)))}
