"""Tools in chats: what the model is told, what it must write, and what a client gets, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from api_client import Api, MakeApi
from cupy_engine.server.json_calls import JsonForm
from cupy_engine.server.tool_formats import FORMS
from fake_engine import says

from cupy_engine.chat_template import ChatTemplate
from cupy_engine.frontend import FrontEnd

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather now",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
TOOLS = [WEATHER, TIME]
CALL = 'Sure.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich 🦥"}}\n</tool_call>'


def prompt_of(api: Api, front_end: FrontEnd) -> str:
    assert front_end.tokenizer is not None
    return front_end.tokenizer.decode(api.engine.requests[-1].prompt_token_ids, skip_special_tokens=False)


def saying(make_api: MakeApi, front_end: FrontEnd, text: str, **options: object) -> Api:
    """An application whose model says this, token by token."""
    assert front_end.tokenizer is not None
    return make_api(says(front_end.tokenizer.encode(text, add_special_tokens=False), eos=2), **options)


def events(response: Any) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.get_data(as_text=True).split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_call_of_the_models_own_accord(make_api: MakeApi, front_end: FrontEnd) -> None:
    api = saying(make_api, front_end, CALL)
    choice = api.chat(tools=TOOLS).get_json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    (call,) = message["tool_calls"]
    assert message["content"] == "Sure."
    assert call == {
        "id": call["id"],
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Zürich 🦥"}'},
    }
    assert api.engine.requests[-1].grammar is None


def test_a_call_streamed(make_api: MakeApi, front_end: FrontEnd) -> None:
    api = saying(make_api, front_end, CALL)
    choices = [event["choices"][0] for event in events(api.chat(tools=TOOLS, stream=True))]
    deltas = [choice["delta"] for choice in choices]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Sure."
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert (calls[0]["function"]["name"], calls[0]["index"]) == ("get_weather", 0)
    assert [call["id"] for call in calls if "id" in call] == [calls[0]["id"]]
    assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Zürich 🦥"}'
    assert len(calls) > 4, "arguments come as they are written"
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["tool_calls"]


def test_text_is_text(make_api: MakeApi, front_end: FrontEnd) -> None:
    api = saying(make_api, front_end, "It is <tool sunny. ")
    choice = api.chat(tools=TOOLS).get_json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "It is <tool sunny. ")
    assert "tool_calls" not in choice["message"]
    streamed = [event["choices"][0]["delta"] for event in events(api.chat(tools=TOOLS, stream=True))]
    assert "".join(delta.get("content") or "" for delta in streamed) == "It is <tool sunny. "


def test_a_call_must_name_a_tool(make_api: MakeApi, front_end: FrontEnd) -> None:
    text = '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'
    choice = saying(make_api, front_end, text).chat(tools=TOOLS).get_json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", text)


def test_one_call_only(make_api: MakeApi, front_end: FrontEnd) -> None:
    text = '<tool_call>{"name": "get_time"}</tool_call>' * 3
    api = saying(make_api, front_end, text)
    assert len(api.chat(tools=TOOLS).get_json()["choices"][0]["message"]["tool_calls"]) == 3
    one = api.chat(tools=TOOLS, parallel_tool_calls=False).get_json()["choices"][0]["message"]["tool_calls"]
    assert [call["function"] for call in one] == [{"name": "get_time", "arguments": "{}"}]


def test_every_choice_has_its_own_calls(make_api: MakeApi, front_end: FrontEnd) -> None:
    choices = saying(make_api, front_end, CALL).chat(tools=TOOLS, n=2).get_json()["choices"]
    calls = [choice["message"]["tool_calls"][0] for choice in choices]
    assert calls[0]["function"] == calls[1]["function"]
    assert calls[0]["id"] != calls[1]["id"]


GET_WEATHER = {"type": "function", "function": {"name": "get_weather"}}


def test_a_named_function_is_called_in_the_familys_form(make_api: MakeApi, front_end: FrontEnd) -> None:
    api = saying(
        make_api, front_end, '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>'
    )
    choice = api.chat(tools=TOOLS, tool_choice=GET_WEATHER).get_json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Bern"}'}
    grammar = grammar_of(api)
    assert grammar.endswith("start: calls")
    assert ('"city"' in grammar, "get_time" in grammar, "){0," in grammar) == (True, False, False)


def test_some_call_is_required(make_api: MakeApi, front_end: FrontEnd) -> None:
    api = saying(make_api, front_end, '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>')
    message = api.chat(tools=TOOLS, tool_choice="required").get_json()["choices"][0]["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_time"]
    assert "){0,15}" in grammar_of(api)
    api.chat(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert "){0," not in grammar_of(api)


def test_calls_or_an_answer_of_a_form(make_api: MakeApi, front_end: FrontEnd) -> None:
    wants = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"properties": {"answer": {}}}}}
    api = saying(make_api, front_end, '{"answer": "<tool_call>"}')
    choice = api.chat(tools=TOOLS, response_format=wants).get_json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ('{"answer": "<tool_call>"}', "stop")
    assert "tool_calls" not in choice["message"]
    assert "start: calls | answer" in grammar_of(api)
    assert '"city"' not in grammar_of(api), "a function that is not strict is not held to its schema"
    message = saying(make_api, front_end, CALL[6:]).chat(tools=TOOLS, response_format=wants)
    assert message.get_json()["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
    api.chat(tools=TOOLS, response_format=wants, tool_choice="required")
    assert "answer" not in grammar_of(api)
    api.chat(tools=TOOLS, response_format=wants, tool_choice="none")
    assert ("answer" in grammar_of(api), "get_time" in grammar_of(api)) == (True, False)
    assert api.engine.requests[-1].grammar.param == "response_format"


def test_a_strict_function_is_held_to_its_schema(make_api: MakeApi, front_end: FrontEnd) -> None:
    api = saying(make_api, front_end, CALL)
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    assert api.chat(tools=[strict, TIME]).get_json()["choices"][0]["message"]["content"] == "Sure."
    assert "start: text | text_calls" in grammar_of(api)
    assert '"city"' in grammar_of(api)
    response = api.post(
        "/v1/responses", {"input": "Hi", "tools": [{"type": "function", **strict["function"]}]}
    ).get_json()
    assert [item["type"] for item in response["output"]] == ["message", "function_call"]
    assert "start: text | text_calls" in grammar_of(api)


def allowed(mode: str, *names: str) -> dict[str, Any]:
    named = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}


def test_only_some_tools_are_allowed(make_api: MakeApi, front_end: FrontEnd) -> None:
    api = saying(make_api, front_end, CALL)
    choice = api.chat(tools=TOOLS, tool_choice=allowed("auto", "get_time")).get_json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop"), "that is none of them"
    assert ("get_time" in grammar_of(api), "get_weather" in grammar_of(api)) == (True, False)
    assert "start: text | text_calls" in grammar_of(api)
    assert "get_weather" in prompt_of(api, front_end), "the prompt stays the same"
    api.chat(tools=TOOLS, tool_choice=allowed("required", "get_time", "get_time"))
    assert ("start: calls" in grammar_of(api), "get_weather" in grammar_of(api)) == (True, False)
    api.chat(tools=TOOLS, tool_choice=allowed("auto", "get_time", "get_weather"))
    assert api.engine.requests[-1].grammar is None
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
    wanted = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_time"}]}
    answer = api.post("/v1/responses", {"input": "Hi", "tools": tools, "tool_choice": wanted})
    assert answer.get_json()["tool_choice"] == wanted
    assert ("start: calls" in grammar_of(api), "get_weather" in grammar_of(api)) == (True, False)


def grammar_of(api: Api) -> str:
    """What the last request's answer had to follow."""
    grammar = api.engine.requests[-1].grammar
    assert grammar is not None
    return grammar.text


