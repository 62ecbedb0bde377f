"""``POST /v1/embeddings``, by the ``openai`` package on a live server, and its errors."""

from __future__ import annotations

import base64

import numpy as np
import openai
import pytest
from api_client import Api
from live_server import LiveServer

EMBEDDINGS = "/v1/embeddings"


def test_the_openai_client(server: LiveServer) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        answer = client.embeddings.create(model="smollm2-135m", input=["A cat.", "A dog."])
        assert [entry.index for entry in answer.data] == [0, 1]
        assert [len(entry.embedding) for entry in answer.data] == [576, 576]
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == 6
        short = client.embeddings.create(model="smollm2-135m", input="A cat.", dimensions=10, encoding_format="float")
        cut = np.array(answer.data[0].embedding[:10])
        np.testing.assert_allclose(short.data[0].embedding, cut / np.linalg.norm(cut), atol=1e-5)
    assert server.is_idle()


def test_forms_of_input_and_output(server: LiveServer) -> None:
    fields = {"input": [[1, 2, 3], [4]], "encoding_format": "base64", "pooling": "last"}
    status, answer = server.call(EMBEDDINGS, fields)
    assert (status, answer["object"], answer["model"]) == (200, "list", "smollm2-135m")
    assert answer["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    packed = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in answer["data"]]
    plain = server.call(EMBEDDINGS, {"input": [1, 2, 3], "pooling": "last"})[1]["data"]
    np.testing.assert_allclose(packed[0], plain[0]["embedding"], atol=1e-6)
    status, answer = server.call(EMBEDDINGS, {"input": "a", "dimensions": 577})
    assert (status, answer["error"]["param"]) == (400, "dimensions")
    assert "at most 576" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [1, 49152]}, "input"),
        ({"input": ["a"] * 257}, "input"),
        ({"input": "a " * 9000}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "model": "gpt-4"}, "model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_requests(api: Api, fields: dict[str, object], param: str) -> None:
    answer = api.post(EMBEDDINGS, fields)
    assert answer.status_code == (404 if param == "model" else 400)
    assert answer.get_json()["error"]["param"] == param
    assert not api.engine.requests
