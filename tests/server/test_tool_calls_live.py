"""Calls in a family's form whose mark is a special token, live: the ``openai`` client, a model of random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from live_server import LiveServer
from openai.types.chat.chat_completion import Choice
from tiny_twin import make_tiny_twin

from cupy_engine.model_source import ModelFiles

MARK_ID, BRACE_ID = 4, 107
HI = [{"role": "user", "content": "Hi"}]
ROOM = {
    "type": "object",
    "properties": {"room": {"enum": ["kitchen", "bath"]}, "level": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["room", "level"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "light", "parameters": ROOM, "strict": True}}]
ANSWER = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER}}
CALLS, SPEAKS, ANSWERS = {MARK_ID: 100}, {MARK_ID: -100}, {BRACE_ID: 100}


@pytest.fixture(scope="module")
def client(default_model: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = make_tiny_twin(tmp_path_factory.mktemp("granite"), default_model)
    give_mark(folder / "tokenizer.json", "<|tool_call|>")
    options = ["--load-format", "dummy", "--tool-call-parser", "granite", "--max-model-len", "512", "--workers", "1"]
    with (
        LiveServer.serve(str(folder), *options, "--kv-cache-memory-bytes", str(1 << 26)) as live,
        openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def give_mark(file: Path, mark: str) -> None:
    """Let a special token that nobody uses be another one."""
    tokenizer = json.loads(file.read_text())
    (token,) = [token for token in tokenizer["added_tokens"] if token["id"] == MARK_ID]
    tokenizer["model"]["vocab"][mark] = tokenizer["model"]["vocab"].pop(token["content"])
    token["content"] = mark
    file.write_text(json.dumps(tokenizer))


def ask(client: openai.OpenAI, *, streams: bool, **fields: Any) -> list[Choice]:
    request = {
        "messages": HI,
        "tools": TOOLS,
        "parallel_tool_calls": False,
        "temperature": 1,
        "seed": 7,
        "n": 3,
        **fields,
    }
    model = client.models.list().data[0].id
    if not streams:
        return client.chat.completions.create(model=model, **request).choices
    with client.chat.completions.stream(model=model, **request) as stream:
        return list(stream.get_final_completion().choices)


def calls_of(choice: Choice) -> list[dict[str, Any]]:
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    calls = choice.message.tool_calls or []
    assert {call.function.name for call in calls} == {"light"}
    arguments = [json.loads(call.function.arguments) for call in calls]
    for each in arguments:
        jsonschema.validate(each, ROOM)
    return arguments


@pytest.mark.parametrize("streams", [False, True])
def test_a_strict_call_in_free_text(client: openai.OpenAI, streams: bool) -> None:
    called = [calls_of(choice) for choice in ask(client, streams=streams, logit_bias=CALLS)]
    assert [len(calls) for calls in called] == [1, 1, 1]
    assert len({json.dumps(calls) for calls in called}) > 1, "seeds differ"


def test_several_strict_calls(client: openai.OpenAI) -> None:
    choices = ask(client, streams=False, logit_bias=CALLS, parallel_tool_calls=True, max_tokens=300, n=8)
    called = [calls_of(choice) for choice in choices if choice.finish_reason != "length"]
    assert max(map(len, called)) > 1


def test_free_text_without_a_call(client: openai.OpenAI) -> None:
    for choice in ask(client, streams=False, logit_bias=SPEAKS, max_tokens=20):
        assert choice.finish_reason in ("length", "stop")
        assert choice.message.content
        assert choice.message.tool_calls is None


@pytest.mark.parametrize("streams", [False, True])
def test_calls_or_an_answer_in_a_format(client: openai.OpenAI, streams: bool) -> None:
    for choice in ask(client, streams=streams, logit_bias=CALLS, response_format=FORMAT):
        calls_of(choice)
    for choice in ask(client, streams=streams, logit_bias=ANSWERS, response_format=FORMAT):
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), ANSWER)
        assert not choice.message.tool_calls


LIGHT = {"type": "function", "function": {"name": "light"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [LIGHT]}}


@pytest.mark.parametrize("choice", ["required", LIGHT, ALLOWED], ids=str)
def test_calls_that_must_be(client: openai.OpenAI, choice: Any) -> None:
    for streams in (False, True):
        for found in ask(client, streams=streams, tool_choice=choice, response_format=FORMAT):
            calls_of(found)
