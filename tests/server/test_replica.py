"""One engine's life under its supervisor, by a clock and a process that the test moves."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from pathlib import Path

import pytest
from cupy_engine.server.deployment import Deployment, SupervisorPlan
from cupy_engine.server.replica import DUMP_TIME_S, END_MARGIN_S, ENGINE_LOCK, Replica, await_orphans
from cupy_engine.server.restart_delays import RestartDelays
from cupy_engine.server.runtime_folder import try_lock
from cupy_engine.server.wire import ERROR_FILE, EngineStatus

STUCK = EngineStatus(state="ready", turn_age_s=61)


def test_delays_grow_to_a_limit_and_end() -> None:
    delays = RestartDelays(max_in_a_row=10)
    row = [delays.next_s(ready_s=1) for _ in range(12)]
    assert row == [0, 0.5, 1, 2, 4, 8, 16, 30, 30, 30, None, None]


def test_no_restart_and_a_million() -> None:
    assert RestartDelays(max_in_a_row=0).next_s(ready_s=1000) is None
    endless = RestartDelays(max_in_a_row=1_000_000)
    assert [endless.next_s(ready_s=0) for _ in range(5000)][-1] == 30


def test_a_while_of_being_well_begins_a_new_row() -> None:
    delays = RestartDelays(max_in_a_row=3)
    assert [delays.next_s(ready_s) for ready_s in (0, 0, 59.9, 60, 0, 0, 1000, 0, 0, 0)] == [
        *(0, 0.5, 1),
        *(0, 0.5, 1),
        *(0, 0.5, 1, None),
    ]


class FakeProcess:
    """What Replica asks of a Popen."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.code: int | None = None
        self.signals: list[int] = []

    def poll(self) -> int | None:
        return self.code

    def send_signal(self, number: int) -> None:
        self.signals.append(number)

    def kill(self) -> None:
        self.code = -signal.SIGKILL


class FakePulse:
    def __init__(self) -> None:
        self.status: EngineStatus | None = EngineStatus(state="loading")
        self.silent_s = 0.0

    def beat(self, elapsed_s: float) -> None:
        pass

    def close(self) -> None:
        pass


