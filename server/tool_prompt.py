"""Conversations with tools, for chat templates that know of none: told in words, in the most common family's format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]

_INTRODUCTION = """You may call functions to help with the user's request. Here they are, one JSON object a line:
<tools>
{tools}
</tools>
To call one, answer with a JSON object of its name and arguments between marks, like this:
<tool_call>
{{"name": "function_name", "arguments": {{"argument": "value"}}}}
</tool_call>"""


def introduce_tools(messages: Sequence[Message], tools: Sequence[Message]) -> list[Message]:
    """The messages with the tools described in the system message."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    words = _INTRODUCTION.format(tools=lines)
    first, rest = messages[0], list(messages[1:])
    if first["role"] != "system":
        return [{"role": "system", "content": words}, first, *rest]
    return [{**first, "content": f"{first['content']}\n\n{words}"}, *rest]


def spell_out_calls(messages: Sequence[Message]) -> list[Message]:
    """The messages with calls and their results as text."""
    return [_spelled_out(message) for message in messages]


def _spelled_out(message: Message) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
    texts = [message["content"] or "", *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]
    return {"role": message["role"], "content": "\n".join(filter(None, texts))}
