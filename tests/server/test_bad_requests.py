"""Whatever is wrong with a request, the answer is a 4xx in OpenAI's shape that names the field."""

from __future__ import annotations

import json
import re

import pytest
from api_client import Api, MakeApi
from fake_engine import fails

from cupy_engine.config import EngineConfig
from cupy_engine.tokenizer import Tokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]


def tool(name: str, parameters: object = None) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def error_of(response) -> dict[str, object]:
    body = response.get_json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


FORCED = {"type": "function", "function": {"name": "f"}}
DEEP: object = {}
for _ in range(70):
    DEEP = {"items": DEEP}

BAD_COMPLETIONS = {
    "temperature-negative": ({"temperature": -0.1}, "temperature", "between 0 and 100"),
    "temperature-text": ({"temperature": "hot"}, "temperature", "'hot'"),
    "temperature-bool": ({"temperature": True}, "temperature", "expected float"),
    "top_p-zero": ({"top_p": 0}, "top_p", "above 0"),
    "top_p-large": ({"top_p": 1.5}, "top_p", "1.5"),
    "top_k": ({"top_k": -2}, "top_k", "at least -1"),
    "min_p": ({"min_p": 2}, "min_p", "between 0 and 1"),
    "max_tokens-zero": ({"max_tokens": 0}, "max_tokens", "at least 1"),
    "max_tokens-float": ({"max_tokens": 1.5}, "max_tokens", "expected int"),
    "max_tokens-huge": ({"max_tokens": 10**30}, "max_tokens", ""),
    "min_tokens": ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "at most max_tokens = 4"),
    "n-zero": ({"n": 0}, "n", "between 1 and 16"),
    "n-large": ({"n": 17}, "n", "at most 16, got 17"),
    "n-null-ok-but-list": ({"n": [1]}, "n", "expected int"),
    "best_of-small": ({"n": 3, "best_of": 2}, "best_of", "at least n = 3"),
    "best_of-stream": ({"best_of": 2, "stream": True}, "best_of", "with stream"),
    "logprobs-large": ({"logprobs": 21}, "logprobs", "at most 20"),
    "logprobs-bool": ({"logprobs": True}, "logprobs", "expected int"),
    "prompt_logprobs-stream": ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
    "presence_penalty": ({"presence_penalty": 2.1}, "presence_penalty", "between -2 and 2"),
    "frequency_penalty": ({"frequency_penalty": -9}, "frequency_penalty", "between -2 and 2"),
    "repetition_penalty": ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
    "logit_bias-key": ({"logit_bias": {"x": 1}}, "logit_bias", "int"),
    "logit_bias-value": ({"logit_bias": {"5": 101}}, "logit_bias", "between -100 and 100"),
    "logit_bias-id": ({"logit_bias": {"999999": 1}}, "logit_bias", "0 to 49151"),
    "logit_bias-many": ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
    "stop-many": ({"stop": ["x"] * 17}, "stop", "at most 16"),
    "stop-empty": ({"stop": ""}, "stop", "non-empty"),
    "stop-long": ({"stop": "x" * 257}, "stop", "256"),
    "stop-number": ({"stop": 5}, "stop", "got 5"),
    "stop-item": ({"stop": ["a", 5]}, "stop[1]", "got 5"),
    "bad_words-many": ({"bad_words": ["x"] * 129}, "bad_words", "at most 128"),
    "stop_token_ids": ({"stop_token_ids": [-1]}, "stop_token_ids", ""),
    "allowed_token_ids-empty": ({"allowed_token_ids": []}, "allowed_token_ids", ""),
    "allowed_token_ids-id": ({"allowed_token_ids": [49152]}, "allowed_token_ids", "0 to 49151"),
    "truncate_prompt_tokens": ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1"),
    "seed": ({"seed": 2**63}, "seed", ""),
    "stream-text": ({"stream": "yes"}, "stream", "expected bool"),
    "stream_options": ({"stream_options": {"include_usage": True}}, "stream_options", "only with stream"),
    "priority": ({"priority": 1}, "priority", "fcfs"),
    "timeout_s-zero": ({"timeout_s": 0}, "timeout_s", "above 0"),
    "timeout_s-long": ({"timeout_s": 601}, "timeout_s", "at most 600"),
    "request_id": ({"request_id": "a b"}, "request_id", "letters"),
    "prompt-missing": ({"prompt": ...}, "prompt", "required"),
    "prompt-null": ({"prompt": None}, "prompt", "None"),
    "prompt-number": ({"prompt": 5}, "prompt", "got 5"),
    "prompt-empty": ({"prompt": ""}, "prompt", "empty"),
    "prompt-empty-list": ({"prompt": []}, "prompt", "empty"),
    "prompt-empty-ids": ({"prompt": [[]]}, "prompt", "empty"),
    "prompt-mixed": ({"prompt": ["a", 1]}, "prompt", "mixes"),
    "prompt-nested": ({"prompt": [["a"]]}, "prompt[0][0]", "'a'"),
    "prompt-id": ({"prompt": [1, 49152]}, "prompt", "0 to 49151"),
    "prompt-negative-id": ({"prompt": [[-1]]}, "prompt", "0 to 49151"),
    "prompt-many": ({"prompt": ["x"] * 257}, "prompt", "at most 256"),
    "prompt-long": ({"prompt": [1] * 8192}, "prompt", "8192"),
    "suffix": ({"suffix": "end"}, "suffix", "not supported"),
    "response_format": ({"response_format": {"type": "xml"}}, "response_format.type", "'xml'"),
    "json_schema-missing": ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
    "json_schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
        "required",
    ),
    "guided_json": ({"guided_json": {"items": DEEP}}, "guided_json", "at most 64 deep"),
    "guided_json-text": ({"guided_json": "{"}, "guided_json", "not valid JSON"),
    "guided_json-type": ({"guided_json": 5}, "guided_json", "got 5"),
    "guided_choice": ({"guided_choice": []}, "guided_choice", "1 to 1024 choices"),
    "guided_grammar": ({"guided_grammar": "x"}, "guided_grammar", "neither in Lark's nor in GBNF's syntax"),
    "structured_outputs": ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
    "two forms": ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "cannot go with guided_regex"),
    "form-ignore_eos": ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "false with guided_regex"),
}


