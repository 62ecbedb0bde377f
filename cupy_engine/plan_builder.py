"""Collects the decisions of one step into a plan, with a log of them for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from cupy_engine.block_manager import Reservation
from cupy_engine.plan import BlockTableWrite, ScheduledSequence, SlotSetup, StepPlan, TokenMask
from cupy_engine.request import Sequence


@dataclass(slots=True)
class PlannedStep:
    """A plan, and whose tokens it computes and draws."""

    plan: StepPlan
    sequences: list[Sequence] = field(default_factory=list)  # who computes: in the plan's order
    drawing: list[Sequence] = field(default_factory=list)  # who draws: none, one or several from each, in that order

    def entries(self) -> Iterator[tuple[Sequence, list[Sequence]]]:
        """Each sequence that computes, and those that draw from it."""
        drawing = iter(self.drawing)
        for i, sequence in enumerate(self.sequences):
            chunk = self.plan.chunks.get(i)
            yield sequence, list(islice(drawing, 1 if chunk is None else len(chunk.sample_slots)))


@dataclass(slots=True)
class PlanBuilder:
    """A plan in the making.

    ``budget`` is the number of tokens that the step may still compute, of which the sequences that are still to come
    will take ``num_pending_decodes`` for decodes.
    """

    step: PlannedStep
    budget: int = 0
    num_pending_decodes: int = 0
    keeps_log: bool = False
    log: list[str] = field(default_factory=list)
    has_preempted: bool = False

    @property
    def plan(self) -> StepPlan:
        return self.step.plan

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

    def decode(self, sequences: list[Sequence]) -> None:
        """:meth:`add` for the usual case: each computes the one token that its slot knows, and draws the next."""
        self.plan.slots += [sequence.slot for sequence in sequences]
        self.plan.starts += [sequence.num_computed_tokens for sequence in sequences]
        self.step.sequences += sequences
        self.step.drawing += sequences
        self.budget -= len(sequences)

    def add(self, sequence: Sequence, start: int, end: int, drawing: list[Sequence]) -> None:
        """Compute positions ``[start, end)``; the sequences in ``drawing`` draw a token from the last one."""
        if not (sequence.last_token_in_slot and end - start == 1):
            self.plan.chunks[len(self.plan.slots)] = _chunk(sequence, start, end, drawing)
        self.plan.slots.append(sequence.slot)
        self.plan.starts.append(start)
        self.step.sequences.append(sequence)
        self.step.drawing += drawing
        if sequence.guide is not None:
            self._mask(drawing)
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
        sequences = self.plan.sequences
        num_decodes = sum(s.num_tokens == 1 for s in sequences)
        head = (
            f"step {self.plan.step_id}: {self.plan.num_tokens} tokens, {num_decodes} decodes, "
            f"{len(sequences) - num_decodes} chunks, {num_waiting} waiting, "
            f"{num_free_blocks}/{num_blocks} blocks free"
        )
        return "; ".join([head, *self.log])


def _chunk(sequence: Sequence, start: int, end: int, drawing: list[Sequence]) -> ScheduledSequence:
    request, slots = sequence.request, [other.slot for other in drawing]
    num_prompt_logprobs = request.params.prompt_logprobs if request.wants_prompt_logprobs else None
    token_ids = sequence.token_ids[start:end]
    return ScheduledSequence(sequence.slot, start, end - start, token_ids, slots, num_prompt_logprobs)


def name_of(sequence: Sequence) -> str:
    """``request.index``, as the log writes it."""
    return f"{sequence.request.request_id}.{sequence.index}"
