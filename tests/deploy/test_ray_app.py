"""Two replicas on a local Ray: requests are spread, answers stream, a dead server is replaced."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cupy_engine.server.ray_app import ServerThread, build, serve_arguments
from golden_data import GOLDEN

from cupy_engine.errors import ConfigError, EngineError

TINY = str(GOLDEN / "tiny" / "llama")
URL = "http://127.0.0.1:8199"
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed (pip install 'cupy-engine[ray]')"
)


def test_options_become_arguments() -> None:
    options = {"model": "m", "max_num_seqs": "8", "strict": "true", "log_requests": "false"}
    assert serve_arguments(options) == ["m", "--max-num-seqs", "8", "--strict", "--no-log-requests"]


def test_a_server_of_its_own() -> None:
    server = ServerThread([TINY, "--workers", "1"])
    server.start()
    url = server.wait_until_ready(60)
    with urllib.request.urlopen(url + "/health", timeout=5) as answer:
        assert answer.status == 200
    server.stop()
    server.join(10)
    assert not server.is_alive()


def test_why_a_server_does_not_start() -> None:
    server = ServerThread(["/no/such/model"])
    server.start()
    with pytest.raises(EngineError, match=r"did not start: error: .*/no/such/model"):
        server.wait_until_ready(60)
    server.join(10)


def test_bad_number() -> None:
    with pytest.raises(ConfigError, match="max_replicas"):
        build({"max_replicas": "many"})


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray
    from ray import serve

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"port": 8199})
    own = {"min_replicas": "2", "max_replicas": "2", "num_cpus": "0.5", "health_check_period_s": "0.5"}
    serve.run(build({"model": TINY, "workers": "1", **own}))
    yield
    serve.shutdown()
    ray.shutdown()


def complete(**fields: object) -> tuple[str, bytes]:
    """The replica that answered, and its answer."""
    body = json.dumps({"prompt": [3, 4, 5], "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}).encode()
    request = urllib.request.Request(URL + "/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.headers["X-Replica"], answer.read()


def servers() -> dict[int, int]:
    """Main processes of replicas' servers, and their parents."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, status = (folder / "cmdline").read_bytes(), (folder / "stat").read_text()
        except OSError:
            continue
        if b"cupy_engine.server.cli\0serve" in command and TINY.encode() in command:
            found[int(folder.name)] = int(status.rpartition(")")[2].split()[1])
    return found


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.usefixtures("cluster")
def test_two_replicas() -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: complete(), range(32)))
    replicas = {replica for replica, _ in answers}
    assert len(replicas) == 2, "both answer"
    tokens = {str(json.loads(body)["choices"][0]["token_ids"]) for _, body in answers}
    assert len(tokens) == 1, "and say the same"
    _, streamed = complete(stream=True)
    assert streamed.startswith(b"data: {")
    assert streamed.endswith(b"data: [DONE]\n\n")
    victim = next(pid for pid, parent in servers().items() if parent == int(min(replicas)))
    os.kill(victim, signal.SIGKILL)
    deadline_s = time.monotonic() + 90
    while len({complete_or_none() for _ in range(8)} - {None, min(replicas)}) < 2:
        assert time.monotonic() < deadline_s, "the dead replica is replaced"
        time.sleep(1)


def complete_or_none() -> str | None:
    try:
        return complete()[0]
    except OSError:
        return None
