"""The wire between workers and engine: both real ends, with a script in place of the core."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import zmq
from cupy_engine.server import engine_connection, wire
from cupy_engine.server.engine_client import EngineClient, EngineLostError
from cupy_engine.server.engine_socket import EngineSocket
from cupy_engine.server.engine_status import StatusThread
from cupy_engine.server.mailbox import Mailbox
from cupy_engine.server.wire import EngineStatus
from live_server import wait_until
from mail import failure_in

from cupy_engine.errors import EngineDeadError
from cupy_engine.messages import (
    AbortRequest,
    Command,
    EngineStats,
    GenerateRequest,
    SequenceOutput,
    StatsReply,
    StatsRequest,
)
from cupy_engine.overload import EngineLoad
from cupy_engine.sampling_params import SamplingParams


class ScriptedEngine:
    """Says one token per request, or nothing to those with an empty prompt; keeps every command."""

    def __init__(self, folder: Path) -> None:
        self.status = EngineStatus(state="loading")
        self.commands: list[Command] = []
        self._is_over = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._owner = os.pidfd_open(os.getpid())
        self.socket = EngineSocket(self._context, folder)
        StatusThread(self._context, folder, self._owner, lambda: self.status).start()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._is_over:
            for command in self.socket.receive(0.01):
                self.commands.append(command)
                if isinstance(command, GenerateRequest) and command.prompt_token_ids:
                    output = SequenceOutput(request_id=command.request_id, token_ids=[7], finish_reason="stop")
                    self.socket.deliver([output])
                elif isinstance(command, StatsRequest):
                    stats = EngineStats(num_running=len(self.commands))
                    self.socket.deliver([StatsReply(token=command.token, stats=stats)])

    def aborted(self) -> list[str]:
        return [command.request_id for command in self.commands if isinstance(command, AbortRequest)]

    def close(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._thread.join()
            self.socket.close()
            self._context.term()
            os.close(self._owner)


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="ce-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def engine(folder: Path) -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine(folder)
    yield engine
    engine.close()


@pytest.fixture
def client(engine: ScriptedEngine, folder: Path) -> Iterator[EngineClient]:
    client = EngineClient(folder)
    client.connect()
    engine.status = EngineStatus(state="ready", max_model_len=5)
    wait_until(lambda: client.state == "ready", 5, "ready")
    yield client
    client.close()


def request(client: EngineClient, token_ids: Sequence[int] = (1,)) -> GenerateRequest:
    return GenerateRequest(
        request_id=client.new_request_id(), prompt_token_ids=list(token_ids), params=SamplingParams()
    )


def test_requests_and_outputs(client: EngineClient, engine: ScriptedEngine) -> None:
    requests = [request(client), request(client)]
    mailbox = client.submit(requests)
    outputs = [output for _ in requests for output in mailbox.get(timeout_s=5)]
    assert {output.request_id for output in outputs} == {each.request_id for each in requests}
    assert engine.commands == requests


def test_what_the_engine_has_not_read_yet_counts_as_load(client: EngineClient, engine: ScriptedEngine) -> None:
    """A step may take longer than a status is old: 30 s here, without looking at what has come."""
    engine.status = EngineStatus(state="ready", turn_age_s=30.0, load=EngineLoad(num_free=2))
    silent = [request(client, []) for _ in range(5)]
    wait_until(lambda: client.load.num_free == 2, 5, "the status")
    client.submit(silent)
    heard_s = client._connection.heard_s
    wait_until(lambda: client._connection.heard_s > heard_s, 5, "a newer status")
    assert (client.load.num_free, client.load.num_waiting) == (0, 3)
    client.abort([silent[0].request_id])
    assert client.load.num_waiting == 2
    engine.status = EngineStatus(state="ready", load=EngineLoad(num_running=2, num_waiting=2))
    wait_until(lambda: client.load.num_running == 2, 5, "the engine has read them")
    assert client.load.num_waiting == 2


def test_nothing_is_kept_of_requests_that_were_given_up(client: EngineClient, engine: ScriptedEngine) -> None:
    """Their worker may never hear of the engine again."""
    silent = [request(client, []).request_id for _ in range(3)]
    client.send([GenerateRequest(request_id=each, prompt_token_ids=[], params=SamplingParams()) for each in silent])
    client.abort(silent[:2])
    wait_until(lambda: engine.aborted() == silent[:2], 5, "they are given up")
    assert engine.socket._read == {silent[2][:8]: {silent[2]}}
    client.abort(silent[2:])
    wait_until(lambda: engine.aborted() == silent, 5, "the last one, too")
    assert not engine.socket._read


def test_deliveries_say_how_busy_the_engine_is_and_what_it_has_read(
    client: EngineClient, engine: ScriptedEngine
) -> None:
    """No status says what has been read: all say that the loop has not come round for 30 s."""
    engine.status = EngineStatus(state="ready", turn_age_s=30.0, load=EngineLoad(num_free=9))
    wait_until(lambda: client.load.num_free == 9, 5, "the status")
    client.submit([request(client, []) for _ in range(2)])
    assert client.load.num_free == 7
    load = EngineLoad(num_running=3, num_free=5)
    engine.socket.report_load = lambda: load
    engine.status = EngineStatus(state="ready", turn_age_s=30.0, load=load)
    client.submit([request(client)]).get(timeout_s=5)
    assert client.load == load, "nothing is unread"


def test_two_workers_get_their_own_mail(client: EngineClient, folder: Path) -> None:
    other = EngineClient(folder)
    wait_until(lambda: other.state == "ready", 5, "ready")
    for each in (client, other, client):
        made = request(each)
        (output,) = each.submit([made]).get(timeout_s=5)
        assert output.request_id == made.request_id
        assert each.stats().stats.num_running
    other.close()


def test_many_threads(client: EngineClient) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(50):
                made = request(client)
                (output,) = client.submit([made]).get(timeout_s=10)
                assert output.request_id == made.request_id
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_aborts_arrive(client: EngineClient, engine: ScriptedEngine) -> None:
    made = request(client, ())
    client.submit([made])
    client.abort([made.request_id])
    wait_until(lambda: engine.aborted() == [made.request_id], 5, "aborted")


def test_a_dead_worker_s_requests_are_aborted(client: EngineClient, engine: ScriptedEngine) -> None:
    ghost = SequenceOutput(request_id=wire.request_id(0x1234, 1), token_ids=[1])
    engine.socket.deliver([ghost])
    wait_until(lambda: engine.aborted() == [ghost.request_id], 5, "aborted")
    assert client.stats()


def test_garbage_is_dropped(client: EngineClient, engine: ScriptedEngine, folder: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.connect(wire.address(folder, wire.ENGINE_SOCKET))
        for payload in ([b"\xff\xff"], [b""], [b"a", b"b"], [wire.encode({"type": "generate"})]):
            stranger.send_multipart(payload)
        time.sleep(0.1)
    assert client.submit([request(client)]).get(timeout_s=5)


def test_a_dead_engine_is_told_to_all_who_wait(client: EngineClient, engine: ScriptedEngine) -> None:
    mailbox = Mailbox()
    requests = [request(client, ()) for _ in range(3)]
    for each in requests:
        client.submit([each], mailbox)
    engine.close()
    lost = failure_in(mailbox)
    assert isinstance(lost, EngineLostError)
    assert sorted(lost.request_ids) == sorted(each.request_id for each in requests), "once, in one mail"
    assert client.state == "dead"
    with pytest.raises(EngineDeadError, match="ended"):
        client.submit([request(client)])
    with pytest.raises(EngineDeadError):
        client.stats()


def test_an_engine_that_says_it_ends_is_lost_to_those_who_wait(client: EngineClient, engine: ScriptedEngine) -> None:
    waiting, other = request(client, ()), request(client, ())
    mailbox = client.submit([waiting, other])
    last_words = [
        SequenceOutput(request_id=waiting.request_id, token_ids=[3]),
        SequenceOutput(request_id=waiting.request_id, finish_reason="error", error_kind="dead", error="good-bye"),
    ]
    engine.socket.deliver(last_words)
    assert mailbox.get(1) == last_words[:1]
    lost = failure_in(mailbox)
    assert isinstance(lost, EngineLostError)
    assert lost.request_ids == [waiting.request_id]


def test_a_new_engine_is_found(client: EngineClient, engine: ScriptedEngine, folder: Path) -> None:
    engine.close()
    wait_until(lambda: client.state == "dead", 5, "dead")
    successor = ScriptedEngine(folder)
    successor.status = EngineStatus(state="ready")
    wait_until(lambda: client.state == "ready", 5, "ready again")
    assert client.submit([request(client)]).get(timeout_s=5)
    successor.close()


def test_an_engine_that_makes_no_progress_is_stalled(client: EngineClient, engine: ScriptedEngine) -> None:
    engine.status = EngineStatus(state="ready", turn_age_s=61)
    wait_until(lambda: client.state == "stalled", 5, "stalled")
    with pytest.raises(EngineDeadError, match="no progress"):
        client.require_ready()


def test_a_silent_engine_is_unresponsive_until_its_supervisor_ends_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_connection, "SILENCE_LIMIT_S", 0.5)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as data, context.socket(zmq.ROUTER) as pulse:
        data.bind(wire.address(folder, wire.ENGINE_SOCKET))
        pulse.bind(wire.address(folder, wire.STATUS_SOCKET))
        client = EngineClient(folder)
        client.connect()
        worker, _ = pulse.recv_multipart()
        pulse.send_multipart((worker, wire.encode(EngineStatus(state="ready"))))
        mailbox = client.submit([request(client)])
        wait_until(lambda: client.state == "unresponsive", 3, "unresponsive")
        assert not client.is_ready
        with pytest.raises(queue.Empty):
            mailbox.get_nowait()
        client.close()


def test_what_was_meant_for_a_dead_engine_never_reaches_the_next(
    client: EngineClient, engine: ScriptedEngine, folder: Path
) -> None:
    engine.close()
    wait_until(lambda: client.state == "dead", 5, "dead")
    client.send([AbortRequest(request_id="late")])
    life = client._connection.life
    client._connection.send([AbortRequest(request_id="stale")], life - 1)
    successor = ScriptedEngine(folder)
    successor.status = EngineStatus(state="ready")
    wait_until(lambda: client.state == "ready", 5, "ready again")
    client.abort(["now"])
    wait_until(lambda: "now" in successor.aborted(), 5, "aborted")
    assert "stale" not in successor.aborted()
    successor.close()


def test_ready_is_told_once(engine: ScriptedEngine, folder: Path) -> None:
    client, heard = EngineClient(folder), []
    client.on_ready.append(heard.append)
    assert client.state == "loading"
    engine.status = EngineStatus(state="ready", num_kv_blocks=9)
    wait_until(lambda: bool(heard), 5, "told")
    time.sleep(0.6)
    assert [status.num_kv_blocks for status in heard] == [9]
    client.close()


def test_nobody_there_yet(folder: Path) -> None:
    client = EngineClient(folder)
    assert client.state == "starting"
    with pytest.raises(EngineDeadError, match="starting"):
        client.submit([request(client)])
    client.close()
