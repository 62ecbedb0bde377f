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


class DoneStep:
    """A step that ran while it was submitted."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result


class FailedStep:
    """A step that broke while it was submitted; the failure waits for :meth:`result` as an asynchronous one would."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def result(self) -> StepResult:
        raise self._error


class InProcessExecutor:
    """One worker in this process, for one device."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def submit(self, plan: StepPlan) -> StepHandle:
        try:
            return DoneStep(self._worker.run(plan))
        except Exception as error:  # whatever breaks a step fails its requests, not the engine
            return FailedStep(error)
