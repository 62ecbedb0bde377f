"""An engine core on simulated time: real admission and scheduling, steps that take as long as a formula says."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from cupy_engine.adaptive_limit import AdaptiveLimit
from cupy_engine.block_manager import BlockManager
from cupy_engine.core import CoreInfo, EngineCore
from cupy_engine.executor import DoneStep
from cupy_engine.guides import Guides
from cupy_engine.messages import GenerateRequest
from cupy_engine.metrics import EngineMetrics
from cupy_engine.overload import AdmissionRule
from cupy_engine.plan import StepPlan, StepResult
from cupy_engine.preemption import PreemptionCosts
from cupy_engine.request_queue import FcfsPolicy
from cupy_engine.sampling_params import SamplingParams
from cupy_engine.scheduler import Scheduler
from cupy_engine.step_pace import StepPace

MAX_MODEL_LEN = 1024
_INFO = CoreInfo("simulated", "simulated", MAX_MODEL_LEN, 4096, 16, 0, 0, 0.0)


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step: fixed, per sequence, per prompt token; ``spread`` of a log-normal factor; rare stalls.

    ``neighbour``: by what steps are slower in a second out of three, when somebody else is at work. ``between_s``: what
    the engine's loop does between two steps.
    """

    fixed_s: float = 1.2e-3
    per_sequence_s: float = 0.09e-3
    per_prompt_token_s: float = 0.01e-3
    spread: float = 0.15
    stall_share: float = 0.003
    stall_s: float = 0.015
    neighbour: float = 1.0
    between_s: float = 0.0


@dataclass
class Served:
    """Times of an accepted request, in simulated seconds."""

    arrival_s: float
    token_times_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.arrival_s

    @property
    def tpot_s(self) -> float:
        return (self.token_times_s[-1] - self.token_times_s[0]) / (len(self.token_times_s) - 1)


class SimulatedEngine:
    """Is its core's executor and clock."""

    def __init__(
        self,
        costs: StepCosts,
        *,
        max_num_seqs: int = 16,
        slo_ttft_s: float | None = None,
        slo_tpot_s: float | None = None,
        seed: int = 0,
    ) -> None:
        self._costs = costs
        self._random = random.Random(seed)
        self._now_s = 0.0
        limit = None if slo_ttft_s is None else AdaptiveLimit(slo_ttft_s)
        metrics = EngineMetrics(slo_ttft_s, slo_tpot_s, limit, clock=lambda: self._now_s)
        pace = None if slo_tpot_s is None else StepPace(slo_tpot_s)
        scheduler = Scheduler(
            BlockManager(4096, 16, 0, enable_prefix_caching=False),
            FcfsPolicy(),
            PreemptionCosts("recompute", bytes_per_block=1, copy_bytes_per_s=1.0),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=2048,
            max_model_len=MAX_MODEL_LEN,
            pace=pace,
            limit=limit,
            listener=metrics,
        )
        rule = AdmissionRule(100_000, slo_ttft_s)
        guides = Guides(lambda: None, vocab_size=8)
        self._core = EngineCore(scheduler, self, metrics, _INFO, guides, rule, pace, clock=lambda: self._now_s)
        self.num_refused = 0

    def submit(self, plan: StepPlan) -> DoneStep:
        costs, num_sequences = self._costs, len(plan.sequences)
        step_s = costs.fixed_s + costs.per_sequence_s * num_sequences
        step_s += costs.per_prompt_token_s * (plan.num_tokens - num_sequences)
        if int(self._now_s) % 3 == 1:
            step_s *= costs.neighbour
        self._now_s += step_s * self._random.lognormvariate(0, costs.spread)
        if self._random.random() < costs.stall_share:
            self._now_s += self._random.expovariate(1 / costs.stall_s)
        num_drawn = sum(len(entry.sample_slots) for entry in plan.sequences)
        return DoneStep(StepResult(plan.step_id, [1] * num_drawn, [None] * num_drawn))

    def run(self, per_s: float, seconds: float, prompt_len: int = 64, output_len: int = 64) -> list[Served]:
        """What is accepted of requests that arrive at random, ``per_s`` on average, in the order of arrival."""
        served: dict[str, Served] = {}
        arrivals_s = self._arrivals_s(per_s, seconds)
        next_s = next(arrivals_s, None)
        while next_s is not None or self._core.has_work:
            while next_s is not None and next_s <= self._now_s:
                request_id = str(next_s)
                params = SamplingParams(max_tokens=output_len, ignore_eos=True)
                request = GenerateRequest(
                    request_id=request_id, prompt_token_ids=[1] * prompt_len, params=params, arrival_time_s=next_s
                )
                if self._core.add(request) is None:
                    served[request_id] = Served(next_s)
                else:
                    self.num_refused += 1
                next_s = next(arrivals_s, None)
            if self._core.has_work:
                for output in self._core.step():
                    served[output.request_id].token_times_s.append(self._now_s)
                self._now_s += self._costs.between_s
            elif next_s is not None:
                self._now_s = next_s
        return list(served.values())

    def _arrivals_s(self, per_s: float, seconds: float) -> Iterator[float]:
        arrival_s, end_s = self._now_s, self._now_s + seconds
        while (arrival_s := arrival_s + self._random.expovariate(per_s)) < end_s:
            yield arrival_s
