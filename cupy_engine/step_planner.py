"""Which sequences run in a step, how many tokens each, and who makes room. Plain Python: no arrays, clocks or text.

There are no phases. A sequence has tokens, and some of them are computed; a step gives each sequence some tokens so
that the second number catches up with the first. Decode is the case of one token, prefill of many, a chunk of some,
and a cached prefix a head start. Continuous batching: Yu et al., OSDI 2022; chunked prefill: Agrawal et al., OSDI 2024.

    seats, blocks    ┌ running: oldest first, the last one makes room ┐  ◀── admit ──  waiting: in the policy's order
                     └────────────────────────────────────────────────┘  ── preempt ─▶

In most steps most sequences decode, and all there is to do for them is to count: they are *steady*, and stay so up to
a known position, where a block is full, or the end comes, or a token has to be waited for.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence as Many
from itertools import groupby

from cupy_engine.admission import Admission
from cupy_engine.block_manager import BlockManager
from cupy_engine.expected_growth import ExpectedGrowth
from cupy_engine.plan_builder import PlanBuilder, name_of
from cupy_engine.preemption import PreemptionCosts
from cupy_engine.request import Sequence, SequenceStatus
from cupy_engine.request_queue import Policy, WaitingQueue
from cupy_engine.scheduler_listener import PreemptionKind, SchedulerListener
from cupy_engine.seats import Seats


class StepPlanner:
    """Owns who runs and who waits, their seats and their blocks.

    Args:
        growth: keeps out who would soon have to make room again; default: whoever fits comes in.
        max_num_batched_tokens: token budget of a step.
        max_num_mixed_tokens: most prompt tokens of a step in which sequences decode.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        seats: Seats,
        policy: Policy,
        costs: PreemptionCosts,
        listener: SchedulerListener,
        growth: ExpectedGrowth | None,
        *,
        max_num_batched_tokens: int,
        max_num_mixed_tokens: int,
    ) -> None:
        self.waiting = WaitingQueue(policy)
        self.running: list[Sequence] = []  # in the policy's order: the last one makes room first
        self._manager = block_manager
        self._seats = seats
        self._admission = Admission(block_manager, seats, growth)
        self._growth = growth
        self._kept_out: Sequence | None = None  # there is no room for it to grow until another leaves
        self._policy = policy
        self._costs = costs
        self._listener = listener
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_mixed_tokens = max_num_mixed_tokens

    def fill(self, builder: PlanBuilder) -> None:
        """Decide what the next step does."""
        self._displace_for_waiting(builder)
        self._schedule_running(builder)
        if not builder.has_preempted:
            self._schedule_waiting(builder)

    def remove(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Drop a sequence that ends, from wherever it is. ``forget``: what it computed must not be found again."""
        if sequence.status is SequenceStatus.RUNNING:
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)
        if self._growth is not None and sequence.finish_reason in ("stop", "length"):
            self._growth.observe(sequence)
        if sequence.status in (SequenceStatus.RUNNING, SequenceStatus.SWAPPED):
            self._manager.free(sequence.sequence_id, forget=forget)
        self._seats.leave(sequence)

    def distrust(self) -> None:
        """A step broke: trust nothing that is cached or on the host. What is swapped out is computed again."""
        self._manager.reset_prefix_cache()
        for sequence in self.waiting:
            if sequence.status is SequenceStatus.SWAPPED:
                self._manager.free(sequence.sequence_id)
                sequence.num_computed_tokens = 0
                sequence.status = SequenceStatus.WAITING

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._kept_out = None

    # Who has run before goes on

    def _schedule_running(self, builder: PlanBuilder) -> None:
        running = list(self.running)
        num_decodes = sum(_is_steady(s) or s.num_uncomputed_tokens() == 1 for s in running)
        builder.budget = self._budget(num_decodes)
        builder.num_pending_decodes = num_decodes
        for are_steady, sequences in groupby(running, _is_steady):
            if are_steady:
                self._decode(list(sequences), builder)
            else:
                for sequence in sequences:
                    self._continue(sequence, builder)

    def _decode(self, sequences: list[Sequence], builder: PlanBuilder) -> None:
        """Let steady sequences go on, as many as the budget allows."""
        builder.num_pending_decodes -= len(sequences)
        del sequences[max(0, builder.budget) :]
        builder.decode(sequences)
        for sequence in sequences:
            sequence.num_computed_tokens += 1
            sequence.num_in_flight += 1

    def _continue(self, sequence: Sequence, builder: PlanBuilder) -> None:
        """Let a sequence go on by what it wants, or as much of it as the budget and the blocks allow."""
        num_tokens = sequence.num_uncomputed_tokens()
        if num_tokens == 1:
            builder.num_pending_decodes -= 1
        else:  # a chunk leaves room for the decodes behind it
            num_tokens = min(num_tokens, builder.budget - builder.num_pending_decodes)
        if num_tokens <= 0 or builder.budget <= 0 or sequence.status is not SequenceStatus.RUNNING:
            return
        if self._make_room(sequence, num_tokens, builder):
            self._plan(sequence, num_tokens, builder)

    def _budget(self, num_decodes: int) -> int:
        """Less where sequences decode, which a large step would hold up."""
        limit = num_decodes + self._max_num_mixed_tokens if num_decodes else self._max_num_batched_tokens
        return min(limit, self._max_num_batched_tokens)

    def _make_room(self, sequence: Sequence, num_tokens: int, builder: PlanBuilder) -> bool:
        """Reserve blocks for the next tokens, preempting the last in line until they fit; false if that was itself."""
        start = sequence.num_computed_tokens
        while True:
            reservation = self._manager.reserve(sequence.sequence_id, start, start + num_tokens)
            if reservation is not None:
                builder.apply(sequence.slot, reservation)
                return True
            victim = self.running[-1]
            builder.has_preempted = True
            self._preempt(victim, builder, "no free block")
            if victim is sequence:
                return False

    def _preempt(self, victim: Sequence, builder: PlanBuilder, why: str) -> None:
        """Take the victim's blocks and seat; it waits, and will be swapped in or computed again."""
        manager, sequence_id = self._manager, victim.sequence_id
        num_computed = victim.num_computed_tokens
        num_blocks = len(manager.block_table(sequence_id))
        swaps = victim.request.pooling is None and self._costs.prefers_swap(num_computed, num_blocks)
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
            self._seats.leave(other)
        self._leave(victim)
        victim.num_preemptions += 1
        self.waiting.push(victim)

    # Who waits comes in

    def _displace_for_waiting(self, builder: PlanBuilder) -> None:
        """Let an urgent request push later ones out before they are planned, if that lets it in."""
        candidate = self.waiting.peek()
        if candidate is None or self._admission.fits(candidate):
            return
        later = [s for s in self.running if self._policy.may_displace(candidate.request, s.request)]
        if self._admission.would_fit_without(candidate, later):
            while not self._admission.fits(candidate):
                self._preempt(later.pop(), builder, f"for {name_of(candidate)}")

    def _schedule_waiting(self, builder: PlanBuilder) -> None:
        while builder.budget > 0:
            sequence = self.waiting.peek()
            if sequence is None or sequence.num_in_flight or not self._may_come_in(sequence):
                return
            self.waiting.pop()
            self._admit(sequence, builder)
            num_tokens = min(sequence.num_uncomputed_tokens(), builder.budget)
            if num_tokens == 0:
                continue  # seated, but its guide does not know the last token yet
            has_room = self._make_room(sequence, num_tokens, builder)
            assert has_room, "an admitted sequence fits"
            self._plan(sequence, num_tokens, builder)

    def _may_come_in(self, sequence: Sequence) -> bool:
        if sequence is self._kept_out or not self._admission.fits(sequence):
            return False
        if self._admission.can_stay(sequence, self.running):
            return True
        self._kept_out = sequence
        return False

    def _admit(self, sequence: Sequence, builder: PlanBuilder) -> None:
        self._admission.admit(sequence, builder)
        bisect.insort(self.running, sequence, key=self._policy.key)
        if sequence.num_preemptions == 0:
            sequence.request.num_cached_tokens = sequence.num_computed_tokens
            self._listener.on_admitted(sequence.request)

    # What a sequence does in the step

    def _plan(self, sequence: Sequence, num_tokens: int, builder: PlanBuilder) -> None:
        """Put the sequence's next tokens, for which there is room, into the plan."""
        start = sequence.num_computed_tokens
        sequence.num_computed_tokens = end = start + num_tokens
        if self._manager.enable_prefix_caching:
            hashes = sequence.update_block_hashes(self._manager.block_size)
            self._manager.register(sequence.sequence_id, hashes, end)
        drawing: list[Sequence] = []
        if end == sequence.num_tokens and sequence.request.pooling is None:
            drawing = [sequence, *self._fork(sequence, builder)]
        builder.add(sequence, start, end, drawing)
        for other in drawing:
            other.num_in_flight += 1
            other.last_token_in_slot = True
        if drawing and sequence.guide is None:
            most = sequence.request.max_num_tokens - 1  # the last token is drawn, not computed
            num_unknown = sequence.num_in_flight - 1  # when the next token is planned like this one
            sequence.steady_until = min(most, self._manager.steady_until(sequence.sequence_id, num_unknown))

    def _fork(self, parent: Sequence, builder: PlanBuilder) -> Many[Sequence]:
        """At the end of the prompt, seat the request's other sequences on the same blocks."""
        if len(parent.request.sequences) == 1:
            return ()
        children = self._admission.party(parent)[1:]
        for child in children:
            table = self._manager.fork(parent.sequence_id, child.sequence_id)
            child.start_from(parent)
            bisect.insort(self.running, child, key=self._policy.key)
            builder.seat(child)
            builder.write_table(child.slot, 0, table)
        return children


def _is_steady(sequence: Sequence) -> bool:
    """It decodes, and all there is to do for that is to count."""
    return sequence.num_computed_tokens < sequence.steady_until
