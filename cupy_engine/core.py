"""The engine's heart: requests in, one step after another, outputs out."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cupy_engine.config import EngineConfig
from cupy_engine.errors import InvalidRequestError, QueueFullError
from cupy_engine.executor import Executor, StepHandle
from cupy_engine.guides import GuideError, Guides
from cupy_engine.messages import AbortRequest, EngineStats, GenerateRequest, SequenceOutput
from cupy_engine.metrics import EngineMetrics
from cupy_engine.model_source import ModelFiles
from cupy_engine.overload import AdmissionRule, EngineLoad, LoadMeter
from cupy_engine.plan import StepPlan
from cupy_engine.scheduler import Scheduler
from cupy_engine.step_pace import StepPace

logger = logging.getLogger("cupy_engine")

_MASK_PATIENCE_S = 0.001  # masks take some 0.1 ms; who misses a step waits for the next
_IDLE_WAIT_S = 0.005


@dataclass(frozen=True, slots=True)
class CoreInfo:
    """What a started engine turned out to be, for people and for front ends."""

    backend: str
    model_name: str
    max_model_len: int
    num_kv_blocks: int
    block_size: int
    weight_bytes: int
    kv_cache_bytes: int
    load_time_s: float
    gpu_ids: tuple[str, ...] = ()  # PCI bus ids
    workspace_bytes: int = 0  # this and the next three: of a GPU
    graph_bytes: int = 0
    used_bytes: int = 0  # by the engine, at the end of its start
    limit_bytes: int = 0  # the share that it may take

    def describe(self) -> str:
        """One line with the memory plan."""
        num_tokens = self.num_kv_blocks * self.block_size
        weights, workspace, graphs, kv_cache, used, limit = (
            f"{num_bytes / 2**20:.0f} MiB"
            for num_bytes in (
                *(self.weight_bytes, self.workspace_bytes, self.graph_bytes),
                *(self.kv_cache_bytes, self.used_bytes, self.limit_bytes),
            )
        )
        beside = f"workspace {workspace}, graphs {graphs}, " if self.limit_bytes else ""
        share = f"{used} of {limit} in use, " if self.limit_bytes else ""
        return (
            f"{self.model_name} on {self.backend}: weights {weights}, {beside}KV cache {kv_cache} = "
            f"{self.num_kv_blocks} blocks of {self.block_size} ({num_tokens} tokens), "
            f"up to {self.max_model_len} tokens a request, {share}loaded in {self.load_time_s:.2f} s"
        )


@dataclass(slots=True)
class _StepInFlight:
    plan: StepPlan
    handle: StepHandle
    submit_time_s: float
    schedule_s: float


class EngineCore:
    """Drives scheduler and executor. Not thread-safe: one thread owns it (see :mod:`cupy_engine.core_loop`)."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        metrics: EngineMetrics,
        info: CoreInfo,
        guides: Guides,
        rule: AdmissionRule,
        pace: StepPace | None = None,
        *,
        max_steps_in_flight: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.metrics = metrics
        self.info = info
        self._executor = executor
        self._guides = guides
        self._rule = rule
        self._pace = pace
        self._load_meter = LoadMeter()
        self._leaves_waiting = False  # the last step had no room for all
        self._collected_s, self._is_going_on = 0.0, False  # the latest result: when, and whether sequences ran on
        self._max_steps_in_flight = max_steps_in_flight
        self._clock = clock
        self._in_flight: deque[_StepInFlight] = deque()

    @classmethod
    def from_config(cls, config: EngineConfig, files: ModelFiles) -> EngineCore:
        """Load the model and build everything below this class.

        Raises:
            ModelLoadError, ConfigError: what is wrong, where, and the way out.
        """
        from cupy_engine.core_builder import build_core  # heavy: array code, weights

        return build_core(config, files)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight)

    def add(self, request: GenerateRequest) -> SequenceOutput | None:
        """Queue a request; a refused one gives its error as an output."""
        if not request.arrival_time_s:
            request.arrival_time_s = self._clock()
        try:
            load = self.load()
            self._rule.check(load)
            sequence = self.scheduler.add(request)
            sequence.request.expected_wait_s = load.wait_s
        except InvalidRequestError as error:
            self.metrics.on_rejected("invalid")
            return _refusal(
                request, SequenceOutput(request_id="", error_kind="invalid", error_param=error.param), error
            )
        except QueueFullError as error:
            self.metrics.on_rejected(error.reason)
            output = SequenceOutput(request_id="", error_kind=error.reason, retry_after_s=error.retry_after_s)
            return _refusal(request, output, error)
        if request.grammar is not None:
            sequence.guide = self._guides.open(request.request_id, request.grammar)
        return None

    def abort(self, request: AbortRequest) -> None:
        self.scheduler.abort(request.request_id, request.index)
        self._leaves_waiting = self._leaves_waiting and self.scheduler.num_waiting > 0

    def step(self) -> list[SequenceOutput]:
        """Expire, guide, schedule, submit, collect, update. Call while :attr:`has_work`."""
        start_time_s = self._clock()
        self._load_meter.observe(start_time_s, self.metrics.num_ended, is_full=self._num_free() == 0)
        self.metrics.overruns.forget(start_time_s)
        outputs = self._expire(start_time_s) + self._refuse(self._guides.collect(_MASK_PATIENCE_S))
        plan = self.scheduler.schedule()
        self._leaves_waiting = self.scheduler.num_waiting > 0
        if plan is not None:
            submit_time_s = self._clock()
            handle = self._executor.submit(plan)
            self._in_flight.append(_StepInFlight(plan, handle, submit_time_s, submit_time_s - start_time_s))
        if self._in_flight and (plan is None or len(self._in_flight) >= self._max_steps_in_flight):
            outputs += self._collect(self._in_flight.popleft())
        elif plan is None:
            outputs += self._refuse(self._guides.wait(_IDLE_WAIT_S))
        return outputs

    def _expire(self, now_s: float) -> list[SequenceOutput]:
        outputs = self.scheduler.expire(now_s)
        for _ in outputs:
            self.metrics.on_deadline_exceeded()
        return outputs

    def _refuse(self, errors: list[GuideError]) -> list[SequenceOutput]:
        return [output for error in errors for output in self.scheduler.refuse(error)]

    def _collect(self, step: _StepInFlight) -> list[SequenceOutput]:
        try:
            result = step.handle.result()
        except Exception:  # a broken step fails its requests; the engine goes on
            logger.exception("step %d failed", step.plan.step_id)
            return self.scheduler.fail_step(step.plan.step_id, "the engine failed while computing this request")
        done_time_s = self._clock()
        outputs = self.scheduler.update(result)
        update_s = self._clock() - done_time_s
        compute_s = done_time_s - step.submit_time_s
        num_tokens, num_sequences = step.plan.num_tokens, len(step.plan.slots)
        if num_tokens >= 16 * num_sequences > 0:
            self.scheduler.costs.observe_prefill(num_tokens, compute_s)
        if self._pace is not None:
            begun_s = self._collected_s if self._is_going_on else step.submit_time_s - step.schedule_s
            self._pace.observe(num_tokens, num_sequences, done_time_s - begun_s)  # as streams wait for their tokens
        self._collected_s, self._is_going_on = done_time_s, self.scheduler.num_running > 0
        self.metrics.on_step(num_tokens, step.schedule_s + compute_s + update_s, step.schedule_s + update_s)
        return outputs

    def fail_all(self, reason: str) -> list[SequenceOutput]:
        """End all requests with an error, when the engine closes."""
        self._guides.close()
        return self.scheduler.abort_all(reason)

    def load(self) -> EngineLoad:
        """How busy the engine is. Any thread."""
        return EngineLoad(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_free=self._num_free(),
            ended_per_s=self._load_meter.ended_per_s,
            overrun_s=self.metrics.overrun_s,
        )

    def _num_free(self) -> int:
        """Sequences that the next step has room for, beside those that run."""
        return 0 if self._leaves_waiting else max(0, self.scheduler.seats.num_free)

    def stats(self) -> EngineStats:
        return self.metrics.stats(self.scheduler)


def _refusal(request: GenerateRequest, output: SequenceOutput, error: Exception) -> SequenceOutput:
    output.request_id = request.request_id
    output.finish_reason = "error"
    output.error = str(error)
    return output
