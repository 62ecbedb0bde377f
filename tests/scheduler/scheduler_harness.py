"""A scheduler with a fake worker behind it, one or two steps in flight, and what comes out of them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from fake_worker import EOS, FakeWorker, expected_prompt_logprobs, expected_tokens

from cupy_engine.block_manager import BlockManager
from cupy_engine.expected_growth import ExpectedGrowth
from cupy_engine.messages import GenerateRequest, SequenceOutput
from cupy_engine.plan import StepPlan
from cupy_engine.preemption import PreemptionCosts
from cupy_engine.request_queue import FcfsPolicy, Policy
from cupy_engine.sampling_params import SamplingParams
from cupy_engine.scheduler import Scheduler
from cupy_engine.scheduler_listener import SchedulerListener
from cupy_engine.step_pace import StepPace


@dataclass
class Received:
    """What a caller got for one sequence."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: list | None = None


def endless(max_tokens: int = 100, **params: object) -> dict[str, object]:
    """Parameters of a request that runs to ``max_tokens`` whatever it draws."""
    return {"ignore_eos": True, "max_tokens": max_tokens, **params}


def seed_for(prompt: list[int], num_tokens: int, max_model_len: int = 64) -> int:
    """A seed with which the prompt's continuation ends by itself after ``num_tokens`` tokens."""
    params = SamplingParams(max_tokens=num_tokens + 1)
    return next(
        seed for seed in range(1000) if len(expected_tokens(prompt, seed, params, max_model_len)[0]) == num_tokens
    )


def ref_counts(harness: Harness) -> list[int]:
    return [block.ref_count for block in harness.manager.pool.blocks]


def spans(plan: StepPlan) -> list[tuple[int, int, int]]:
    """(slot, start, end) of what a plan computes, in its order."""
    return [(entry.slot, entry.start, entry.start + entry.num_tokens) for entry in plan.sequences]


