"""Hands plans to the worker or workers and gives back their results."""

from __future__ import annotations

from typing import Protocol

from cupy_engine.plan import StepPlan, StepResult
from cupy_engine.worker import Worker


class StepHandle(Protocol):
    """A submitted step."""

    def result(self) -> StepResult:
        """Wait for the step. Raises whatever broke it."""


class Executor(Protocol):
    """Steps run in the order in which they were submitted."""

    def submit(self, plan: StepPlan) -> StepHandle: ...


class _DoneStep:
    """A step that ran while it was submitted; failures wait for :meth:`result` like those of an asynchronous step."""

    def __init__(self, outcome: StepResult | Exception) -> None:
        self._outcome = outcome

    def result(self) -> StepResult:
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


class InProcessExecutor:
    """One worker in this process, for one device."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def submit(self, plan: StepPlan) -> StepHandle:
        try:
            return _DoneStep(self._worker.run(plan))
        except Exception as error:  # whatever breaks a step fails its requests, not the engine
            return _DoneStep(error)