@pytest.mark.parametrize(("fields", "param", "words"), BAD_COMPLETIONS.values(), ids=BAD_COMPLETIONS)
def test_completions(api: Api, fields: dict[str, object], param: str, words: str) -> None:
    body = {"prompt": "Hello", **fields}
    response = api.post(COMPLETIONS, {name: value for name, value in body.items() if value is not ...})
    error = error_of(response)
    assert response.status_code == 400
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert words in str(error["message"])
    assert len(str(error["message"])) < 400
    assert not api.engine.requests, "nothing reached the engine"


BAD_CHATS = {
    "messages-missing": ({"messages": ...}, "messages", "required"),
    "messages-empty": ({"messages": []}, "messages", "empty"),
    "messages-text": ({"messages": "Hi"}, "messages", "'Hi'"),
    "role": ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages[0].role", "wizard"),
    "role-missing": ({"messages": [{"content": "Hi"}]}, "messages[0].role", "required"),
    "content-missing": ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
    "content-number": ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "got 5"),
    "content-image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "messages[0].content[0].type",
        "image_url",
    ),
    "max_completion_tokens": ({"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
    "max-contradiction": ({"max_completion_tokens": 5, "max_tokens": 6}, "max_completion_tokens", "contradicts"),
    "top_logprobs-alone": ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
    "top_logprobs-large": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
    "logprobs-number": ({"logprobs": 3}, "logprobs", "expected bool"),
    "tools-type": ({"tools": [{"type": "web"}]}, "tools[0].type", "'web'"),
    "tools-name": ({"tools": [tool("a b")]}, "tools[0].function.name", "letters, digits"),
    "tools-twice": ({"tools": [tool("f"), tool("f")]}, "tools", "differ"),
    "tools-many": ({"tools": [tool(f"f{i}") for i in range(129)]}, "tools", "at most 128"),
    "tools-schema": ({"tools": [tool("f", 5)]}, "tools[0].function.parameters", "got 5"),
    "tools-deep": ({"tools": [tool("f", {"items": DEEP})]}, "tools[0].function.parameters", "at most 64 deep"),
    "tools-and-form": (
        {"tools": [tool("f")], "response_format": {"type": "json_schema"}},
        "response_format.json_schema",
        "required",
    ),
    "tools-and-deep-form": (
        {"tools": [tool("f")], "response_format": {"type": "json_schema", "json_schema": {"schema": {"items": DEEP}}}},
        "response_format",
        "at most 64 deep",
    ),
    "tools-and-guide": (
        {"tools": [tool("f")], "tool_choice": "required", "guided_regex": "a"},
        "guided_regex",
        "tools whose calls follow a schema",
    ),
    "tool_choice-alone": ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    "tool_choice-word": ({"tools": [tool("f")], "tool_choice": "maybe"}, "tool_choice", "maybe"),
    "tool_choice-other": ({"tools": [tool("g")], "tool_choice": FORCED}, "tool_choice", "'f', which is none"),
    "allowed_tools-none": (
        {
            "tools": [tool("f")],
            "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
        },
        "tool_choice.allowed_tools.tools",
        "empty",
    ),
    "allowed_tools-other": (
        {
            "tools": [tool("g")],
            "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [FORCED]}},
        },
        "tool_choice",
        "'f', which is none",
    ),
    "tool_choice-type": ({"tools": [tool("f")], "tool_choice": {"type": "custom"}}, "tool_choice.type", "custom"),
    "call-arguments": (
        {"messages": [*HI, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}]},
        "messages[1].tool_calls[0].function.arguments",
        "JSON object",
    ),
    "call-role": (
        {"messages": [{"role": "user", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]},
        "messages[0].tool_calls",
        "assistant",
    ),
    "tool-content": ({"messages": [{"role": "tool", "tool_call_id": "x"}]}, "messages[0].content", "required"),
    "functions": ({"functions": [{"name": "f"}]}, "functions", "not supported"),
    "json_schema": (
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        "response_format.json_schema.schema",
        "",
    ),
    "documents": ({"documents": [{"text": "x"}]}, "documents", "not supported"),
    "chat_template": ({"chat_template": "{{ 1 }}"}, "chat_template", "not supported"),
    "kwargs-reserved": ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "cannot be set"),
    "continue-and-open": (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "excludes",
    ),
    "continue-user": ({"continue_final_message": True}, "continue_final_message", "assistant"),
    "metadata": ({"metadata": {"a": 1}}, "metadata[...]", "expected str"),
    "too-long": ({"messages": [{"role": "user", "content": "word " * 9000}]}, "messages", "8192"),
}


