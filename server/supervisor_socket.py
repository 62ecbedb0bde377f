"""The supervisor's end of the line to the workers: commands in, outcomes back, the roster to everybody."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec
import zmq

from . import wire
from .deployment import Outcome, Roster, SupervisorCommand, command_decoder

logger = logging.getLogger(__name__)

CONTROL_SOCKET = "control.sock"


class SupervisorSocket:
    """Whoever has asked for the roster once is told of every change, until it is gone."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: Path) -> None:
        self.source = context.socket(zmq.ROUTER)
        self.source.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.source.setsockopt(zmq.LINGER, 0)
        path = folder / CONTROL_SOCKET
        path.unlink(missing_ok=True)
        self.source.bind(wire.address(folder, CONTROL_SOCKET))
        self._told: dict[bytes, Roster | None] = {}

    def receive(self) -> list[tuple[bytes, SupervisorCommand]]:
        """All commands that have come, each with its sender."""
        commands = []
        while True:
            try:
                sender, payload = self.source.recv_multipart(zmq.DONTWAIT)
                commands.append((sender, command_decoder.decode(payload)))
            except zmq.Again:
                return commands
            except (ValueError, msgspec.DecodeError) as error:
                logger.error("unreadable command dropped: %s", error)
                continue
            self._told[sender] = None

    def send(self, outcomes: Sequence[tuple[bytes, Outcome]], roster: Roster) -> None:
        """Tell the roster to those who do not know it yet, then send the outcomes."""
        for listener, told in list(self._told.items()):
            if told != roster:
                self._told[listener] = roster
                self._send(listener, roster)
        for listener, outcome in outcomes:
            self._send(listener, outcome)

    def _send(self, listener: bytes, reply: Roster | Outcome) -> None:
        try:
            self.source.send_multipart((listener, wire.encode(reply)), zmq.DONTWAIT)
        except zmq.ZMQError:  # a worker that is gone
            self._told.pop(listener, None)

    def close(self) -> None:
        self.source.close()
