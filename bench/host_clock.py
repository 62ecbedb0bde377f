"""How long the host works on a step.

    host   | update n-1, outputs, schedule n+1, submit n+1 | wait for n |

Its work is the time between two results less the wait for the second one.
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


@dataclass(slots=True)
class HostStep:
    """Seconds that the engine's thread spent on a step; ``done_s`` is when its result was there."""

    num_sequences: int
    is_decode: bool
    schedule_s: float
    submit_s: float
    wait_s: float = 0.0
    done_s: float = 0.0
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
            start_s = time.monotonic()
            plan = schedule()
            clock._schedule_s = time.monotonic() - start_s
            return plan

        def timed_submit(plan: StepPlan) -> StepHandle:
            start_s = time.monotonic()
            handle = submit(plan)
            num_sequences = len(plan.sequences)
            times = (clock._schedule_s, time.monotonic() - start_s)
            step = clock._steps[plan.step_id] = HostStep(num_sequences, plan.num_tokens == num_sequences, *times)
            return _TimedHandle(handle, step)

        def timed_update(result: StepResult) -> Any:
            start_s = time.monotonic()
            outputs = update(result)
            clock._steps[result.step_id].update_s = time.monotonic() - start_s
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
            "host_work_s": median(step.done_s - before.done_s - step.wait_s for before, step in full),
            "host_schedule_s": median(step.schedule_s for _, step in full),
            "host_submit_s": median(step.submit_s for _, step in full),
            "host_update_s": median(step.update_s for _, step in full),
        }


class _TimedHandle:
    def __init__(self, handle: StepHandle, step: HostStep) -> None:
        self._handle = handle
        self._step = step

    def result(self) -> StepResult:
        start_s = time.monotonic()
        result = self._handle.result()
        self._step.done_s = time.monotonic()
        self._step.wait_s = self._step.done_s - start_s
        return result
