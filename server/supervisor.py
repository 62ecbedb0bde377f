"""The supervisor process: keeps every engine process of a server running, and tells the workers which there are.

python -m cupy_engine.server.supervisor FOLDER OWNER_PIDFD [--quiet]

    server (gunicorn) ◀─ owner ─ supervisor ◀─ owner ─ engine processes, one per replica
    FOLDER/              private (0700), removed by whoever of supervisor and server ends last
      plan.json          the SupervisorPlan
      control.sock       SupervisorCommand ──▶  ◀── SupervisorReply, and the Roster whenever it changes
      error.txt          why the server could not start, if it could not
      e0/ e1/ …          one for each replica, see wire.py
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import zmq

from . import wire
from .fleet import Fleet
from .logs import configure_logging
from .pulse import BEAT_INTERVAL_S
from .replica import await_orphans
from .supervisor_socket import SupervisorSocket

EAGER_INTERVAL_S = 0.03  # while an engine loads, restarts or ends
OWNER_EXIT_TIMEOUT_S = 60.0


class Supervisor:
    """Runs until it is told to end or its owner is gone. SIGTERM: engines finish what runs. SIGQUIT, SIGINT: now."""

    def __init__(self, folder: Path, owner: int, *, is_quiet: bool) -> None:
        self._folder = folder
        self._owner = owner
        self._is_owner_gone = False
        self._is_quiet = is_quiet
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._signals: list[int] = []
        self._waits_for_owner_until_s = 0.0
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = SupervisorSocket(context, folder)
        self._fleet = Fleet(folder, context)

    def run(self) -> int:
        """Supervise until told to end; the exit status: 1 if the engines could not start."""
        for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT):
            signal.signal(number, self._note_signal)
        last_s = time.monotonic()
        while not self._is_over():
            self._wait()
            now_s = time.monotonic()
            for sender, command in self._socket.receive():
                self._fleet.carry_out(sender, command)
            self._fleet.tick(now_s - last_s)
            self._socket.send(self._fleet.take_outcomes(), self._fleet.roster)
            if self._fleet.fatal_error is not None and not self._fleet.is_ending:
                self._give_up(self._fleet.fatal_error)
            last_s = now_s
        return 0 if self._fleet.fatal_error is None else 1

    def close(self) -> None:
        """The folder stays as long as the owner does: a successor goes on with what it says."""
        self._socket.close()
        if self._is_owner_gone:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _is_over(self) -> bool:
        return self._fleet.is_over and time.monotonic() >= self._waits_for_owner_until_s

    def _wait(self) -> None:
        """Until a process ends, a command comes, a signal arrives, or it is time to look after the engines."""
        poller = zmq.Poller()
        for source in (self._socket.source, self._wake, self._owner, *self._fleet.pidfds()):
            poller.register(source, zmq.POLLIN)
        interval_s = BEAT_INTERVAL_S if self._fleet.is_steady else EAGER_INTERVAL_S
        ready = dict(poller.poll(int(interval_s * 1000)))
        if self._wake in ready:
            os.eventfd_read(self._wake)
        if self._owner in ready:
            self._is_owner_gone = True
            self._signals.append(signal.SIGQUIT)
        while self._signals:
            self._waits_for_owner_until_s = 0.0
            self._fleet.end(signal.SIGTERM if self._signals.pop(0) == signal.SIGTERM else signal.SIGQUIT)

    def _note_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)
        os.eventfd_write(self._wake, 1)

    def _give_up(self, reason: str) -> None:
        """Tell the owner, which cannot serve without engines, to end; wait for that, as it may ask for the reason."""
        one_line = " ".join(reason.split())
        (self._folder / wire.ERROR_FILE).write_text(one_line)
        if not self._is_quiet:
            sys.stderr.write(f"error: {one_line}\n")
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._owner, signal.SIGTERM)
        self._fleet.end(signal.SIGQUIT)
        self._waits_for_owner_until_s = time.monotonic() + OWNER_EXIT_TIMEOUT_S


def main(arguments: list[str]) -> int:
    folder, owner, *flags = arguments
    configure_logging()
    await_orphans(Path(folder))
    supervisor = Supervisor(Path(folder), int(owner), is_quiet="--quiet" in flags)
    try:
        return supervisor.run()
    finally:
        supervisor.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