@pytest.mark.parametrize(("fields", "param", "words"), BAD_CHATS.values(), ids=BAD_CHATS)
def test_chat(api: Api, fields: dict[str, object], param: str, words: str) -> None:
    body = {"messages": HI, **fields}
    response = api.post(CHAT, {name: value for name, value in body.items() if value is not ...})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param)
    assert words in str(error["message"])
    assert not api.engine.requests


ROOM = {  # the field that asks for tokens, path, body
    "completions": ("max_tokens", COMPLETIONS, {"prompt": [[5], [5, 6, 7]]}),
    "chat": ("max_tokens", CHAT, {"messages": HI, "max_tokens": 8192}),
    "chat by its newer name": ("max_completion_tokens", CHAT, {"messages": HI}),
    "responses": ("max_output_tokens", "/v1/responses", {"input": "Hi"}),
}


@pytest.mark.parametrize("name", ROOM)
def test_more_tokens_than_there_is_room_for(api: Api, name: str) -> None:
    """The error says how many there is room for, and that many are taken."""
    field, path, body = ROOM[name]
    response = api.post(path, {**body, field: 8192})
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (400, field, "context_length_exceeded")
    told = re.fullmatch(
        rf"{field} = 8192 after a prompt of (\d+) tokens is more than the context of 8192: "
        rf"ask for at most (\d+), shorten the prompt, or leave {field} out",
        str(error["message"]),
    )
    assert told is not None
    num_prompt, room = map(int, told.groups())
    assert num_prompt + room == 8192
    assert api.post(path, {**body, field: room + 1}).status_code == 400
    assert not api.engine.requests
    assert api.post(path, {**body, field: room}).status_code == 200
    assert max(len(each.prompt_token_ids) for each in api.engine.requests) == num_prompt


def test_what_was_not_asked_for_needs_no_room(api: Api) -> None:
    prompt = [5] * 8190
    assert api.complete(prompt=prompt).status_code == 200
    assert api.complete(prompt=prompt, max_tokens=2).status_code == 200
    assert error_of(api.complete(prompt=prompt, max_tokens=3))["param"] == "max_tokens"
    assert api.complete(prompt=prompt, max_tokens=8000, truncate_prompt_tokens=192).status_code == 200


def test_too_long_has_its_own_code(api: Api) -> None:
    assert error_of(api.complete(prompt="word " * 9000))["code"] == "context_length_exceeded"
    assert error_of(api.complete(prompt=""))["code"] == "invalid_value"


