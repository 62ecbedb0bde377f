"""Several models, versions and replicas behind one server, changed while it runs."""

from __future__ import annotations

import errno
import json
import os
import signal
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cupy_engine.server.cli import main
from cupy_engine.server.deployment import Deployment, ReplicaStatus
from cupy_engine.server.model_directory import choose_version
from cupy_engine.server.models_file import read_models_file
from cupy_engine.server.prefix_index import PrefixIndex
from cupy_engine.server.replica_pool import ReplicaPool
from cupy_engine.server.request_ids import RequestIds
from fake_engine import FakeEngineClient, says
from live_server import TINY, LiveServer, long_model_options, wait_until

from cupy_engine.errors import ConfigError

GPT2 = TINY.parent / "gpt2"
PROMPT = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0}
LONG = {"prompt": [5, 6, 7], "max_tokens": 480, "ignore_eos": True}
ADMIN = "admin-secret"
FILE = f"""
workers = 2
admin_keys = ["{ADMIN}"]

[[models]]
name = "one"
model = "{TINY}"
replicas = 2

[[models]]
name = "two"
version = "a"
weight = 3
model = "{TINY}"

[[models]]
name = "two"
version = "b"
model = "{GPT2}"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    path = tmp_path_factory.mktemp("models") / "models.toml"
    path.write_text(FILE)
    with LiveServer.serve("--config", str(path)) as live:
        yield live


def admin(server: LiveServer, path: str, body: object = None, key: str = ADMIN) -> tuple[int, Any]:
    data = b"" if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def complete(server: LiveServer, model: str | None, **fields: object) -> tuple[int, Any]:
    return server.call("/v1/completions", PROMPT | {"model": model} | fields)


def test_a_request_s_model_answers(server: LiveServer) -> None:
    names = [card["id"] for card in server.call("/v1/models")[1]["data"]]
    assert names == ["one", "two", "two@a", "two@b"]
    for name in ("one", "two@a", "two@b"):
        status, answer = complete(server, name)
        assert (status, answer["model"]) == (200, name)
    assert complete(server, None)[1]["model"] == "one", "the first, where none is named"
    assert complete(server, "three")[0] == 404
    assert server.call("/health") == (200, {"status": "ok", "models": {"one": "ok", "two@a": "ok", "two@b": "ok"}})
    page = server.call("/metrics")[1]
    assert page.count("\ncupy_engine:engine_up{") == 4


def test_users_keep_their_version(server: LiveServer) -> None:
    for user in ("ann", "bob", "cem", "dan"):
        assert len({complete(server, "two", user=user)[1]["model"] for _ in range(4)}) == 1


def test_a_replica_that_dies_is_not_missed(server: LiveServer) -> None:
    folder = next(path for path in server.tmp.iterdir()) / "e0"
    (engine,) = [pid for pid, command in server.pids().items() if f"{folder} " in command]
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(server.call, "/v1/completions", LONG | {"model": "one"}) for _ in range(16)]
        os.kill(engine, signal.SIGKILL)
        assert Counter(call.result()[0] for call in calls) == {200: 16}
    wait_until(lambda: len(server.engine_pids()) == 4, 20, "it has a successor")
    wait_until(lambda: server.status("/health") == 200, 20, "well")


def test_models_come_and_go_while_others_answer(server: LiveServer) -> None:
    num_engines = len(server.engine_pids())
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(server.call, "/v1/completions", LONG | {"model": "one"}) for _ in range(8)]
        assert admin(server, "/v1/models/new/load", {"model": str(GPT2)}) == (200, {"id": "new", "status": "loaded"})
        assert len(server.engine_pids()) == num_engines + 1
        for _ in range(8):  # whichever worker answers
            assert complete(server, "new")[0] == 200
        stream = server.open_running_stream(LONG | {"model": "new"})
        assert admin(server, "/v1/models/new/unload")[0] == 200
        with stream:
            assert b"[DONE]" in read_all(stream), "what ran could finish"
        assert len(server.engine_pids()) == num_engines
        for _ in range(8):
            assert complete(server, "new")[0] == 404
        assert {call.result()[0] for call in others} == {200}
    assert admin(server, "/v1/models/new/unload")[0] == 404


def read_all(stream: Any) -> bytes:
    answer = b""
    while b"[DONE]" not in answer and (piece := stream.recv(65536)):
        answer += piece
    return answer


def test_a_model_is_swapped_without_a_gap(server: LiveServer) -> None:
    assert admin(server, "/v1/models/swap/load", {"model": str(TINY)})[0] == 200
    before = complete(server, "swap")[1]["choices"][0]["token_ids"]
    with ThreadPoolExecutor(1) as pool:
        swap = pool.submit(admin, server, "/v1/models/swap/load", {"model": str(GPT2)})
        while not swap.done():
            assert complete(server, "swap")[0] == 200
        assert swap.result()[0] == 200
    wait_until(lambda: complete(server, "swap")[1]["choices"][0]["token_ids"] != before, 5, "the new one answers")
    assert admin(server, "/v1/models/swap/unload")[0] == 200


def test_replicas_and_weights_change_in_place(server: LiveServer) -> None:
    wait_until(lambda: len(server.engine_pids()) == 4, 10, "engines that leave have gone")
    engines = set(server.engine_pids())
    assert admin(server, "/v1/models/two@a/load", {"replicas": 2, "weight": 0})[0] == 200
    assert engines < set(server.engine_pids())
    wait_until(
        lambda: {complete(server, "two")[1]["model"] for _ in range(8)} == {"two@b"}, 5, "no weight, no requests"
    )
    assert complete(server, "two@a")[0] == 200
    assert admin(server, "/v1/models/two@a/load", {"replicas": 1, "weight": 3})[0] == 200
    wait_until(lambda: set(server.engine_pids()) == engines, 10, "the second has gone")


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/models/x/load", {"model": "no-such-model"}, 400, "no model 'no-such-model'"),
        ("/v1/models/x/load", {"model": str(TINY), "max_num_seqs": 0}, 400, "max_num_seqs"),
        ("/v1/models/x/load", {"model": str(TINY), "nonsense": 1}, 400, "nonsense"),
        ("/v1/models/x/load", {"model": str(TINY), "replicas": "2"}, 400, "replicas"),
        ("/v1/models/x/load", {"model": str(TINY), "name": "y"}, 400, "path"),
        ("/v1/models/x/load", [1], 400, "object"),
        ("/v1/models/x@/load", {"model": str(TINY), "weight": -1}, 400, "weight"),
        ("/v1/models/x/load", {"model": str(TINY), "num_kv_blocks": 1, "max_model_len": 512}, 500, ""),
        ("/v1/models/x/unload", None, 404, "not loaded"),
    ],
)
def test_bad_loads(server: LiveServer, path: str, body: object, status: int, words: str) -> None:
    found, answer = admin(server, path, body)
    assert found == status, answer
    assert words in answer["error"]["message"]
    assert "x" not in [card["id"] for card in server.call("/v1/models")[1]["data"]]
    assert server.status("/health") == 200


def test_only_an_administrator_may(server: LiveServer) -> None:
    for key in ("", "wrong"):
        assert admin(server, "/v1/models/one/unload", key=key)[0] == 401
    assert complete(server, "one")[0] == 200


def test_plain_gunicorn_serves_a_file_and_all_workers_learn_of_changes(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(f"admin_keys = ['{ADMIN}']\n[[models]]\nname = 'one'\nmodel = '{TINY}'\n")
    options = ("-w", "2", "-c", "python:cupy_engine.server.gunicorn_conf")
    with LiveServer.gunicorn(*options, app=f"config={str(path)!r}") as server:
        assert admin(server, "/v1/models/new/load", {"model": str(GPT2)})[0] == 200
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        wait_until(lambda: len(server.worker_pids()) == 2, 10, "the worker is replaced")
        wait_until(lambda: all(complete(server, "new")[0] == 200 for _ in range(8)), 10, "its successor knows, too")
        os.kill(server.supervisor_pid(), signal.SIGKILL)
        wait_until(lambda: server.status("/ready") == 503, 10, "not well")
        wait_until(lambda: server.status("/ready") == 200, 20, "well again")
        assert {complete(server, name)[0] for name in ("one", "new")} == {200}, "the successor serves what was served"
        assert server.end() == 0
        server.assert_no_trace()


@pytest.mark.parametrize("options", [("--max-num-seqs", "3"), (str(TINY),)])
def test_options_of_an_engine_belong_into_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    path = tmp_path / "models.toml"
    path.write_text(f"[[models]]\nmodel = '{TINY}'\n")
    assert main(["serve", "--config", str(path), *options]) == 1
    assert "belongs into the file" in capsys.readouterr().err


def test_weights_share_out_users_and_move_few_of_them() -> None:
    users = [f"user {n}" for n in range(2000)]

    def chosen(weight: float) -> list[str]:
        versions = [Deployment(name="m", version="a", weight=weight), Deployment(name="m", version="b")]
        return [choose_version(versions, user).version for user in users]

    even, canary = chosen(1), chosen(9)
    assert 900 < even.count("a") < 1100
    assert 1740 < canary.count("a") < 1860
    assert all(after == "a" for before, after in zip(even, canary, strict=True) if before == "a"), "only to what grew"
    anonymous = [choose_version([Deployment(name="m", version=v) for v in "ab"], None).version for _ in range(400)]
    assert 120 < anonymous.count("a") < 280


def test_prefixes_are_known_to_all_workers(tmp_path: Path) -> None:
    index, other_worker = PrefixIndex(tmp_path), PrefixIndex(tmp_path)
    prompt = list(range(100))
    index.note(prompt, "", 11)
    other_worker.note(prompt[:64], "", 12)
    for each in (index, other_worker):
        assert each.num_known_tokens(prompt, "", [11, 12, 13]) == {11: 96, 12: 64, 13: 0}
        assert each.num_known_tokens([9, *prompt], "", [11]) == {11: 0}
        assert each.num_known_tokens(prompt[:31], "", [11]) == {11: 0}
        assert each.num_known_tokens(prompt, "another tenant", [11]) == {11: 0}


def test_the_oldest_prefixes_go_and_do_not_hide_longer_ones(tmp_path: Path) -> None:
    index, prompt = PrefixIndex(tmp_path, num_slots=256), list(range(320))
    index.note(prompt, "", 11)
    for start in range(1000, 101_000, 1000):
        index.note(list(range(start, start + 32)), "", 11)
    assert index.num_known_tokens(prompt, "", [11])[11] in range(32, 321, 32)
    for start in range(10**6, 2 * 10**6, 1000):
        index.note(list(range(start, start + 96)), "", 11)
    assert index.num_known_tokens(prompt, "", [11]) == {11: 0}


def test_without_room_for_prefixes_load_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_room(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def make_client(_: Path) -> FakeEngineClient:
        client = FakeEngineClient(says([1]))
        client.on_ready = []
        return client

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    pool = ReplicaPool(make_client, RequestIds())
    pool.update([ReplicaStatus(folder=str(tmp_path / name), state="ready") for name in ("e0", "e1")])
    assert pool.state == "ready"
    assert len(pool.replicas) == 2
    assert "by load alone" in caplog.text


def test_a_conversation_stays_where_its_prefix_is_whoever_takes_its_requests(tmp_path: Path) -> None:
    """Each turn comes over a connection of its own, so that any worker may get it."""
    options = long_model_options(tmp_path)[:-2]
    tokens = [n % 97 for n in range(160)]
    with LiveServer.serve(*options, "--replicas", "2", "--workers", "4") as server:
        for turn in range(8):
            status, answer = server.call(
                "/v1/completions", {"prompt": tokens, "max_tokens": 32, "return_token_ids": True, "ignore_eos": True}
            )
            assert status == 200
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert cached == (len(tokens) - 16 if turn else 0), "all but the block that was not full"
            tokens += answer["choices"][0]["token_ids"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"no \[\[models\]\]"),
        ("[[models", "cannot read"),
        ("models=[3]", "models: each must be a table of options, got 3"),
        ("[[models]]\nname='a b'\n", "name: "),
        ("[[models]]\nmodel='m'\nmax_num_seqs=0\n", r"max_num_seqs: .*model m"),
        ("[[models]]\nmodel='m'\nnonsense=0\n", r"nonsense: no such option; .* \(model m\)"),
        ("[[models]]\nmodel='m'\n[[models]]\nmodel='m'\n", "there 2 times"),
        ("[[models]]\nmodel='m'\nmax_num_seq=1\n", r"max_num_seq: no such option; did you mean max_num_seqs"),
        ("nonsense=1\n[[models]]\nmodel='m'\n", "nonsense: no such option"),
        ("[[models]]\nmodel='m'\ngpus=['a']\n", "gpus"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "models.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_models_file(path)
