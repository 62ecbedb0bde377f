"""Whatever becomes of a request, what it held is freed when it is over, not when garbage is collected."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence

import pytest
from api_client import Api, MakeApi
from cupy_engine.server.api_errors import ClientGoneError
from cupy_engine.server.draining import no_more_time
from cupy_engine.server.generation import Generation, late_error
from cupy_engine.server.mailbox import Failure, Mailbox
from fake_engine import fails

from cupy_engine.messages import GenerateRequest


def num_generations() -> int:
    return sum(type(each) is Generation for each in gc.get_objects())


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    gc.collect()
    gc.disable()
    num_before = num_generations()
    yield
    num_left = num_generations() - num_before
    gc.enable()
    assert num_left == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_an_answer(api: Api, path: str, stream: bool) -> None:
    prompt = {"prompt": "Hi", "messages": [{"role": "user", "content": "Hi"}], "input": "Hi"}
    assert api.post(path, {**prompt, "stream": stream}).get_data()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["invalid", "deadline", "queue_full", "internal"])
def test_a_request_that_the_engine_refuses(make_api: MakeApi, kind: str, stream: bool) -> None:
    assert make_api(fails(kind)).complete(stream=stream).status_code >= 400


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("news", "status"), [(ClientGoneError, 499), (late_error, 504), (no_more_time, 503)])
def test_one_that_something_else_ends(
    api: Api, monkeypatch: pytest.MonkeyPatch, news: Failure, status: int, stream: bool
) -> None:
    def submit(_: Sequence[GenerateRequest]) -> Mailbox:
        mailbox = Mailbox()
        mailbox.put(news)
        return mailbox

    monkeypatch.setattr(api.engine, "submit", submit)
    assert api.complete(stream=stream).status_code == status
