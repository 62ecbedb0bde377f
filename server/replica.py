"""One engine process and its successors: started, watched, ended, started again."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from .deployment import Deployment, ReplicaState, ReplicaStatus, SupervisorPlan
from .engine_status import ORPHAN_GRACE_S
from .pulse import MAX_SILENCE_S, Pulse
from .restart_delays import RestartDelays
from .runtime_folder import try_lock
from .wire import CONFIG_FILE, ENGINE_SOCKET, ERROR_FILE, STATUS_SOCKET

logger = logging.getLogger(__name__)

ENGINE_LOCK = "engine.lock"  # held by an engine process, as long as it lives
END_MARGIN_S = 3.0
DUMP_TIME_S = 0.3


def await_orphans(folder: Path) -> None:
    """Wait until the engines of a supervisor that was killed have ended, as they do, and given back their memory.

    Args:
        folder: the supervisor's.
    """
    deadline_s = time.monotonic() + ORPHAN_GRACE_S + END_MARGIN_S
    for path in folder.glob(f"*/{ENGINE_LOCK}"):
        while (lock := try_lock(path)) is None and time.monotonic() < deadline_s:
            time.sleep(0.02)
        if lock is not None:
            os.close(lock)


@dataclass(slots=True)
class _Process:
    """A running engine process. ``pidfd`` becomes readable when it ends."""

    popen: subprocess.Popen[bytes]
    pidfd: int
    pulse: Pulse
    ready_since_s: float | None = None
    kill_at_s: float | None = None

    def close(self) -> None:
        self.pulse.close()
        os.close(self.pidfd)


class Replica:
    """Keeps one engine running until it is told to stop.

    A first start that fails is final: the model cannot be served. Later ones are tried again, with RestartDelays,
    ``plan.max_engine_restarts`` times in a row.

    Args:
        folder: where it and its processes meet its clients.
        owner: a pidfd: its processes end when that process does.
    """

    def __init__(
        self,
        folder: Path,
        deployment: Deployment,
        plan: SupervisorPlan,
        *,
        gpu: int | None,
        context: zmq.Context[zmq.Socket[bytes]],
        owner: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._name = f"{deployment.id} ({folder.name})"
        self._plan = plan
        self._gpu = gpu
        self._context = context
        self._owner = owner
        self._clock = clock
        self._process: _Process | None = None
        self._start_at_s = clock()
        self._delays = RestartDelays(plan.max_engine_restarts)
        self._was_ready = False
        self._state: ReplicaState = "loading"
        self._num_restarts = 0
        self._error: str | None = None
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / CONFIG_FILE).write_bytes(msgspec.json.encode(deployment.engine_config().to_dict()))

    def take_over(self) -> None:
        """A predecessor of this supervisor has had it ready: a first start that fails is not final."""
        self._state, self._was_ready = "restarting", True

    @property
    def status(self) -> ReplicaStatus:
        return ReplicaStatus(
            folder=str(self._folder), state=self._state, num_restarts=self._num_restarts, error=self._error
        )

    @property
    def is_over(self) -> bool:
        """Whether nothing runs, and nothing will be started."""
        return self._process is None and self._state in ("stopping", "failed")

    @property
    def could_not_load(self) -> bool:
        return self._state == "failed" and not self._was_ready

    @property
    def pidfd(self) -> int | None:
        return None if self._process is None else self._process.pidfd

    def tick(self, elapsed_s: float) -> None:
        """Look after the process. ``elapsed_s``: since the last tick."""
        if self._process is None:
            if self._state in ("loading", "restarting") and self._clock() >= self._start_at_s:
                self._start()
        elif (code := self._process.popen.poll()) is not None:
            self._on_exit(code)
        else:
            self._watch(self._process, elapsed_s)

    def stop(self, number: signal.Signals) -> None:
        """End. SIGTERM: what runs may finish within ``plan.drain_timeout_s``. SIGQUIT: now. By force if need be."""
        if self._state != "failed":
            self._state = "stopping"
        if (process := self._process) is not None:
            drain_s = self._plan.drain_timeout_s if number == signal.SIGTERM else 0.0
            kill_at_s = self._clock() + drain_s + END_MARGIN_S
            process.kill_at_s = min(process.kill_at_s or kill_at_s, kill_at_s)
            process.popen.send_signal(number)

    def _start(self) -> None:
        try:
            lock = try_lock(self._folder / ENGINE_LOCK)
            if lock is None:  # the engine of a supervisor that was killed is still ending
                return
            try:
                for name in (ENGINE_SOCKET, STATUS_SOCKET, ERROR_FILE):
                    (self._folder / name).unlink(missing_ok=True)
                popen = self._spawn(lock)
            finally:
                os.close(lock)
        except OSError as error:  # no process, no memory, no descriptor is to be had: other engines go on
            self._after_end(f"not been started ({error})", ready_s=0.0)
            return
        self._process = _Process(popen, os.pidfd_open(popen.pid), Pulse(self._context, self._folder))

    def _spawn(self, lock: int) -> subprocess.Popen[bytes]:
        """A fresh interpreter in its own session, out of reach of the terminal's Ctrl-C."""
        arguments = [str(self._folder), str(self._owner), str(self._plan.drain_timeout_s)]
        gpu = {} if self._gpu is None else {"CUDA_VISIBLE_DEVICES": str(self._gpu)}
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "cupy_engine.server.engine_process", *arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=(lock, self._owner),
            start_new_session=True,
            env={**os.environ, **gpu},
        )

    def _watch(self, process: _Process, elapsed_s: float) -> None:
        now_s = self._clock()
        process.pulse.beat(elapsed_s)
        status = process.pulse.status
        if status is not None and status.state == "ready" and process.ready_since_s is None:
            process.ready_since_s = now_s
            self._on_ready()
        if process.kill_at_s is not None:
            if now_s >= process.kill_at_s:
                process.popen.kill()
        elif why := self._why_stuck(process.pulse):
            logger.error("engine %s %s: it is ended, and started again", self._name, why)
            with contextlib.suppress(ProcessLookupError):
                process.popen.send_signal(signal.SIGUSR1)  # it writes down where it hangs, if it still can
            process.kill_at_s = now_s + DUMP_TIME_S

    def _why_stuck(self, pulse: Pulse) -> str | None:
        """What is wrong with an engine that was ready once. One that loads may take its time."""
        limit_s = self._plan.stall_timeout_s
        if pulse.status is None or pulse.status.state == "loading":
            return None
        if pulse.silent_s > min(MAX_SILENCE_S, limit_s):
            return f"has not answered for {pulse.silent_s:.1f} s"
        if pulse.status.turn_age_s > limit_s:
            return f"has made no progress for {pulse.status.turn_age_s:.1f} s"
        return None

    def _on_ready(self) -> None:
        if self._num_restarts:
            logger.info("engine %s is back, after %d restarts in all", self._name, self._num_restarts)
        if self._state != "stopping":
            self._state = "ready"
        self._was_ready = True

    def _on_exit(self, code: int) -> None:
        process, self._process = self._process, None
        assert process is not None
        process.close()
        since_s = process.ready_since_s
        self._after_end(self._reason(code), ready_s=0.0 if since_s is None else self._clock() - since_s)

    def _after_end(self, reason: str, *, ready_s: float) -> None:
        """Decide whether there will be another process. ``reason``: what the last one has done."""
        if self._state == "stopping":
            return
        if not self._was_ready:
            self._state, self._error = "failed", reason
            return
        delay_s, delays = self._delays.next_s(ready_s), self._delays
        if delay_s is None:
            self._state, self._error = "failed", f"the engine ended {delays.num_in_a_row} times in a row"
            logger.critical("engine %s has %s; %s: it stays down", self._name, reason, self._error)
            return
        self._state, self._start_at_s = "restarting", self._clock() + delay_s
        self._num_restarts += 1
        logger.error(
            "engine %s has %s: restart %d of at most %d in a row, %s",
            self._name,
            reason,
            delays.num_in_a_row,
            delays.max_in_a_row,
            f"in {delay_s:g} s" if delay_s else "now",
        )

    def _reason(self, code: int) -> str:
        """Why a process ended: its own words, or its exit status."""
        try:
            return (self._folder / ERROR_FILE).read_text()
        except FileNotFoundError:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            return f"ended with {how}"
