"""``/v1/chat/completions`` over a fake engine."""

from __future__ import annotations

from api_client import Api
from test_completions_api import PARIS, events_of

from cupy_engine.frontend import FrontEnd


def prompt_of(api: Api, front_end: FrontEnd, number: int = 0) -> str:
    assert front_end.tokenizer is not None
    return front_end.tokenizer.decode(api.engine.requests[number].prompt_token_ids, skip_special_tokens=False)


def test_answer(api: Api) -> None:
    answer = api.chat().get_json()
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": PARIS, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert api.engine.requests[0].params.max_tokens is None, "chat goes on up to the context length"


def test_prompt_is_the_rendered_template(api: Api, front_end: FrontEnd) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    api.chat(messages=messages)
    prompt = prompt_of(api, front_end)
    assert prompt == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_text_parts_are_joined(api: Api, front_end: FrontEnd) -> None:
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    api.chat(messages=[{"role": "user", "content": parts}])
    assert "user\nHi there<|im_end|>" in prompt_of(api, front_end)


def test_continue_final_message(api: Api, front_end: FrontEnd) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The capital is"}]
    answer = api.chat(messages=messages, continue_final_message=True, echo=True).get_json()
    assert prompt_of(api, front_end).endswith("assistant\nThe capital is")
    assert answer["choices"][0]["message"]["content"] == "The capital is" + PARIS


def test_no_generation_prompt(api: Api, front_end: FrontEnd) -> None:
    api.chat(add_generation_prompt=False)
    assert prompt_of(api, front_end).endswith("Hi<|im_end|>\n")


def test_max_completion_tokens(api: Api) -> None:
    api.chat(max_completion_tokens=5)
    api.chat(max_tokens=6)
    assert [request.params.max_tokens for request in api.engine.requests] == [5, 6]


def test_logprobs(api: Api) -> None:
    content = api.chat(logprobs=True, top_logprobs=2).get_json()["choices"][0]["logprobs"]["content"]
    assert content[0]["token"] == " Paris"
    assert content[0]["bytes"] == list(b" Paris")
    assert content[0]["logprob"] == -0.5
    assert len(content[0]["top_logprobs"]) == 2
    assert bytes(b for entry in content[:-1] for b in entry["bytes"]).decode() == PARIS


def test_logprobs_alone_have_no_alternatives(api: Api) -> None:
    content = api.chat(logprobs=True).get_json()["choices"][0]["logprobs"]["content"]
    assert content[0]["top_logprobs"] == []


def test_token_ids_and_prompt_logprobs(api: Api, paris: list[int]) -> None:
    answer = api.chat(return_token_ids=True, prompt_logprobs=0).get_json()
    assert answer["choices"][0]["token_ids"] == [*paris, 2]
    assert len(answer["prompt_logprobs"]) == len(answer["prompt_token_ids"])


def test_stream(api: Api) -> None:
    first, *chunks, done = events_of(api.chat(stream=True))
    assert done == "[DONE]"
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["choices"][0]["finish_reason"] is None
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == PARIS
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_stream_of_three_with_usage(api: Api, paris: list[int]) -> None:
    *chunks, last, _ = events_of(api.chat(stream=True, n=3, stream_options={"include_usage": True}))
    texts = dict.fromkeys(range(3), "")
    roles = dict.fromkeys(range(3), 0)
    for chunk in chunks:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
        roles[choice["index"]] += "role" in choice["delta"]
    assert set(texts.values()) == {PARIS}
    assert set(roles.values()) == {1}
    assert last["usage"]["completion_tokens"] == 3 * (len(paris) + 1)


def test_stream_logprobs(api: Api, paris: list[int]) -> None:
    _, *chunks, _ = events_of(api.chat(stream=True, logprobs=True))
    entries = [entry for chunk in chunks for entry in chunk["choices"][0]["logprobs"]["content"]]
    assert len(entries) == len(paris) + 1


def test_conversations_are_not_given_special_tokens_twice(api: Api, front_end: FrontEnd) -> None:
    api.chat()
    text = prompt_of(api, front_end)
    assert front_end.tokenizer is not None
    assert api.engine.requests[0].prompt_token_ids == front_end.tokenizer.encode(text, add_special_tokens=False)