class Bench:
    """A replica; its processes and their pulses are the last of each list. ``start_times_s``: one per process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, max_restarts: int) -> None:
        self.now_s = 0.0
        self.processes: list[FakeProcess] = []
        self.pulses: list[FakePulse] = []
        self.start_times_s: list[float] = []
        self.spawn_error: OSError | None = None
        monkeypatch.setattr(Replica, "_spawn", lambda _, lock: self._spawn())
        monkeypatch.setattr("cupy_engine.server.replica.Pulse", lambda *_: self._pulse())
        plan = SupervisorPlan(deployments=[], drain_timeout_s=5, max_engine_restarts=max_restarts)
        self.replica = Replica(
            folder / "e0", Deployment(name="m"), plan, gpu=None, context=None, owner=0, clock=lambda: self.now_s
        )

    def _spawn(self) -> FakeProcess:
        if self.spawn_error is not None:
            raise self.spawn_error
        self.start_times_s.append(self.now_s)
        self.processes.append(FakeProcess())
        return self.processes[-1]

    def _pulse(self) -> FakePulse:
        self.pulses.append(FakePulse())
        return self.pulses[-1]

    @property
    def state(self) -> str:
        return self.replica.status.state

    def wait(self, duration_s: float) -> None:
        """In steps of 0.1 s."""
        end_s = self.now_s + duration_s
        while self.now_s < end_s - 1e-6:
            self.now_s = round(self.now_s + 0.1, 6)
            self.replica.tick(0.1)

    def get_ready(self) -> None:
        self.replica.tick(0)
        self.pulses[-1].status = EngineStatus(state="ready")
        self.replica.tick(0)
        assert self.state == "ready"

    def die(self, code: int = -signal.SIGKILL) -> None:
        self.processes[-1].code = code
        self.replica.tick(0)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch, max_restarts=10)


def test_it_is_started_after_growing_delays_and_then_stays_down(bench: Bench) -> None:
    bench.get_ready()
    for _ in range(11):
        bench.die()
        bench.wait(40)
    gaps_s = [later - before for before, later in itertools.pairwise(bench.start_times_s)]
    assert bench.start_times_s[0] == 0
    waits_s = [0.1, 0.5, 1, 2, 4, 8, 16, 30, 30, 30]  # "at once" is at the next tick
    lived_s = [0, *(40 - wait_s for wait_s in waits_s)]
    assert gaps_s == pytest.approx([lived + wait_s for lived, wait_s in zip(lived_s, waits_s, strict=False)])
    assert (bench.state, bench.replica.is_over, bench.replica.could_not_load) == ("failed", True, False)
    assert bench.replica.status.error == "the engine ended 11 times in a row"
    assert bench.replica.status.num_restarts == 10


def test_after_a_minute_of_being_ready_it_is_started_at_once_again(bench: Bench) -> None:
    bench.get_ready()
    for _ in range(3):
        bench.die()
        bench.wait(2)
    bench.get_ready()
    bench.wait(59.5)
    bench.die()
    bench.wait(1.9)
    assert len(bench.processes) == 4, "the row went on: 2 s"
    bench.wait(0.1)
    bench.get_ready()
    bench.wait(60)
    bench.die()
    bench.wait(0.1)
    assert len(bench.processes) == 6


def test_time_without_being_ready_does_not_count(bench: Bench) -> None:
    bench.get_ready()
    bench.die()
    bench.wait(1000)
    bench.die()
    bench.wait(0.4)
    assert len(bench.processes) == 2
    bench.wait(0.1)
    assert len(bench.processes) == 3


def test_a_first_start_that_fails_is_final(bench: Bench, tmp_path: Path) -> None:
    bench.replica.tick(0)
    (tmp_path / "e0" / ERROR_FILE).write_text("no such model")
    bench.die(1)
    bench.wait(100)
    assert (bench.state, bench.replica.status.error) == ("failed", "no such model")
    assert bench.replica.could_not_load
    assert len(bench.processes) == 1


def test_a_first_start_under_a_successor_may_fail(bench: Bench) -> None:
    bench.replica.take_over()
    bench.replica.tick(0)
    assert bench.state == "restarting"
    bench.die(1)
    assert not bench.replica.could_not_load
    bench.wait(0.1)
    bench.get_ready()
    assert len(bench.processes) == 2


def test_a_process_that_cannot_be_had_is_tried_again(bench: Bench) -> None:
    bench.get_ready()
    bench.spawn_error = BlockingIOError(11, "Resource temporarily unavailable")
    bench.die()
    bench.wait(1)
    assert (bench.state, bench.replica.status.num_restarts) == ("restarting", 3)
    bench.spawn_error = None
    bench.wait(2)
    bench.get_ready()
    assert len(bench.processes) == 2


@pytest.mark.parametrize(("status", "silent_s"), [(STUCK, 0.0), (EngineStatus(state="ready"), 10.1)])
def test_one_that_is_stuck_says_where_and_is_ended(bench: Bench, status: EngineStatus, silent_s: float) -> None:
    bench.get_ready()
    bench.pulses[-1].status, bench.pulses[-1].silent_s = status, silent_s
    bench.wait(DUMP_TIME_S)
    (stuck,) = bench.processes
    assert (stuck.signals, stuck.code) == ([signal.SIGUSR1], None)
    bench.wait(0.3)
    assert stuck.code == -signal.SIGKILL
    assert len(bench.processes) == 2


def test_one_that_loads_may_take_its_time(bench: Bench) -> None:
    bench.replica.tick(0)
    bench.pulses[-1].silent_s = 3600
    bench.wait(100)
    assert bench.processes[0].signals == []


def test_a_successor_waits_for_engines_that_still_end(tmp_path: Path) -> None:
    (tmp_path / "e7").mkdir()
    lock = try_lock(tmp_path / "e7" / ENGINE_LOCK)
    assert lock is not None
    waiting = threading.Thread(target=await_orphans, args=(tmp_path,))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    os.close(lock)
    waiting.join(3)
    assert not waiting.is_alive()


def test_stopping_takes_no_longer_than_allowed(bench: Bench) -> None:
    bench.get_ready()
    bench.replica.stop(signal.SIGTERM)
    bench.wait(5 + END_MARGIN_S - 0.1)
    (process,) = bench.processes
    assert (process.signals, process.code) == ([signal.SIGTERM], None)
    assert not bench.replica.is_over
    bench.wait(0.2)
    assert process.code == -signal.SIGKILL
    assert bench.replica.is_over
    bench.wait(100)
    assert len(bench.processes) == 1
