"""The engine's end of the wire: commands in, replies out, once a step, without a thread in between."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import zmq

from cupy_engine.messages import AbortRequest, Command, GenerateRequest, Reply, SequenceOutput
from cupy_engine.overload import EngineLoad

from .wire import ENGINE_SOCKET, Delivery, address, command_decoder, encode, recipient

logger = logging.getLogger(__name__)

MAX_UNREAD_MESSAGES = 10_000


class EngineSocket:
    """An Inbox for the core loop, and the way back.

    A worker that has died, or reads nothing any more, is found out when a reply to it cannot be sent: its request is
    aborted. ``turn_s`` is when the loop last came round (monotonic). ``report_load`` says how busy the engine is, once
    there is one.
    """

    report_load: Callable[[], EngineLoad] = EngineLoad

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: Path) -> None:
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.SNDHWM, MAX_UNREAD_MESSAGES)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.bind(address(folder, ENGINE_SOCKET))
        self._orphans: list[Command] = []
        self._read: defaultdict[str, set[str]] = defaultdict(set)  # ids of requests, by worker, not yet told of
        self.turn_s = time.monotonic()

    def receive(self, timeout_s: float | None) -> list[Command]:
        """All commands that have come; waits up to ``timeout_s`` for the first (0: not at all, ``None``: for ever)."""
        self.turn_s = time.monotonic()
        commands, self._orphans = self._orphans, []
        if not commands and timeout_s != 0:
            self._socket.poll(None if timeout_s is None else int(timeout_s * 1000) + 1)
            self.turn_s = time.monotonic()
        while True:
            try:
                _, payload = self._socket.recv_multipart(zmq.DONTWAIT)
                command = command_decoder.decode(payload)
                commands.append(command)
                self._note(command)
            except zmq.Again:
                return commands
            except (ValueError, msgspec.DecodeError) as error:
                logger.error("unreadable command dropped: %s", error)

    def _note(self, command: Command) -> None:
        """Keep what a worker will be told of. A request that is given up has no replies to tell it with."""
        if isinstance(command, GenerateRequest):
            self._read[recipient(command)].add(command.request_id)
        elif isinstance(command, AbortRequest) and (ids := self._read.get(recipient(command))):
            ids.discard(command.request_id)
            if not ids:
                del self._read[recipient(command)]

    def deliver(self, replies: Sequence[Reply]) -> None:
        """Send each worker its replies, in one message, with how busy the engine is now."""
        load = self.report_load()
        for worker, mail in by_worker(replies).items():
            delivery = Delivery(mail, list(self._read.pop(worker, ())), load)
            try:
                self._socket.send_multipart((worker.encode(), encode(delivery)), zmq.DONTWAIT)
            except zmq.ZMQError as error:
                logger.warning("worker %s is gone (%s): its requests are aborted", worker, error)
                ids = {reply.request_id for reply in mail if isinstance(reply, SequenceOutput)}
                self._orphans.extend(AbortRequest(request_id=request_id) for request_id in ids)

    def close(self) -> None:
        self._socket.close()


def by_worker(replies: Sequence[Reply]) -> dict[str, list[Reply]]:
    """Replies by the routing id of who asked."""
    mail: defaultdict[str, list[Reply]] = defaultdict(list)
    for reply in replies:
        mail[recipient(reply)].append(reply)
    return mail
