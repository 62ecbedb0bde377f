"""How long the host works on a step.

    engine's thread   | update n-1, outputs, schedule n+1, submit n+1 | wait for n |
                      |---------------------- turn ------------------|

A turn is the wall time between two results less the wait for the second one. In it the thread also waits for Python's
lock, which whoever collects the outputs in the same process holds as well (in a server nobody does). Work is the CPU
time of the thread in a turn, and so are the parts of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from cupy_engine.core import EngineCore
from cupy_engine.executor import StepHandle
from cupy_engine.plan import StepPlan, StepResult

from .replaced import replaced
from .report import Figures


@dataclass(frozen=True, slots=True)
class _Moment:
    """On the wall and on the CPU clock of the calling thread, in seconds."""

    wall_s: float
    cpu_s: float

    @classmethod
    def now(cls) -> _Moment:
        return cls(time.monotonic(), time.thread_time())


_START = _Moment(0.0, 0.0)


@dataclass(slots=True)
class HostStep:
    """CPU seconds of the parts of a step, and when the wait for its result began and ended, by both clocks."""

    num_sequences: int
    is_decode: bool
    schedule_s: float
    submit_s: float
    wait: _Moment = _START
    done: _Moment = _START
    update_s: float = 0.0


class HostClock:
    """Times the parts of every step on the host."""

    def __init__(self) -> None:
        self._steps: dict[int, HostStep] = {}
        self._schedule_s = 0.0

    @classmethod
    @contextmanager
    def watching(cls, core: EngineCore) -> Iterator[HostClock]:
        """A clock around the core's parts, as long as the context lasts."""
        clock, scheduler, executor = cls(), core.scheduler, core._executor
        schedule, submit, update = scheduler.schedule, executor.submit, scheduler.update

        def timed_schedule() -> StepPlan | None:
            start_s = time.thread_time()
            plan = schedule()
            clock._schedule_s = time.thread_time() - start_s
            return plan

        def timed_submit(plan: StepPlan) -> StepHandle:
            start_s = time.thread_time()
            handle = submit(plan)
            num_sequences = len(plan.slots)
            times = (clock._schedule_s, time.thread_time() - start_s)
            step = clock._steps[plan.step_id] = HostStep(num_sequences, plan.num_tokens == num_sequences, *times)
            return _TimedHandle(handle, step)

        def timed_update(result: StepResult) -> Any:
            start_s = time.thread_time()
            outputs = update(result)
            clock._steps[result.step_id].update_s = time.thread_time() - start_s
            return outputs

        with ExitStack() as stack:
            stack.enter_context(replaced(scheduler, "schedule", timed_schedule))
            stack.enter_context(replaced(executor, "submit", timed_submit))
            stack.enter_context(replaced(scheduler, "update", timed_update))
            yield clock

    def figures(self) -> Figures:
        """Medians over the decode steps of the largest batch that follow one of the same size."""
        steps = [step for _, step in sorted(self._steps.items())]
        largest = max((step.num_sequences for step in steps if step.is_decode), default=0)
        full = [
            (before, step)
            for before, step in pairwise(steps)
            if before.is_decode and step.is_decode and before.num_sequences == step.num_sequences == largest
        ]
        if not full:
            return {}
        return {
            "host_turn_s": median(step.wait.wall_s - before.done.wall_s for before, step in full),
            "host_work_s": median(step.wait.cpu_s - before.done.cpu_s for before, step in full),
            "host_schedule_s": median(step.schedule_s for _, step in full),
            "host_submit_s": median(step.submit_s for _, step in full),
            "host_update_s": median(step.update_s for _, step in full),
        }


class _TimedHandle:
    def __init__(self, handle: StepHandle, step: HostStep) -> None:
        self._handle = handle
        self._step = step

    def result(self) -> StepResult:
        self._step.wait = _Moment.now()
        result = self._handle.result()
        self._step.done = _Moment.now()
        return result
