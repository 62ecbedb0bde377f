"""``/v1/completions`` over a fake engine: shapes of answers and streams."""

from __future__ import annotations

import json
import queue
from typing import Any

import pytest
from api_client import Api, MakeApi
from cupy_engine.server.mailbox import Mailbox
from fake_engine import aborted_indexes, fails, says

from cupy_engine.frontend import FrontEnd
from cupy_engine.messages import SequenceOutput

PARIS = " Paris, café 🦥."


def events_of(response: Any) -> list[Any]:
    """The payloads of a stream, ``[DONE]`` as text, comments left out."""
    assert response.mimetype == "text/event-stream"
    blocks = response.get_data().decode().split("\n\n")
    response.close()
    assert blocks.pop() == ""
    payloads = [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]
    return [json.loads(payload) if payload != "[DONE]" else payload for payload in payloads]


def test_answer(api: Api, paris: list[int]) -> None:
    answer = api.complete().get_json()
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["model"] == "smollm2-135m"
    choice = {"index": 0, "text": PARIS, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    assert answer["choices"] == [choice]
    num_output = len(paris) + 1
    assert answer["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": num_output,
        "total_tokens": num_output + 1,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_parameters_reach_the_engine(api: Api) -> None:
    api.complete(
        max_tokens=7,
        temperature=0.5,
        stop="x",
        logit_bias={"5": 1.5},
        seed=3,
        n=2,
        user="me",
        cache_salt="s",
        timeout_s=9,
    )
    request = api.engine.requests[0]
    assert (request.params.max_tokens, request.params.temperature, request.params.stop) == (7, 0.5, ["x"])
    assert (request.params.logit_bias, request.params.seed, request.params.n) == ({5: 1.5}, 3, 2)
    assert request.cache_salt == "s"
    assert request.deadline_s is not None
    assert request.deadline_s - request.arrival_time_s == pytest.approx(9)


def test_default_is_sixteen_tokens(api: Api) -> None:
    api.complete()
    assert api.engine.requests[0].params.max_tokens == 16


def test_four_forms_of_prompt(api: Api, front_end: FrontEnd) -> None:
    assert front_end.tokenizer is not None
    ids = front_end.tokenizer.encode("Hello there")
    for prompt, expected in [
        ("Hello there", [ids]),
        (["Hello there", "Hello there"], [ids, ids]),
        (ids, [ids]),
        ([ids, [5]], [ids, [5]]),
    ]:
        api.engine.requests.clear()
        answer = api.complete(prompt=prompt).get_json()
        assert [request.prompt_token_ids for request in api.engine.requests] == expected
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))


def test_many_prompts_and_choices_are_numbered_through(api: Api) -> None:
    answer = api.complete(prompt=["a", "b"], n=3).get_json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4, 5]
    assert answer["usage"]["prompt_tokens"] == 2


def test_logprobs(api: Api) -> None:
    logprobs = api.complete(logprobs=2).get_json()["choices"][0]["logprobs"]
    assert logprobs["tokens"][:2] == [" Paris", ","]
    assert logprobs["token_logprobs"][:2] == [-0.5, -0.5]
    assert logprobs["text_offset"][:3] == [0, 6, 7]
    assert logprobs["top_logprobs"][0][" Paris"] == -0.5
    assert len(logprobs["top_logprobs"][0]) == 2
    half_characters = [token for token in logprobs["tokens"] if token.startswith("bytes:")]
    assert half_characters, "a part of a character is shown as its bytes"


def test_echo_with_logprobs(api: Api, paris: list[int]) -> None:
    choice = api.complete(prompt="Hello there", echo=True, logprobs=1).get_json()["choices"][0]
    assert choice["text"] == "Hello there" + PARIS
    assert choice["logprobs"]["tokens"][:3] == ["Hello", " there", " Paris"]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["text_offset"][:3] == [0, 5, 11]
    assert len(choice["logprobs"]["tokens"]) == 2 + len(paris) + 1


def test_echo_of_the_prompt_alone(api: Api) -> None:
    answer = api.complete(prompt="Hello there", echo=True, logprobs=1, max_tokens=0).get_json()
    assert api.engine.requests[0].params.max_tokens == 1
    choice = answer["choices"][0]
    assert choice["text"] == "Hello there"
    assert choice["logprobs"]["tokens"] == ["Hello", " there"]
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


def test_echo_shows_what_truncation_left(api: Api) -> None:
    choice = api.complete(prompt="Hello there", echo=True, truncate_prompt_tokens=1).get_json()["choices"][0]
    assert choice["text"] == " there" + PARIS


