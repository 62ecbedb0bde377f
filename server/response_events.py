"""Answers of the Responses API: items that grow, events that tell of it, and the response that they make.

response.created, .in_progress
response.output_item.added ─ .content_part.added ─ .output_text.delta … .done ─ .content_part.done ─ .output_item.done
response.output_item.added ─ .function_call_arguments.delta … .done ─ .output_item.done
response.completed, or .incomplete
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import msgspec

from cupy_engine.outputs import RequestOutput

from .generation import Generation, PromptDelta
from .logprob_format import Json
from .response_protocol import ResponseRequest
from .responses import AnswerOptions, Envelope, usage


class ResponseEvents:
    """The chunks of a streamed response; also what a whole one is made by, in one go."""

    def __init__(self, envelope: Envelope, fields: ResponseRequest, options: AnswerOptions) -> None:
        self._envelope = envelope
        self._fields = fields
        self._reader = options.new_reader()
        self._output: list[Json] = []
        self._is_open = False  # the last item of the output
        self._events: list[Json] = []
        self._num_events = 0

    def of(self, arrived: PromptDelta, generation: Generation) -> list[Json]:
        delta = arrived.delta
        if self._num_events == 0:
            for name in ("created", "in_progress"):
                self._tell(f"response.{name}", response=self._response("in_progress", None))
        self._grow(delta.text, is_last=delta.finish_reason is not None)
        if delta.finish_reason is not None:
            response = self._finished(generation.result(0), delta.finish_reason)
            self._tell(f"response.{response['status']}", response=response)
        events, self._events = self._events, []
        return events

    def usage(self, results: Sequence[RequestOutput]) -> Json | None:
        return None  # it is part of the response

    def whole(self, result: RequestOutput) -> Json:
        """The response that a finished result makes."""
        self._grow(result.text, is_last=True)
        return self._finished(result, result.finish_reason)

    def _grow(self, text: str, *, is_last: bool) -> None:
        calls: list[Json] = []
        if self._reader is not None:
            text, calls = self._reader.read(text, is_last=is_last)
        if text:
            self._add_text(text)
        for call in calls:
            self._add_to_call(call)

    def _add_text(self, text: str) -> None:
        if not self._is_open or self._output[-1]["type"] != "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._open({"id": _new_id("msg"), "type": "message", "role": "assistant", "content": []})
            self._output[-1]["content"].append(part)
            self._tell("response.content_part.added", **self._place(), content_index=0, part=dict(part))
        self._output[-1]["content"][0]["text"] += text
        self._tell("response.output_text.delta", **self._place(), content_index=0, delta=text, logprobs=[])

    def _add_to_call(self, call: Json) -> None:
        function = call["function"]
        if "name" in function:
            item = {"id": _new_id("fc"), "type": "function_call", "call_id": call["id"], "name": function["name"]}
            self._open({**item, "arguments": ""})
        if function["arguments"]:
            self._output[-1]["arguments"] += function["arguments"]
            self._tell("response.function_call_arguments.delta", **self._place(), delta=function["arguments"])

    def _open(self, item: Json) -> None:
        self._close("completed")
        self._output.append({**item, "status": "in_progress"})
        self._is_open = True
        added = {**self._output[-1]} | ({"content": []} if item["type"] == "message" else {})
        self._tell("response.output_item.added", output_index=len(self._output) - 1, item=added)

    def _close(self, status: str) -> None:
        if not self._is_open:
            return
        self._is_open = False
        item = self._output[-1]
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            self._tell("response.output_text.done", **self._place(), content_index=0, text=part["text"], logprobs=[])
            self._tell("response.content_part.done", **self._place(), content_index=0, part=part)
        else:
            told = {"name": item["name"], "arguments": item["arguments"]}
            self._tell("response.function_call_arguments.done", **self._place(), **told)
        self._tell("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _finished(self, result: RequestOutput, reason: str | None) -> Json:
        status = "completed" if reason == "stop" else "incomplete"
        if not self._output:
            self._add_text("")
        self._close(status)
        response = self._response(status, _usage(result))
        if status == "incomplete":
            why = "max_output_tokens" if reason == "length" else "aborted"
            response["incomplete_details"] = {"reason": why}
        return response

    def _tell(self, kind: str, **more: object) -> None:
        self._events.append({"type": kind, "sequence_number": self._num_events, **more})
        self._num_events += 1

    def _place(self) -> Json:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _response(self, status: str, tokens: Json | None) -> Json:
        given: Json = msgspec.to_builtins(self._fields)
        named = ("instructions", "max_output_tokens", "metadata", "user", "reasoning")
        return {
            "id": self._envelope.id,
            "object": "response",
            "created_at": self._envelope.created,
            "model": self._envelope.model,
            "status": status,
            "output": list(self._output),
            "usage": tokens,
            "error": None,
            "incomplete_details": None,
            **{name: given[name] for name in named},
            "temperature": _or(given["temperature"], 1.0),
            "top_p": _or(given["top_p"], 1.0),
            "tools": given["tools"] or [],
            "tool_choice": given["tool_choice"] or "auto",
            "parallel_tool_calls": _or(given["parallel_tool_calls"], True),
            "text": given["text"] or {"format": {"type": "text"}},
            "truncation": "disabled",
            "previous_response_id": None,
            "background": False,
            "store": False,
        }


def _usage(result: RequestOutput) -> Json:
    counts = usage([result])
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": counts["prompt_tokens_details"],
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counts["total_tokens"],
    }


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _or(value: object, default: object) -> object:
    return default if value is None else value
