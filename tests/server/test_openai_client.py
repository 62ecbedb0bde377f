"""The ``openai`` package against a live server with the default model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import openai
import pydantic
import pytest
from golden_data import greedy_prompts
from live_server import LiveServer

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
MODEL = "smollm2-135m"


class City(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    continent: Literal["Europe", "Asia"]


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


def test_chat_streamed(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=CAPITAL, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == "The capital of France is Paris."
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    assert len(chunks) >= 8, "it came in pieces"


def test_completion_is_the_golden_one(client: openai.OpenAI) -> None:
    golden = greedy_prompts()[0]
    answer = client.completions.create(
        model=MODEL,
        prompt=golden["prompt_token_ids"],
        max_tokens=8,
        temperature=0,
        logprobs=2,
        extra_body={"return_token_ids": True},
    )
    choice = answer.choices[0]
    assert choice.token_ids == golden["greedy_token_ids"][:8]  # type: ignore[attr-defined]
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == pytest.approx([top[0][1] for top in golden["top5_logprobs"][:8]], abs=2e-3)


def test_completion_streamed_is_the_same(client: openai.OpenAI) -> None:
    prompt, fields = "The three primary colours are", {"model": MODEL, "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(prompt=prompt, **fields).choices[0].text
    pieces = [chunk.choices[0].text for chunk in client.completions.create(prompt=prompt, stream=True, **fields)]
    assert "".join(pieces) == whole
    assert len(pieces) >= 4, "it came in pieces"


def test_three_choices_with_a_seed(client: openai.OpenAI) -> None:
    def ask() -> list[str | None]:
        answer = client.chat.completions.create(
            model=MODEL, messages=CAPITAL, n=3, seed=7, temperature=1.5, max_tokens=6
        )
        return [choice.message.content for choice in answer.choices]

    first = ask()
    assert len(set(first)) > 1, "choices differ"
    assert ask() == first, "a seed repeats them"


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=CAPITAL, temperature=0, logprobs=True, top_logprobs=3, max_tokens=4
    )
    content = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None
    assert "".join(entry.token for entry in content) == "The capital of France"
    assert all(len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in content)
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in content), "greedy takes the likeliest"


def test_stop(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0, stop=[" France"])
    assert answer.choices[0].message.content == "The capital of"
    assert answer.choices[0].finish_reason == "stop"


def test_prefix_cache_is_reported(client: openai.OpenAI) -> None:
    prompt = "You are a helpful assistant. " * 8
    for _ in range(2):
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens >= 32


def test_32_streams_at_once(client: openai.OpenAI, server: LiveServer) -> None:
    def count_to(number: int) -> str:
        stream = client.completions.create(
            model=MODEL, prompt=f"{number}, {number + 1}, {number + 2},", max_tokens=4, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in stream)

    alone = {number: count_to(number) for number in (0, 31)}
    with ThreadPoolExecutor(32) as pool:
        texts = list(pool.map(count_to, range(32)))
    assert all(texts)
    assert {number: texts[number] for number in alone} == alone, "a text does not depend on its neighbours"
    assert server.is_idle()


def test_bad_requests_raise_the_matching_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=CAPITAL)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=CAPITAL, max_tokens=1, extra_body={"guided_regex": "(a"})
    assert caught.value.param == "guided_regex"


def test_a_typed_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=CAPITAL, response_format=City, temperature=1, seed=3, max_tokens=100
    )
    city = answer.choices[0].message.parsed
    assert city is not None
    assert city.continent in ("Europe", "Asia")


def test_a_form_streamed(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=CAPITAL, stream=True, temperature=1, extra_body={"guided_choice": ["Paris it is", "Rome"]}
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) in ("Paris it is", "Rome")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt="a", stream=True, extra_body={"guided_regex": "(a"})


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Paris", "Rome"]}},
        },
    },
}
LIGHT_PARAMETERS = {"type": "object", "properties": {"on": {"type": "boolean"}}, "additionalProperties": False}
LIGHT = {"type": "function", "function": {"name": "light", "parameters": LIGHT_PARAMETERS}}


def test_required_calls_follow_the_tools(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=CAPITAL,
        tools=[WEATHER, LIGHT],
        tool_choice="required",
        parallel_tool_calls=False,
        n=4,
        seed=1,
        max_tokens=200,
    )
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls or ()
        arguments = json.loads(call.function.arguments)
        assert call.function.name in ("get_weather", "light")
        assert arguments.get("city", "Rome") in ("Paris", "Rome")


def test_a_conversation_with_a_tool(client: openai.OpenAI) -> None:
    """A named call, streamed through the client's own accumulator, and its result sent back."""
    choice = {"type": "function", "function": {"name": "get_weather"}}
    with client.chat.completions.stream(
        model=MODEL, messages=CAPITAL, tools=[WEATHER], tool_choice=choice, max_tokens=50
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    (call,) = message.tool_calls or ()
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    history = [*CAPITAL, message.model_dump(exclude_none=True), result]
    answer = client.chat.completions.create(model=MODEL, messages=history, tools=[WEATHER], temperature=0, max_tokens=8)
    assert answer.choices[0].message.content


def test_deadline(client: openai.OpenAI, server: LiveServer) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(
            model=MODEL, prompt="a", max_tokens=2000, extra_body={"timeout_s": 0.3, "ignore_eos": True}
        )
    assert caught.value.status_code == 504
    assert server.is_idle()