def test_a_template_without_tools_is_helped_out(api: Api, front_end: FrontEnd) -> None:
    assert front_end.chat_template is not None
    assert not front_end.chat_template.takes("tools")
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "get_time"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
    ]
    assert api.chat(tools=TOOLS, messages=messages).status_code == 200
    prompt = prompt_of(api, front_end)
    described = prompt.partition("<tools>\n")[2].partition("\n</tools>")[0]
    assert [json.loads(line) for line in described.split("\n")] == TOOLS
    assert '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>' in prompt
    assert "<tool_response>\nnoon\n</tool_response>" in prompt
    api.chat(tools=TOOLS, tool_choice="none")
    assert "get_weather" not in prompt_of(api, front_end)


def test_it_is_helped_out_in_the_familys_form(make_api: MakeApi, front_end: FrontEnd) -> None:
    call = {"id": "1", "function": {"name": "get_weather", "arguments": '{"city": "Bern"}'}}
    messages = [{"role": "user", "content": "W?"}, {"role": "assistant", "content": "Hm.", "tool_calls": [call]}]
    api = make_api(tool_call_parser="pythonic")
    assert api.chat(tools=TOOLS, messages=messages).status_code == 200
    prompt = prompt_of(api, front_end)
    assert 'written like this:\n[function_name(argument="value")]' in prompt
    assert 'Hm.\n[get_weather(city="Bern")]' in prompt
    assert "<tool_call>" not in prompt
    tokens = api.post("/tokenize", {"messages": messages, "tools": TOOLS}).get_json()
    assert tokens["tokens"] == api.engine.requests[-1].prompt_token_ids


