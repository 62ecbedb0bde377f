"""Keys, health, models, tokenizing, and what is logged."""

from __future__ import annotations

import logging
import re

import pytest
from api_client import Api, MakeApi
from cupy_engine.server.logs import line
from cupy_engine.server.models_file import split_options
from cupy_engine.server.server_config import ServerConfig

from cupy_engine import __version__
from cupy_engine.errors import ConfigError

KEY = "key-" + "x" * 20


def test_without_a_key_every_route_but_the_page_and_probes_is_closed(make_api: MakeApi) -> None:
    api = make_api(api_keys=(KEY, "another"))
    open_paths = {"/health", "/ready", "/", "/assets/style.css"}
    routes = list(api.app.url_map.iter_rules())
    assert len(routes) >= 11
    for rule in routes:
        method = "POST" if "POST" in rule.methods else "GET"
        path = re.sub("<.*?>", "style.css" if "filename" in rule.rule else "smollm2-135m", rule.rule)
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": "Basic x"}):
            with api.http.open(path, method=method, headers=headers) as response:
                assert response.status_code == (200 if path in open_paths else 401), path
    assert api.http.get("/nowhere").status_code == 401, "who has no key does not learn what exists"


ADMIN_PATHS = ("/v1/models/m/load", "/v1/models/m/unload", "/v1/models/org/m@v/unload")


@pytest.mark.parametrize("path", ADMIN_PATHS)
def test_administration_needs_a_key_of_its_own(make_api: MakeApi, path: str) -> None:
    def status(key: str | None, **keys: object) -> int:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return make_api(**keys).http.post(path, headers=headers, json=[]).status_code

    both = {"api_keys": (KEY,), "admin_keys": ("admin",)}
    assert [status(key, **both) for key in (None, "wrong", KEY)] == [401, 401, 403]
    assert [status(key, admin_keys=("admin",)) for key in (None, "wrong", KEY)] == [401] * 3
    assert [status(key) for key in (None, "", KEY)] == [403] * 3, "without such a key nobody may"
    assert [status(key, api_keys=(KEY,)) for key in (None, KEY)] == [401, 403]


def test_an_administrator_may_do_what_users_may(make_api: MakeApi) -> None:
    api = make_api(api_keys=(KEY,), admin_keys=("admin",))
    assert api.http.get("/v1/models", headers={"Authorization": "Bearer admin"}).status_code == 200


@pytest.mark.parametrize("key", [KEY, "another"])
def test_with_a_key(make_api: MakeApi, key: str) -> None:
    api = make_api(api_keys=(KEY, "another"))
    assert api.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_refused_key(make_api: MakeApi) -> None:
    response = make_api(api_keys=KEY).complete()
    assert response.status_code == 401
    assert response.get_json()["error"]["code"] == "invalid_api_key"
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert KEY not in response.get_data(as_text=True)


def test_keys_have_separate_prefix_caches(make_api: MakeApi) -> None:
    api = make_api(api_keys=("a", "b"))
    for key in ("a", "b", "a"):
        api.post("/v1/completions", {"prompt": "x"}, headers={"Authorization": f"Bearer {key}"})
    first, second, third = (request.cache_salt for request in api.engine.requests)
    assert first == third != second
    assert "" not in (first, second)


@pytest.mark.parametrize(
    ("state", "health", "ready"),
    [
        ("starting", 503, 503),
        ("loading", 503, 503),
        ("ready", 200, 200),
        ("stopping", 200, 503),
        ("stalled", 503, 503),
        ("unresponsive", 503, 503),
        ("dead", 503, 503),
    ],
)
def test_health(api: Api, state: str, health: int, ready: int) -> None:
    api.engine.fake_state = state
    response = api.http.get("/health")
    assert response.status_code == health
    assert response.get_json()["status"] == ("ok" if state == "ready" else state)
    assert api.http.get("/ready").status_code == ready


def test_version_metrics_load(api: Api) -> None:
    assert api.http.get("/version").get_json() == {"version": __version__}
    page = api.http.get("/metrics")
    assert b'cupy_engine:fake{engine="0",model_name="smollm2-135m"} 1.0' in page.data
    assert page.content_type.startswith("text/plain; version=0.0.4")
    load = api.http.get("/load").get_json()
    assert (load["server_load"], load["num_requests_running"], load["expected_wait_s"]) == (5, 2, 2.0)


def test_models(api: Api) -> None:
    listing = api.http.get("/v1/models").get_json()
    assert listing["object"] == "list"
    (card,) = listing["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("smollm2-135m", "model", 8192)
    assert api.http.get("/v1/models/smollm2-135m").get_json() == card
    missing = api.http.get("/v1/models/org/other")
    assert (missing.status_code, missing.get_json()["error"]["code"]) == (404, "model_not_found")


def test_tokenize_and_back(api: Api) -> None:
    answer = api.post("/tokenize", {"prompt": "Hello there", "return_token_strs": True}).get_json()
    assert answer["count"] == len(answer["tokens"]) == 2
    assert answer["token_strs"] == ["Hello", " there"]
    assert answer["max_model_len"] == 8192
    assert api.post("/detokenize", {"tokens": answer["tokens"]}).get_json() == {"prompt": "Hello there"}


def test_tokenize_a_conversation(api: Api) -> None:
    answer = api.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]}).get_json()
    text = api.post("/detokenize", {"tokens": answer["tokens"]}).get_json()["prompt"]
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [49152]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
    ],
)
def test_bad_tokenizing(api: Api, path: str, body: dict[str, object], param: str) -> None:
    response = api.post(path, body)
    assert (response.status_code, response.get_json()["error"]["param"]) == (400, param)


def test_log_has_figures_and_no_text(make_api: MakeApi, caplog: pytest.LogCaptureFixture) -> None:
    api = make_api()
    with caplog.at_level(logging.INFO):
        api.complete(prompt="my secret", request_id="r1")
    (record,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("request ")]
    assert "id=cmpl-r1 model=smollm2-135m prompts=1 prompt_tokens=2" in record
    assert "finish=stop" in record
    assert "secret" not in record
    assert "Paris" not in record


def test_log_lines_stay_one_line() -> None:
    assert str(line("request", id="a b", x="c\nd", t=1.26)) == 'request id="a b" x="c\\nd" t=1.3'


def test_options_are_sorted_and_checked() -> None:
    (deployment,), server = split_options({"model": "m", "max_num_seqs": 3, "strict": True})
    engine = deployment.engine_config()
    assert (engine.model, engine.max_num_seqs, server.strict) == ("m", 3, True)
    for options, field in [
        ({"nonsense": 1}, "nonsense"),
        ({"max_n": 17}, "max_n"),
        ({"request_timeout_s": 0}, "request_timeout_s"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"api_keys": [""]}, "api_keys"),
        ({"api_keys": ["a\nb"]}, "api_keys"),
    ]:
        with pytest.raises(ConfigError) as caught:
            split_options(options)
        assert caught.value.field == field


def test_one_key_may_be_a_string() -> None:
    assert ServerConfig(api_keys="abc").api_keys == ("abc",)  # type: ignore[arg-type]
