"""Which sequences run in a step, how many tokens each, and who makes room. Plain Python: no arrays, clocks or text.

There are no phases. A sequence has tokens, and some of them are computed; a step gives each sequence some tokens so
that the second number catches up with the first. Decode is the case of one token, prefill of many, a chunk of some,
and a cached prefix a head start. Continuous batching: Yu et al., OSDI 2022; chunked prefill: Agrawal et al., OSDI 2024.

    schedule()   running sequences first, oldest first, then waiting ones    → StepPlan
    update()     what the step drew                                          → SequenceOutput

``schedule`` may be called again before ``update``: tokens that are still being drawn count as places without an id.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Sequence as Many

from cupy_engine.admission import Admission
from cupy_engine.block_manager import BlockManager
from cupy_engine.guides import GuideError
from cupy_engine.live_requests import LiveRequests
from cupy_engine.messages import ErrorKind, GenerateRequest, SequenceOutput
from cupy_engine.plan import StepPlan, StepResult
from cupy_engine.plan_builder import PlanBuilder, PlannedSequence, name_of
from cupy_engine.preemption import PreemptionCosts
from cupy_engine.request import Request, Sequence, SequenceStatus
from cupy_engine.request_queue import Policy, WaitingQueue
from cupy_engine.scheduler_listener import PreemptionKind, SchedulerListener
from cupy_engine.seats import Seats
from cupy_engine.sequence_outputs import error_output, take_embedding, take_token
from cupy_engine.step_pace import StepPace

logger = logging.getLogger("cupy_engine.schedule")


class Scheduler:
    """Owns every live request and the block manager.

    Args:
        max_num_seqs: seats (slots) in the worker, and so sequences per step.
        max_num_batched_tokens: token budget of a step.
        max_num_mixed_tokens: most prompt tokens of a step in which sequences decode; default: no limit of their own.
        pace: says how many sequences may run to come in time; default: as many as there are seats.
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
        eos_token_ids: tuple[int, ...] = (),
        seed: int | None = None,
        log_schedule: bool = False,
        listener: SchedulerListener | None = None,
    ) -> None:
        assert max_model_len <= block_manager.num_blocks * block_manager.block_size, "one sequence must fit the pool"
        self.block_manager = block_manager
        self.costs = costs
        self._policy = policy
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_mixed_tokens = max_num_mixed_tokens or max_num_batched_tokens
        self._log_schedule = log_schedule
        self._listener = listener or SchedulerListener()
        self._requests = LiveRequests(max_num_seqs, max_model_len, eos_token_ids, seed)
        self._waiting = WaitingQueue(policy)
        self._running: list[Sequence] = []  # in the policy's order: the last one makes room first
        self.seats = Seats(max_num_seqs, pace)
        self._admission = Admission(block_manager, self.seats)
        self._in_flight: dict[int, list[PlannedSequence]] = {}
        self._next_step_id = 0

    @property
    def has_work(self) -> bool:
        return len(self._requests) > 0

    @property
    def running(self) -> Many[Sequence]:
        """The sequences that have seats, first the one that makes room last."""
        return self._running

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_swapped(self) -> int:
        return sum(sequence.status is SequenceStatus.SWAPPED for sequence in self._waiting)

    # Requests come and go

    def add(self, message: GenerateRequest) -> Sequence:
        """Queue a request; returns its first sequence.

        Raises:
            InvalidRequestError: it can never be served.
        """
        self._requests.check(message)
        sequence = self._requests.add(message).sequences[0]
        self._waiting.push(sequence)
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
        return [self._fail(request, reason, "internal") for request in self._requests]

    # Schedule

    def schedule(self) -> StepPlan | None:
        """Plan the next step; ``None`` if nothing can run before an update."""
        builder = PlanBuilder(StepPlan(self._next_step_id), keeps_log=self._log_schedule)
        self._displace_for_waiting(builder)
        self._schedule_running(builder)
        if not builder.has_preempted:
            self._schedule_waiting(builder)
        if not (builder.plan.sequences or builder.plan.slot_setups or builder.plan.swap_out):
            return None
        if self._log_schedule:
            manager = self.block_manager
            logger.info(builder.describe(manager.num_free_blocks, manager.num_blocks, len(self._waiting)))
        self._in_flight[builder.plan.step_id] = builder.planned
        self._next_step_id += 1
        return builder.plan

    def _budget(self, num_decodes: int) -> int:
        """Less where sequences decode, which a large step would hold up."""
        limit = num_decodes + self._max_num_mixed_tokens if num_decodes else self._max_num_batched_tokens
        return min(limit, self._max_num_batched_tokens)

    def _displace_for_waiting(self, builder: PlanBuilder) -> None:
        """Let an urgent request push later ones out before they are planned, if that lets it in."""
        candidate = self._waiting.peek()
        if candidate is None or self._admission.fits(candidate):
            return
        later = [s for s in self._running if self._policy.may_displace(candidate.request, s.request)]
        if self._admission.would_fit_without(candidate, later):
            while not self._admission.fits(candidate):
                self._preempt(later.pop(), builder, f"for {name_of(candidate)}")

    def _schedule_running(self, builder: PlanBuilder) -> None:
        wanted = [sequence.num_uncomputed_tokens() for sequence in self._running]
        num_pending_decodes = wanted.count(1)
        builder.budget = self._budget(num_pending_decodes)
        for sequence, num_wanted in zip(list(self._running), wanted, strict=True):
            if num_wanted == 1:
                num_pending_decodes -= 1
            else:  # a chunk leaves room for the decodes behind it
                num_wanted = min(num_wanted, builder.budget - num_pending_decodes)
            if num_wanted <= 0 or builder.budget <= 0 or sequence.status is not SequenceStatus.RUNNING:
                continue
            if self._make_room(sequence, num_wanted, builder):
                self._plan(sequence, num_wanted, builder)

    def _make_room(self, sequence: Sequence, num_tokens: int, builder: PlanBuilder) -> bool:
        """Reserve blocks for the next tokens, preempting the last in line until they fit; false if that was itself."""
        start = sequence.num_computed_tokens
        if num_tokens == 1 and self.block_manager.write(sequence.sequence_id, start):
            return True
        while True:
            reservation = self.block_manager.reserve(sequence.sequence_id, start, start + num_tokens)
            if reservation is not None:
                builder.apply(sequence.slot, reservation)
                return True
            victim = self._running[-1]
            builder.has_preempted = True
            self._preempt(victim, builder, "no free block")
            if victim is sequence:
                return False

    def _schedule_waiting(self, builder: PlanBuilder) -> None:
        while builder.budget > 0:
            sequence = self._waiting.peek()
            if sequence is None or sequence.num_in_flight or not self._admission.fits(sequence):
                return
            self._waiting.pop()
            self._admit(sequence, builder)
            num_tokens = min(sequence.num_uncomputed_tokens(), builder.budget)
            if num_tokens == 0:
                continue  # seated, but its guide does not know the last token yet
            has_room = self._make_room(sequence, num_tokens, builder)
            assert has_room, "an admitted sequence fits"
            self._plan(sequence, num_tokens, builder)

    def _admit(self, sequence: Sequence, builder: PlanBuilder) -> None:
        self._admission.admit(sequence, builder)
        bisect.insort(self._running, sequence, key=self._policy.key)
        if sequence.num_preemptions == 0:
            sequence.request.num_cached_tokens = sequence.num_computed_tokens
            self._listener.on_admitted(sequence.request)

    def _plan(self, sequence: Sequence, num_tokens: int, builder: PlanBuilder) -> None:
        """Put the sequence's next tokens, for which there is room, into the plan."""
        start = sequence.num_computed_tokens
        sequence.num_computed_tokens = end = start + num_tokens
        if self.block_manager.enable_prefix_caching:
            hashes = sequence.update_block_hashes(self.block_manager.block_size)
            self.block_manager.register(sequence.sequence_id, hashes, end)
        drawing: list[Sequence] = []
        if end == sequence.num_tokens and sequence.request.pooling is None:
            drawing = [sequence] if len(sequence.request.sequences) == 1 else [sequence, *self._fork(sequence, builder)]
        builder.add(sequence, start, end, drawing)
        for other in drawing:
            other.num_in_flight += 1
            other.last_token_in_slot = True

    def _fork(self, parent: Sequence, builder: PlanBuilder) -> list[Sequence]:
        """At the end of the prompt, seat the request's other sequences on the same blocks."""
        children = self._admission.party(parent)[1:]
        for child in children:
            table = self.block_manager.fork(parent.sequence_id, child.sequence_id)
            child.start_from(parent)
            bisect.insort(self._running, child, key=self._policy.key)
            builder.seat(child)
            builder.write_table(child.slot, 0, table)
        return children

    def _preempt(self, victim: Sequence, builder: PlanBuilder, why: str) -> None:
        """Take the victim's blocks and seat; it waits, and will be swapped in or computed again."""
        manager, sequence_id = self.block_manager, victim.sequence_id
        num_computed = victim.num_computed_tokens
        num_blocks = len(manager.block_table(sequence_id))
        swaps = victim.request.pooling is None and self.costs.prefers_swap(num_computed, num_blocks)
        pairs = manager.swap_out(sequence_id) if swaps else None  # what has been pooled is lost with the seat
        if pairs is None:
            manager.free(sequence_id)
            victim.num_computed_tokens = 0
            victim.status = SequenceStatus.WAITING
        else:
            builder.plan.swap_out.extend(pairs)
            victim.status = SequenceStatus.SWAPPED
        how: PreemptionKind = "recompute" if pairs is None else "swap"
        builder.note(f"preempt {name_of(victim)} by {how} ({num_blocks} blocks, {num_computed} tokens): {why}")
        self._listener.on_preempted(how)
        for other in self._admission.party(victim):
            self.seats.leave(other)
        self._running.remove(victim)
        victim.num_preemptions += 1
        self._waiting.push(victim)

    # Update

    def update(self, result: StepResult) -> list[SequenceOutput]:
        """Take in what a step drew. Tokens for sequences that have ended meanwhile are dropped."""
        outputs: list[SequenceOutput] = []
        taken: list[Sequence] = []
        drawn = iter(zip(result.token_ids, result.logprobs, strict=True))
        for plan_index, planned in enumerate(self._in_flight.pop(result.step_id)):
            first = planned.sequence
            for offset, logprobs in enumerate(result.prompt_logprobs.get(plan_index, ())):
                first.request.prompt_logprobs[planned.start + offset + 1] = logprobs
            if (error := result.errors.get(plan_index)) is not None and planned.is_wanted:
                outputs.append(self._fail(first.request, error.message, error.kind))
            for sequence in planned.drawing:
                token_id, token_logprobs = next(drawn)
                sequence.num_in_flight -= 1
                if sequence.status is not SequenceStatus.FINISHED:
                    outputs.append(take_token(sequence, token_id, token_logprobs))
                    taken.append(sequence)
            if (embedding := result.embeddings.get(plan_index)) is not None and not first.is_finished:
                outputs.append(take_embedding(first, embedding))
                self._finish(first)
        self._listener.on_tokens(taken)
        for sequence in taken:
            if sequence.finish_reason is not None and not sequence.is_finished:
                self._finish(sequence)
        return outputs

    def fail_step(self, step_id: int, reason: str) -> list[SequenceOutput]:
        """A step broke: fail the requests it computed and trust nothing that is cached or on the host.

        Later steps in flight may read what this one should have written, so their requests fail too.
        """
        self.block_manager.reset_prefix_cache()
        planned = [entry for step in self._in_flight.values() for entry in step]
        for entry in self._in_flight.pop(step_id):
            for sequence in entry.drawing:
                sequence.num_in_flight -= 1
        outputs = [self._fail(entry.sequence.request, reason, "internal") for entry in planned if entry.is_wanted]
        for sequence in self._waiting:
            self._distrust(sequence)
        return outputs

    def _distrust(self, sequence: Sequence) -> None:
        """Compute a swapped sequence again: its blocks may not have reached the host."""
        if sequence.status is SequenceStatus.SWAPPED:
            self.block_manager.free(sequence.sequence_id)
            sequence.num_computed_tokens = 0
            sequence.status = SequenceStatus.WAITING

    def _fail(self, request: Request, reason: str, kind: ErrorKind, param: str | None = None) -> SequenceOutput:
        for sequence in request.sequences:
            if not sequence.is_finished:
                sequence.finish_reason = "error"
                self._finish(sequence, forget=kind == "internal")
        return error_output(request, reason, kind, param)

    def _finish(self, sequence: Sequence, *, forget: bool = False) -> None:
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        if sequence.status in (SequenceStatus.RUNNING, SequenceStatus.SWAPPED):
            self.block_manager.free(sequence.sequence_id, forget=forget)
        self.seats.leave(sequence)
        sequence.status = SequenceStatus.FINISHED
        self._listener.on_finished(sequence)
        if sequence.request.is_finished:
            self._requests.remove(sequence.request)

    def check_integrity(self) -> None:
        """Assert that seats, queues and blocks add up."""
        self.block_manager.check_integrity()
        self.seats.check_integrity([s.slot for r in self._requests for s in r.sequences if s.slot >= 0])
        assert all(s.status is SequenceStatus.RUNNING and s.slot >= 0 for s in self._running), "a runner has no seat"
        keys = [self._policy.key(s) for s in self._running]
        assert keys == sorted(keys), "running sequences are out of order"
        if not self.has_work:
            assert self.block_manager.num_free_blocks == self.block_manager.num_blocks, "blocks without an owner"