TEMPLATE = (
    "{% for t in tools or [] %}T:{{ t.function.name }} {% endfor %}{% for d in documents or [] %}D:{{ d.text }} "
    "{% endfor %}{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({{ c.function.arguments.city }}){% endfor %}{{ m.tool_call_id }} {% endfor %}"
)


def test_a_template_with_tools_gets_them(api: Api, front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_end, "chat_template", ChatTemplate(TEMPLATE))
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bern"}'}}
    messages = [
        {"role": "user", "content": "W?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sun"}]},
    ]
    answer = api.chat(tools=TOOLS, messages=messages, documents=[{"text": "d1"}])
    assert answer.status_code == 200
    expected = "T:get_weather T:get_time D:d1 user:W? assistant:get_weather(Bern) tool:sunc1 "
    assert prompt_of(api, front_end) == expected
    tokens = api.post("/tokenize", {"messages": messages, "tools": TOOLS, "documents": [{"text": "d1"}]}).get_json()
    assert tokens["tokens"] == api.engine.requests[-1].prompt_token_ids


def test_documents_need_a_template_that_takes_them(api: Api) -> None:
    answer = api.chat(documents=[{"text": "x"}])
    assert (answer.status_code, answer.get_json()["error"]["param"]) == (400, "documents")


def test_the_family_can_be_chosen(make_api: MakeApi, front_end: FrontEnd) -> None:
    api = saying(make_api, front_end, '{"name": "get_time", "parameters": {}}', tool_call_parser="llama3_json")
    message = api.chat(tools=TOOLS).get_json()["choices"][0]["message"]
    assert message["tool_calls"][0]["function"] == {"name": "get_time", "arguments": "{}"}


def test_a_special_mark_is_not_skipped(make_api: MakeApi, front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMS, "hermes", JsonForm(begin="<|im_start|>"))
    api = make_api()
    api.chat(tools=TOOLS)
    assert api.engine.requests[-1].params.skip_special_tokens is False
    api.chat(tools=TOOLS, skip_special_tokens=True)
    assert api.engine.requests[-1].params.skip_special_tokens is True
    api.chat(tools=TOOLS, skip_special_tokens=True, tool_choice="required")
    assert api.engine.requests[-1].params.skip_special_tokens is False, "or else nothing could be read"
    assert "calls: <[1]> body" in grammar_of(api)
    api.chat()
    assert api.engine.requests[-1].params.skip_special_tokens is True
