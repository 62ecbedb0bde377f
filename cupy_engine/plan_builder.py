"""Collects the decisions of one step into a plan, with a log of them for people."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from cupy_engine.block_manager import Reservation
from cupy_engine.plan import BlockTableWrite, ScheduledSequence, SlotSetup, StepPlan, TokenMask
from cupy_engine.request import Sequence


class PlannedSequence(msgspec.Struct, gc=False):
    """Whose tokens a plan's entry computes, and who draws a token from it."""

    sequence: Sequence
    start: int
    drawing: list[Sequence]

    @property
    def is_wanted(self) -> bool:
        """Whether a sequence that lives depends on it. The computing one may have ended while others draw from it."""
        return not all(sequence.is_finished for sequence in (self.sequence, *self.drawing))


@dataclass(slots=True)
class PlanBuilder:
    """A plan in the making. ``budget`` is the number of tokens that the step may still compute."""

    plan: StepPlan
    budget: int = 0
    keeps_log: bool = False
    planned: list[PlannedSequence] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    has_preempted: bool = False

    def note(self, line: str) -> None:
        if self.keeps_log:
            self.log.append(line)

    def seat(self, sequence: Sequence) -> None:
        """Tell the worker who sits in the sequence's slot from this step on."""
        request = sequence.request
        setup = SlotSetup(
            slot=sequence.slot,
            params=request.params,
            seed=sequence.seed,
            token_ids=list(sequence.token_ids),
            num_prompt_tokens=sequence.num_prompt_tokens,
            eos_token_ids=list(request.eos_token_ids),
            bad_words_token_ids=request.bad_words_token_ids,
            needs_logprobs=request.needs_logprobs,
            is_guided=sequence.guide is not None,
            pooling=request.pooling,
        )
        self.plan.slot_setups.append(setup)

    def write_table(self, slot: int, first: int, block_ids: list[int]) -> None:
        if block_ids:
            self.plan.block_table_writes.append(BlockTableWrite(slot, first, block_ids))

    def apply(self, slot: int, reservation: Reservation) -> None:
        if reservation.block_ids:  # copies are among them
            self.plan.block_copies.extend(reservation.copies)
            self.write_table(slot, reservation.first_changed, reservation.block_ids)

    def add(self, sequence: Sequence, start: int, end: int, drawing: list[Sequence]) -> None:
        """Compute positions ``[start, end)``; the sequences in ``drawing`` draw a token from the last one."""
        request = sequence.request
        is_known_to_slot = sequence.last_token_in_slot and end - start == 1
        scheduled = ScheduledSequence(
            sequence.slot,
            start,
            end - start,
            [] if is_known_to_slot else sequence.token_ids[start:end],
            [other.slot for other in drawing],
            request.params.prompt_logprobs if request.wants_prompt_logprobs else None,
        )
        self.plan.sequences.append(scheduled)
        if sequence.guide is not None:
            self._mask(drawing)
        self.planned.append(PlannedSequence(sequence, start, drawing))
        self.budget -= end - start
        if end - start > 1:
            self.note(f"compute {name_of(sequence)}[{start}:{end}] of {sequence.num_tokens}")

    def _mask(self, drawing: list[Sequence]) -> None:
        """Say what guided sequences may draw; their guides know by now."""
        for sequence in drawing:
            assert sequence.guide is not None
            assert sequence.guide.mask is not None
            self.plan.masks.append(TokenMask(sequence.slot, sequence.guide.mask))

    def describe(self, num_free_blocks: int, num_blocks: int, num_waiting: int) -> str:
        """One line for people: what the step does and why."""
        num_decodes = sum(s.num_tokens == 1 for s in self.plan.sequences)
        head = (
            f"step {self.plan.step_id}: {self.plan.num_tokens} tokens, {num_decodes} decodes, "
            f"{len(self.plan.sequences) - num_decodes} chunks, {num_waiting} waiting, "
            f"{num_free_blocks}/{num_blocks} blocks free"
        )
        return "; ".join([head, *self.log])


def name_of(sequence: Sequence) -> str:
    """``request.index``, as the log writes it."""
    return f"{sequence.request.request_id}.{sequence.index}"
