"""Requests come, are computed step by step, and go: what steps do is decided in step_planner.py.

    schedule()   running sequences first, oldest first, then waiting ones    → StepPlan
    update()     what the step drew                                          → SequenceOutput

``schedule`` may be called again before ``update``: tokens that are still being drawn count as places without an id.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Many

from cupy_engine.adaptive_limit import AdaptiveLimit
from cupy_engine.block_manager import BlockManager
from cupy_engine.expected_growth import ExpectedGrowth
from cupy_engine.guides import GuideError
from cupy_engine.live_requests import LiveRequests
from cupy_engine.messages import ErrorKind, GenerateRequest, SequenceOutput, TokenLogprobs
from cupy_engine.plan import StepError, StepPlan, StepResult
from cupy_engine.plan_builder import PlanBuilder, PlannedStep
from cupy_engine.preemption import PreemptionCosts
from cupy_engine.request import Request, Sequence, SequenceStatus
from cupy_engine.request_queue import Policy
from cupy_engine.scheduler_listener import SchedulerListener
from cupy_engine.seats import Seats
from cupy_engine.sequence_outputs import error_output, take_embedding, take_token
from cupy_engine.step_pace import StepPace
from cupy_engine.step_planner import StepPlanner

logger = logging.getLogger("cupy_engine.schedule")


class Scheduler:
    """Owns every live request and the block manager.

    Args:
        max_num_seqs: seats (slots) in the worker, and so sequences per step.
        max_num_batched_tokens: token budget of a step.
        max_num_mixed_tokens: most prompt tokens of a step in which sequences decode; default: no limit of their own.
        pace: says how many sequences may run to come in time; default: as many as there are seats.
        limit: says how many of these may run so that first tokens are in time; default: all.
        growth: keeps out who would soon have to make room again; default: whoever fits comes in.
        max_model_len: most tokens of prompt and output together; the block pool must hold that many.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        policy: Policy,
        costs: PreemptionCosts,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_num_mixed_tokens: int | None = None,
        pace: StepPace | None = None,
        limit: AdaptiveLimit | None = None,
        growth: ExpectedGrowth | None = None,
        eos_token_ids: tuple[int, ...] = (),
        seed: int | None = None,
        log_schedule: bool = False,
        listener: SchedulerListener | None = None,
    ) -> None:
        assert max_model_len <= block_manager.num_blocks * block_manager.block_size, "one sequence must fit the pool"
        self.block_manager = block_manager
        self.costs = costs
        self.seats = Seats(max_num_seqs, pace, limit)
        self._policy = policy
        self._log_schedule = log_schedule
        self._listener = listener or SchedulerListener()
        self._requests = LiveRequests(max_num_seqs, max_model_len, eos_token_ids, seed)
        self._planner = StepPlanner(
            block_manager,
            self.seats,
            policy,
            costs,
            self._listener,
            growth,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_mixed_tokens=max_num_mixed_tokens or max_num_batched_tokens,
        )
        self._in_flight: dict[int, PlannedStep] = {}
        self._next_step_id = 0

    @property
    def has_work(self) -> bool:
        return len(self._requests) > 0

    @property
    def running(self) -> Many[Sequence]:
        """The sequences that have seats, first the one that makes room last."""
        return self._planner.running

    @property
    def num_running(self) -> int:
        return len(self._planner.running)

    @property
    def num_waiting(self) -> int:
        return len(self._planner.waiting)

    @property
    def num_swapped(self) -> int:
        return sum(sequence.status is SequenceStatus.SWAPPED for sequence in self._planner.waiting)

    # Requests come and go

    def add(self, message: GenerateRequest) -> Sequence:
        """Queue a request; returns its first sequence.

        Raises:
            InvalidRequestError: it can never be served.
        """
        self._requests.check(message)
        sequence = self._requests.add(message).sequences[0]
        self._planner.waiting.push(sequence)
        return sequence

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drop a request, or one of its sequences once it has forked. Unknown ids are ignored."""
        request = self._requests.get(request_id)
        if request is None:
            return
        has_forked = all(s.status is not SequenceStatus.FORKING for s in request.sequences)
        for sequence in request.sequences:
            if (index is None or not has_forked or sequence.index == index) and not sequence.is_finished:
                sequence.finish_reason = "abort"
                self._finish(sequence)

    def expire(self, now_s: float) -> list[SequenceOutput]:
        """End the requests whose deadline has passed."""
        return [self._fail(request, "the deadline has passed", "deadline") for request in self._requests.late(now_s)]

    def refuse(self, error: GuideError) -> list[SequenceOutput]:
        """End a request whose grammar is of no use; nothing if it has ended already."""
        request = self._requests.get(error.request_id)
        return [] if request is None else [self._fail(request, error.message, "invalid", error.param)]

    def abort_all(self, reason: str) -> list[SequenceOutput]:
        """End every request with an error, when the engine closes."""
        return [self._fail(request, reason, "dead") for request in self._requests]

    # Schedule

    def schedule(self) -> StepPlan | None:
        """Plan the next step; ``None`` if nothing can run before an update."""
        builder = PlanBuilder(PlannedStep(StepPlan(self._next_step_id)), keeps_log=self._log_schedule)
        self._planner.fill(builder)
        plan = builder.plan
        if not (plan.slots or plan.slot_setups or plan.swap_out):
            return None
        if self._log_schedule:
            manager = self.block_manager
            logger.info(builder.describe(manager.num_free_blocks, manager.num_blocks, self.num_waiting))
        self._in_flight[plan.step_id] = builder.step
        self._next_step_id += 1
        return plan

    # Update

    def update(self, result: StepResult) -> list[SequenceOutput]:
        """Take in what a step drew. Tokens for sequences that have ended meanwhile are dropped."""
        step = self._in_flight.pop(result.step_id)
        self._note_scores(step, result.prompt_logprobs)
        outputs = self._fail_draws(step, result.errors) + self._take_embeddings(step, result.embeddings)
        return outputs + self._take_tokens(step, result)

    def _note_scores(self, step: PlannedStep, prompt_logprobs: dict[int, list[TokenLogprobs]]) -> None:
        for index, scores in prompt_logprobs.items():
            first = step.plan.starts[index] + 1
            step.sequences[index].request.prompt_logprobs[first : first + len(scores)] = scores

    def _fail_draws(self, step: PlannedStep, errors: dict[int, StepError]) -> list[SequenceOutput]:
        """End the requests of which a draw broke."""
        outputs: list[SequenceOutput] = []
        for index, (sequence, drawing) in enumerate(step.entries() if errors else ()):
            if index in errors and _is_wanted(sequence, drawing):
                outputs.append(self._fail(sequence.request, errors[index].message, errors[index].kind))
        return outputs

    def _take_embeddings(self, step: PlannedStep, embeddings: dict[int, bytes]) -> list[SequenceOutput]:
        outputs: list[SequenceOutput] = []
        for index, embedding in embeddings.items():
            if not (sequence := step.sequences[index]).is_finished:
                outputs.append(take_embedding(sequence, embedding))
                self._finish(sequence)
        return outputs

    def _take_tokens(self, step: PlannedStep, result: StepResult) -> list[SequenceOutput]:
        for sequence in step.drawing:
            sequence.num_in_flight -= 1
        logprobs = result.logprobs or [None] * len(result.token_ids)
        taken = [sequence for sequence in step.drawing if sequence.finish_reason is None]
        outputs = [
            take_token(sequence, token_id, found)
            for sequence, token_id, found in zip(step.drawing, result.token_ids, logprobs, strict=True)
            if sequence.finish_reason is None
        ]
        self._listener.on_tokens(taken)
        for sequence in taken:
            if sequence.finish_reason is not None:
                self._finish(sequence)
        return outputs

    def fail_step(self, step_id: int, reason: str) -> list[SequenceOutput]:
        """A step broke: fail the requests it computed and trust nothing that is cached or on the host.

        Later steps in flight may read what this one should have written, so their requests fail too.
        """
        entries = [entry for step in self._in_flight.values() for entry in step.entries()]
        for sequence in self._in_flight.pop(step_id).drawing:
            sequence.num_in_flight -= 1
        self._planner.distrust()
        wanted = (sequence.request for sequence, drawing in entries if _is_wanted(sequence, drawing))
        return [self._fail(request, reason, "internal") for request in wanted]

    def _fail(self, request: Request, reason: str, kind: ErrorKind, param: str | None = None) -> SequenceOutput:
        for sequence in request.sequences:
            if not sequence.is_finished:
                sequence.finish_reason = "error"
                self._finish(sequence, forget=kind == "internal")
        return error_output(request, reason, kind, param)

    def _finish(self, sequence: Sequence, *, forget: bool = False) -> None:
        self._planner.remove(sequence, forget=forget)
        sequence.status = SequenceStatus.FINISHED
        self._listener.on_finished(sequence)
        if sequence.request.is_finished:
            self._requests.remove(sequence.request)

    def check_integrity(self) -> None:
        """Assert that seats, queues and blocks add up."""
        self.block_manager.check_integrity()
        self.seats.check_integrity([s.slot for r in self._requests for s in r.sequences if s.slot >= 0])
        assert all(s.status is SequenceStatus.RUNNING and s.slot >= 0 for s in self._planner.running), (
            "a runner has no seat"
        )
        keys = [self._policy.key(s) for s in self._planner.running]
        assert keys == sorted(keys), "running sequences are out of order"
        if not self.has_work:
            assert self.block_manager.num_free_blocks == self.block_manager.num_blocks, "blocks without an owner"


def _is_wanted(sequence: Sequence, drawing: list[Sequence]) -> bool:
    """Whether a sequence that lives depends on it. The computing one may have ended while others draw from it."""
    return not all(each.is_finished for each in (sequence, *drawing))