def test_a_text_that_cannot_fit_is_not_even_tokenized(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizing 4 MB takes up to 1.5 GB of memory."""
    monkeypatch.setattr(Tokenizer, "encode", lambda *_: pytest.fail("it is tokenized"))
    error = error_of(api.complete(prompt="1" * 4_000_000))
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert "4000000 characters" in error["message"]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'"text"',
        b"null",
        b'{"prompt": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": 1e400}',
        b'{"prompt": "x",}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\udc00 x"}',
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"x": ' + b'{"x":' * 5000 + b"1" + b"}" * 5001,
        b'{"prompt": "x"} trailing',
        b"\x00\x01\x02",
    ],
)
def test_broken_json(api: Api, payload: bytes) -> None:
    response = api.http.post(COMPLETIONS, data=payload, content_type="application/json")
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


def test_shallow_errors_show_no_more_than_a_glimpse_of_the_value(api: Api) -> None:
    message = str(error_of(api.complete(temperature="x" * 10_000))["message"])
    assert len(message) < 200


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_content_type(api: Api, content_type: str) -> None:
    response = api.http.post(COMPLETIONS, data=b'{"prompt": "x"}', content_type=content_type)
    assert response.status_code == 415
    assert content_type in str(error_of(response)["message"])


def test_no_content_type_is_json(api: Api) -> None:
    assert api.http.post(COMPLETIONS, data=b'{"prompt": "x"}').status_code == 200


def test_body_limit(make_api: MakeApi) -> None:
    api = make_api(max_body_bytes=1000)
    response = api.complete(prompt="x" * 1000)
    assert response.status_code == 413
    assert "1000 bytes" in str(error_of(response)["message"])
    assert api.complete(prompt="x" * 900).status_code == 200


def test_wrong_model(api: Api) -> None:
    response = api.complete(model="gpt-4")
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "smollm2-135m" in str(error["message"])
    assert api.complete(model="smollm2-135m").status_code == 200


def test_wrong_path_and_method(api: Api) -> None:
    missing = api.http.get("/v1/nothing/here")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "not_found")
    wrong = api.http.get(COMPLETIONS)
    assert (wrong.status_code, error_of(wrong)["code"]) == (405, "method_not_allowed")
    assert "POST" in wrong.headers["Allow"]


def test_unknown_fields_are_named(api: Api, make_api: MakeApi) -> None:
    response = api.complete(foo=1, **{"evil\r\nX: y": 2})
    assert response.status_code == 200
    assert response.headers["Warning"] == '299 cupy-engine "unknown fields ignored: evil??X??y, foo"'
    refused = make_api(strict=True).complete(foo=1)
    assert (refused.status_code, error_of(refused)["param"]) == (400, "foo")


@pytest.mark.parametrize(
    "fields",
    [
        {"suffix": None},
        {"suffix": ""},
        {"response_format": {"type": "text"}},
        {"guided_json": None},
        {"guided_json": {"type": "object"}},
        {"guided_grammar": 'root ::= "x"'},
        {"structured_outputs": {"regex": "a+", "whatever": 1}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {}}}},
        {"n": None, "temperature": None, "stop": None, "logit_bias": None, "stream": None, "max_tokens": None},
    ],
)
def test_meaningless_values_are_fine(api: Api, fields: dict[str, object]) -> None:
    response = api.complete(**fields)
    assert response.status_code == 200
    assert "Warning" not in response.headers


def test_tools_that_may_not_be_called_are_fine(api: Api) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert api.chat(tools=tools, tool_choice="none").status_code == 200


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("queue_full", 429, "queue_full"),
        ("deadline", 504, "deadline_exceeded"),
        ("dead", 503, "engine_unavailable"),
        ("invalid", 400, "invalid_value"),
        ("internal", 500, "engine_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_engine_errors_have_their_status(make_api: MakeApi, kind: str, status: int, code: str, stream: bool) -> None:
    api = make_api(fails(kind))
    response = api.complete(stream=stream)
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert ("Retry-After" in response.headers) == (status in (429, 503))
    assert api.engine.aborted == [api.engine.requests[0].request_id], "nothing is left behind"


def test_engine_not_ready(api: Api) -> None:
    api.engine.fake_state = "loading"
    response = api.complete()
    assert response.status_code == 503
    assert "loading" in str(error_of(response)["message"])


def test_unexpected_errors_say_nothing(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    def explode(request: object) -> None:
        raise RuntimeError("secret /path/to 0x7f00")

    api.engine.script = explode
    response = api.complete()
    assert response.status_code == 500
    assert "secret" not in response.get_data(as_text=True)
    assert "secret" in caplog.text


def test_server_limits_can_be_lower(make_api: MakeApi) -> None:
    api = make_api(max_n=2, max_logprobs=1, max_prompts=1, max_stop_strings=1, max_stop_string_chars=3)
    for fields, param in [
        ({"n": 3}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 2}, "logprobs"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"stop": ["a", "b"]}, "stop"),
        ({"stop": "abcd"}, "stop"),
    ]:
        assert error_of(api.complete(**fields))["param"] == param


def test_priority_needs_its_policy(make_api: MakeApi) -> None:
    api = make_api(engine=EngineConfig(scheduling_policy="priority"))
    assert api.complete(priority=-3).status_code == 200
    assert api.engine.requests[0].priority == -3
    assert error_of(api.complete(priority=1 << 40))["param"] == "priority"


def test_errors_are_json(api: Api) -> None:
    response = api.complete(n=99)
    assert response.mimetype == "application/json"
    assert json.loads(response.data)["error"]["message"] == "n must be at most 16, got 99"
