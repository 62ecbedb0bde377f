"""Who has hung up is told once, and nobody else is taken for them."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from cupy_engine.server.client_watcher import ClientWatcher

TIMEOUT_S = 5.0


class Client:
    """A watched connection. ``has_left``: its watcher was told so, and then waits for ``may_go_on``."""

    def __init__(self, watcher: ClientWatcher, sockets: ExitStack, descriptor: int | None = None) -> None:
        server_side, client_side = socket.socketpair()
        if descriptor is not None:
            os.dup2(server_side.fileno(), descriptor)
            server_side.close()
            server_side = socket.socket(fileno=descriptor)
        self.server_side = sockets.enter_context(server_side)
        self.client_side = sockets.enter_context(client_side)
        self.has_left = threading.Event()
        self.may_go_on = threading.Event()
        watcher.watch(self.server_side, self._leave)

    def _leave(self) -> None:
        self.has_left.set()
        self.may_go_on.wait(TIMEOUT_S)

    def await_left(self) -> None:
        assert self.has_left.wait(TIMEOUT_S)


@pytest.fixture
def sockets() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_client_that_leaves_is_told_of_until_forgotten(sockets: ExitStack) -> None:
    watcher = ClientWatcher()
    forgotten, other = Client(watcher, sockets), Client(watcher, sockets)
    watcher.forget(forgotten.server_side)
    forgotten.client_side.close()
    other.client_side.close()
    other.await_left()
    assert not forgotten.has_left.is_set()
    other.may_go_on.set()


def test_a_descriptor_s_next_owner_is_not_taken_for_the_one_who_left(sockets: ExitStack) -> None:
    watcher = ClientWatcher()
    busy, first, old = (Client(watcher, sockets) for _ in range(3))
    busy.client_side.close()
    busy.await_left()
    first.client_side.close()
    old.client_side.close()
    busy.may_go_on.set()
    first.await_left()  # the watcher has been told of both, and is busy with the first
    descriptor = old.server_side.fileno()
    watcher.forget(old.server_side)
    old.server_side.close()
    new = Client(watcher, sockets, descriptor)
    first.may_go_on.set()
    last = Client(watcher, sockets)
    last.client_side.close()
    last.await_left()
    assert not new.has_left.is_set()
    assert not old.has_left.is_set()
    last.may_go_on.set()
    new.client_side.close()
    new.await_left()
    new.may_go_on.set()