class Harness:
    """Schedules, runs and collects like the engine core, checking integrity all the way.

    A plan is carried out when its result is collected, as late as possible: a plan that shares state with the scheduler
    would show.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 16,
        block_size: int = 4,
        num_host_blocks: int = 0,
        preemption: str = "recompute",
        max_num_seqs: int = 4,
        budget: int = 16,
        mixed_budget: int | None = None,
        max_model_len: int | None = None,
        pace: StepPace | None = None,
        policy: Policy | None = None,
        steps_in_flight: int = 1,
        enable_prefix_caching: bool = True,
        foresees_growth: bool = False,
        log_schedule: bool = False,
        listener: SchedulerListener | None = None,
        eos: tuple[int, ...] = (EOS,),
    ) -> None:
        self.manager = BlockManager(num_blocks, block_size, num_host_blocks, enable_prefix_caching)
        self.max_model_len = max_model_len or num_blocks * block_size
        self.max_num_seqs = max_num_seqs
        self.budget = budget
        self.scheduler = Scheduler(
            self.manager,
            policy or FcfsPolicy(),
            PreemptionCosts(preemption, bytes_per_block=1, copy_bytes_per_s=1.0),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_num_mixed_tokens=mixed_budget,
            max_model_len=self.max_model_len,
            pace=pace,
            growth=ExpectedGrowth(self.manager) if foresees_growth else None,
            eos_token_ids=eos,
            seed=0,
            log_schedule=log_schedule,
            listener=listener,
        )
        self.worker = FakeWorker(num_blocks, block_size, num_host_blocks, max_num_seqs)
        self.steps_in_flight = steps_in_flight
        self.in_flight: deque[StepPlan] = deque()
        self.received: dict[tuple[str, int], Received] = {}
        self.errors: dict[str, SequenceOutput] = {}
        self.expected: dict[tuple[str, int], tuple[list[int], str]] = {}
        self.expected_prompt_logprobs: dict[str, list] = {}
        self.aborted: set[tuple[str, int]] = set()
        self._now_s = 0.0

    def add(
        self,
        request_id: str,
        prompt: list[int],
        *,
        priority: int = 0,
        salt: str = "",
        arrival_time_s: float | None = None,
        deadline_s: float | None = None,
        **params: object,
    ) -> None:
        """Queue a request; arrivals are a second apart unless told otherwise."""
        self._now_s += 1
        message = GenerateRequest(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            params=SamplingParams(**params),
            priority=priority,
            cache_salt=salt,
            arrival_time_s=self._now_s if arrival_time_s is None else arrival_time_s,
            deadline_s=deadline_s,
        )
        self.scheduler.add(message)
        if message.params.prompt_logprobs is not None:
            self.expected_prompt_logprobs[request_id] = expected_prompt_logprobs(prompt)
        for sequence in self.scheduler._requests.get(request_id).sequences:
            self.received[request_id, sequence.index] = Received()
            self.aborted.discard((request_id, sequence.index))
            self.expected[request_id, sequence.index] = expected_tokens(
                message.prompt_token_ids, sequence.seed, message.params, self.max_model_len
            )
        self.check()

    def abort(self, request_id: str, index: int | None = None) -> None:
        before = {key for key, sequence in self.live_sequences().items() if key[0] == request_id}
        self.scheduler.abort(request_id, index)
        self.aborted |= before - self.live_sequences().keys()
        self.check()

    def live_sequences(self):
        return {
            (request.request_id, sequence.index): sequence
            for request in self.scheduler._requests
            for sequence in request.sequences
            if not sequence.is_finished
        }

    def schedule(self) -> StepPlan | None:
        """Plan and submit one step."""
        plan = self.scheduler.schedule()
        if plan is not None:
            assert plan.num_tokens <= self.budget
            self.in_flight.append(plan)
        self.check()
        return plan

    def collect(self) -> list[SequenceOutput]:
        """Carry out the oldest submitted step and take in its result."""
        plan = self.in_flight.popleft()
        result = self.worker.run(plan)
        if result is None:
            outputs = self.scheduler.fail_step(plan.step_id, "the step broke")
        else:
            outputs = self.scheduler.update(result)
        self.receive(outputs)
        self.check()
        return outputs

    def step(self) -> StepPlan | None:
        """One turn of the engine core."""
        plan = self.schedule()
        if self.in_flight and (plan is None or len(self.in_flight) >= self.steps_in_flight):
            self.collect()
        return plan

    def run(self, max_steps: int = 10_000) -> list[StepPlan]:
        """Step until nothing is left to do."""
        plans = []
        while self.scheduler.has_work or self.in_flight:
            was_idle = not self.in_flight
            plan = self.step()
            assert plan is not None or not was_idle, "work is left, but nothing runs"
            plans += [plan] if plan else []
            assert len(plans) <= max_steps, "the scheduler runs in circles"
        return plans

    def receive(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            if output.error is not None:
                assert output.request_id not in self.errors, "two errors for one request"
                self.errors[output.request_id] = output
                continue
            received = self.received[output.request_id, output.index]
            assert received.finish_reason is None, "an output after the last one"
            assert (output.request_id, output.index) not in self.aborted, "an output of an aborted sequence"
            if not received.token_ids:
                received.num_cached_tokens = output.num_cached_tokens
                received.prompt_logprobs = output.prompt_logprobs
            else:
                assert (output.num_cached_tokens, output.prompt_logprobs) == (0, None), "told twice"
            received.token_ids += output.token_ids
            received.finish_reason = output.finish_reason
            received.stop_reason = output.stop_reason

    def check(self) -> None:
        self.scheduler.check_integrity()

    def check_outputs(self) -> None:
        """What everybody received is right so far, and complete where nobody interfered."""
        for key, received in self.received.items():
            token_ids, finish_reason = self.expected[key]
            assert received.token_ids == token_ids[: len(received.token_ids)], key
            if received.token_ids and key[1] == 0:
                assert received.prompt_logprobs == self.expected_prompt_logprobs.get(key[0]), key
            if key in self.aborted or key[0] in self.errors:
                assert received.finish_reason is None or received.token_ids == token_ids
            else:
                assert (received.token_ids, received.finish_reason) == (token_ids, finish_reason), key

    def check_empty(self) -> None:
        """Nothing is left anywhere."""
        scheduler, manager = self.scheduler, self.manager
        assert not scheduler.has_work
        assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_swapped) == (0, 0, 0)
        assert manager.num_free_blocks == manager.num_blocks
        assert manager.host_pool.num_free == len(manager.host_pool.blocks)
        assert scheduler.seats.num_free == self.max_num_seqs
        assert not scheduler._in_flight
        self.check()
