"""A worker's line to the supervisor, with a socket of the test's in the supervisor's place."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq
from cupy_engine.server import roster_client, wire
from cupy_engine.server.deployment import Deployment, LoadRequest, Outcome, Roster, command_decoder
from cupy_engine.server.roster_client import RosterClient
from cupy_engine.server.supervisor_socket import CONTROL_SOCKET
from live_server import wait_until


class FakeSupervisor:
    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: Path) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.socket.bind(wire.address(folder, CONTROL_SOCKET))

    def receive_load(self) -> tuple[bytes, LoadRequest]:
        while True:
            assert self.socket.poll(5000)
            sender, payload = self.socket.recv_multipart()
            command = command_decoder.decode(payload)
            if isinstance(command, LoadRequest):
                return sender, command

    def say(self, listener: bytes, reply: Roster | Outcome) -> None:
        self.socket.send_multipart((listener, wire.encode(reply)))


@pytest.fixture
def folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="ce-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def supervisor(folder: Path) -> Iterator[FakeSupervisor]:
    with zmq.Context() as context:
        fake = FakeSupervisor(context, folder)
        yield fake
        fake.socket.close(linger=0)


@pytest.fixture
def client(folder: Path) -> Iterator[RosterClient]:
    client = RosterClient(folder, restart=lambda: None)
    yield client
    client.close()


def test_a_command_returns_when_it_has_been_carried_out(client: RosterClient, supervisor: FakeSupervisor) -> None:
    with ThreadPoolExecutor(1) as pool:
        for error in (None, "no memory"):
            loading = pool.submit(client.load, Deployment(name="m"), 5)
            sender, command = supervisor.receive_load()
            assert command.deployment.name == "m"
            supervisor.say(sender, Roster(supervisor=1))
            assert not loading.done()
            supervisor.say(sender, Outcome(command.token, error))
            assert loading.result(5) == error


def test_a_command_that_dies_with_its_supervisor_is_given_up(client: RosterClient, supervisor: FakeSupervisor) -> None:
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(client.load, Deployment(name="m"), 60)
        sender, _ = supervisor.receive_load()
        supervisor.say(sender, Roster(supervisor=1))
        supervisor.say(sender, Roster(supervisor=2))
        assert "try again" in (loading.result(5) or "")


def test_a_silent_supervisor_is_asked_to_be_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster_client, "SILENCE_LIMIT_S", 0.1)
    calls: list[int] = []

    def restart() -> None:
        calls.append(1)
        raise OSError("no process is to be had")

    client = RosterClient(folder, restart)
    client.connect()
    wait_until(lambda: bool(calls), 5, "called")
    client.close()