def test_token_ids_and_prompt_logprobs(api: Api, paris: list[int]) -> None:
    choice = api.complete(prompt="Hello there", return_token_ids=True, prompt_logprobs=1).get_json()["choices"][0]
    assert choice["token_ids"] == [*paris, 2]
    assert len(choice["prompt_token_ids"]) == 2
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert second == {str(choice["prompt_token_ids"][1]): {"logprob": -0.5, "rank": 1, "decoded_token": " there"}}


def test_stop_string(api: Api) -> None:
    choice = api.complete(stop=["café", "zzz"]).get_json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (" Paris, ", "stop", "café")
    assert aborted_indexes(api.engine) == [0]


def test_request_id(api: Api) -> None:
    response = api.complete(request_id="mine-1")
    assert response.get_json()["id"] == "cmpl-mine-1"
    assert response.headers["X-Request-Id"] == "cmpl-mine-1"


def test_stream(api: Api) -> None:
    *chunks, done = events_of(api.complete(stream=True))
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == PARIS
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    assert all("�" not in chunk["choices"][0]["text"] for chunk in chunks), "no half characters"


def test_stream_says_nothing_while_a_character_is_incomplete(api: Api) -> None:
    *chunks, _ = events_of(api.complete(stream=True))
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert all(texts[:-1]), "an empty piece comes with the finish reason only"


def test_stream_usage(api: Api, paris: list[int]) -> None:
    *chunks, last, _ = events_of(api.complete(stream=True, stream_options={"include_usage": True}))
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(paris) + 1


def test_stream_of_many(api: Api) -> None:
    *chunks, _ = events_of(api.complete(prompt=["a", "b"], n=2, stream=True, echo=True))
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: "a" + PARIS, 1: "a" + PARIS, 2: "b" + PARIS, 3: "b" + PARIS}


def test_stream_logprobs_have_running_offsets(api: Api) -> None:
    whole = api.complete(prompt="Hello there", echo=True, logprobs=1).get_json()["choices"][0]["logprobs"]
    *chunks, _ = events_of(api.complete(prompt="Hello there", echo=True, logprobs=1, stream=True))
    streamed = {name: [x for c in chunks for x in c["choices"][0]["logprobs"][name]] for name in whole}
    assert streamed["tokens"] == whole["tokens"]
    assert streamed["token_logprobs"] == whole["token_logprobs"]
    assert streamed["text_offset"][:5] == whole["text_offset"][:5]


def test_stream_token_ids(api: Api, paris: list[int]) -> None:
    *chunks, _ = events_of(api.complete(stream=True, return_token_ids=True))
    assert [x for chunk in chunks for x in chunk["choices"][0]["token_ids"]] == [*paris, 2]
    assert "prompt_token_ids" in chunks[0]["choices"][0]
    assert "prompt_token_ids" not in chunks[1]["choices"][0]


def test_stop_string_does_not_leak_its_beginning(api: Api) -> None:
    *chunks, _ = events_of(api.complete(stream=True, stop=["caféteria", "café 🦥."]))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == " Paris, "


def test_error_in_mid_stream_is_an_event(make_api: MakeApi, paris: list[int]) -> None:
    def script(request: Any) -> list[SequenceOutput]:
        return [*says(paris[:1], finish_reason=None)(request), *fails("internal", "broken")(request)]

    api = make_api(script)
    api.engine.submit = one_by_one(api)
    first, error, done = events_of(api.complete(stream=True))
    assert first["choices"][0]["text"] == " Paris"
    assert error == {"error": {"message": "broken", "type": "internal_error", "param": None, "code": "engine_error"}}
    assert done == "[DONE]"
    assert api.engine.aborted == [api.engine.requests[0].request_id]


def test_waiting_streams_get_comments(make_api: MakeApi, paris: list[int]) -> None:
    api = make_api(says(paris[:1], finish_reason=None), keep_alive_comment_s=0.01, request_timeout_s=0.05)
    api.engine.submit = one_by_one(api)
    text = api.complete(stream=True).get_data(as_text=True)
    assert ": keep-alive\n\n" in text
    assert "deadline_exceeded" in text, "an engine that never answers is given up on"


def one_by_one(api: Api) -> Any:
    """``submit`` whose mailbox gives one output at a time, as a running engine's does."""
    submit = api.engine.submit

    class Slow(Mailbox):
        def get_nowait(self) -> Any:
            raise queue.Empty

    def submit_slowly(requests: Any) -> Mailbox:
        slow = Slow()
        submit(requests).redirect(slow.put)
        return slow

    return submit_slowly
