"""``POST /v1/responses``: what the ``openai`` package makes of it, its events one by one, and its errors."""

from __future__ import annotations

import json
from typing import Any

import openai
import pydantic
import pytest
from api_client import Api, MakeApi
from fake_engine import says
from live_server import LiveServer

from cupy_engine.frontend import FrontEnd

RESPONSES = "/v1/responses"
MODEL = "smollm2-135m"
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def respond(api: Api, **fields: object):
    return api.post(RESPONSES, {"input": "Hi", **fields})


def saying(make_api: MakeApi, front_end: FrontEnd, text: str, finish_reason: str = "stop") -> Api:
    assert front_end.tokenizer is not None
    token_ids = front_end.tokenizer.encode(text, add_special_tokens=False)
    return make_api(says(token_ids, finish_reason=finish_reason, eos=2 if finish_reason == "stop" else None))


def events_of(answer: Any) -> list[Any]:
    blocks = [block.split("\n") for block in answer.get_data(as_text=True).split("\n\n") if block]
    assert blocks.pop() == ["data: [DONE]"]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name for name, _ in blocks] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_a_text(make_api: MakeApi, front_end: FrontEnd) -> None:
    answer = respond(saying(make_api, front_end, "Paris it is."), instructions="Be brief.", temperature=0.5).get_json()
    assert answer["id"].startswith("resp-")
    assert (answer["object"], answer["status"], answer["model"]) == ("response", "completed", MODEL)
    (item,) = answer["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert [(part["type"], part["text"]) for part in item["content"]] == [("output_text", "Paris it is.")]
    assert (answer["instructions"], answer["temperature"], answer["store"]) == ("Be brief.", 0.5, False)
    usage = answer["usage"]
    assert usage["output_tokens"] == 5
    assert usage["total_tokens"] == usage["input_tokens"] + 5


def test_the_events_of_a_text_and_a_call(make_api: MakeApi, front_end: FrontEnd) -> None:
    text = 'Sure. <tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>'
    events = events_of(respond(saying(make_api, front_end, text), tools=[WEATHER], stream=True))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert [kind for n, kind in enumerate(kinds) if kind != (kinds[n - 1] if n else "")] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    assert "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta") == "Sure."
    told = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert "".join(told) == '{"city": "Rome"}'
    message, call = events[-1]["response"]["output"]
    assert message["content"][0]["text"] == "Sure."
    assert (call["name"], call["arguments"], call["status"]) == ("get_weather", '{"city": "Rome"}', "completed")
    added = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    assert [(item["status"], item.get("content", item.get("arguments"))) for item in added] == [
        ("in_progress", []),
        ("in_progress", ""),
    ]
    whole = respond(saying(make_api, front_end, text), tools=[WEATHER]).get_json()["output"]
    assert [item["type"] for item in whole] == ["message", "function_call"]


def test_an_answer_that_is_cut_off(make_api: MakeApi, front_end: FrontEnd) -> None:
    api = saying(make_api, front_end, "Once upon a", finish_reason="length")
    answer = respond(api, max_output_tokens=3).get_json()
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert api.engine.requests[-1].params.max_tokens == 3
    assert events_of(respond(api, stream=True))[-1]["type"] == "response.incomplete"


def test_a_conversation_as_items(api: Api, front_end: FrontEnd) -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
        {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "sun"},
    ]
    assert respond(api, input=items, tools=[WEATHER], instructions="Be brief.").status_code == 200
    assert front_end.tokenizer is not None
    prompt = front_end.tokenizer.decode(api.engine.requests[-1].prompt_token_ids, skip_special_tokens=False)
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\nYou may call")
    assert '\nLet me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}' in prompt
    assert "<tool_response>\nsun\n</tool_response>" in prompt


BAD = {
    "input-missing": ({"input": ...}, "input"),
    "input-empty": ({"input": []}, "input"),
    "input-type": ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    "role": ({"input": [{"content": "x"}]}, "input[0].role"),
    "content": ({"input": [{"role": "user"}]}, "input"),
    "image": ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
    "call-name": ({"input": [{"type": "function_call", "arguments": "{}"}]}, "input[0].name"),
    "call-arguments": ({"input": [{"type": "function_call", "name": "f", "arguments": "["}]}, "input"),
    "output": ({"input": [{"type": "function_call_output", "call_id": "1"}]}, "input[0].output"),
    "max_output_tokens": ({"max_output_tokens": 0}, "max_output_tokens"),
    "temperature": ({"temperature": -1}, "temperature"),
    "tool-type": ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    "tool-name": ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    "tool_choice": ({"tool_choice": "required"}, "tool_choice"),
    "format": ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    "previous_response_id": ({"previous_response_id": "resp_1"}, "previous_response_id"),
    "conversation": ({"conversation": "conv_1"}, "conversation"),
    "background": ({"background": True}, "background"),
    "long": ({"input": "a " * 9000}, "input"),
}


@pytest.mark.parametrize(("fields", "param"), BAD.values(), ids=BAD)
def test_bad_requests(api: Api, fields: dict[str, object], param: str) -> None:
    body = {"input": "Hi", **fields}
    answer = api.post(RESPONSES, {name: value for name, value in body.items() if value is not ...})
    assert answer.status_code == 400
    error = answer.get_json()["error"]
    assert error["param"] == param
    assert "messages" not in error["message"]
    assert not api.engine.requests


class City(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    continent: str = pydantic.Field(max_length=20)


def test_the_openai_client(server: LiveServer) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        question = "What is the capital of France?"
        answer = client.responses.create(model=MODEL, input=question, temperature=0)
        assert answer.output_text == "The capital of France is Paris."
        with client.responses.stream(model=MODEL, input=question, temperature=0) as stream:
            pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
            assert stream.get_final_response().output_text == "".join(pieces) == answer.output_text
        parsed = client.responses.parse(model=MODEL, input=question, text_format=City, max_output_tokens=100)
        assert isinstance(parsed.output_parsed, City)
        choice = {"type": "function", "name": "get_weather"}
        called = client.responses.create(model=MODEL, input=question, tools=[WEATHER], tool_choice=choice)
        assert json.loads(called.output[0].arguments)["city"] in ("Paris", "Rome")
        wanted = {"type": "json_schema", "name": "x", "schema": {"not": {}}}
        with pytest.raises(openai.BadRequestError, match=r"text\.format is refused") as caught:
            client.responses.create(model=MODEL, input=question, text={"format": wanted})
        assert caught.value.param == "text.format"
    assert server.is_idle()
