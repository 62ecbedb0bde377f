"""The plan of one step: what the scheduler decides and the workers carry out. Plain data, ready for a wire.

A *slot* is a sequence's seat in the worker: block table row, last sampled token and sampling parameters live there,
so that a steady decode step has almost nothing to say.

    scheduler ── StepPlan ──▶ worker ── StepResult ──▶ scheduler

Most sequences of most steps decode, which takes no more than two integers: plans list them by columns, and keep records
of the others. What there is one of per token, or nearly, is kept from the garbage collector (``gc=False``): it is in no
cycle.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from cupy_engine.messages import Pooling, TokenLogprobs
from cupy_engine.sampling_params import SamplingParams


class SlotSetup(msgspec.Struct, array_like=True):
    """Seat a sequence in ``slot``: applies before the step runs and replaces whatever sat there.

    ``seed`` is the 64-bit key of the sequence's random numbers; ``output_token_ids`` is not empty when a preempted
    sequence comes back. ``num_prompt_tokens`` splits ``token_ids`` into prompt and output.
    ``is_guided``: each of its draws comes with a :class:`TokenMask`.
    """

    slot: int
    params: SamplingParams
    seed: int
    token_ids: list[int]
    num_prompt_tokens: int
    eos_token_ids: list[int]
    bad_words_token_ids: list[list[int]]
    needs_logprobs: bool
    is_guided: bool = False
    pooling: Pooling | None = None


class TokenMask(msgspec.Struct, array_like=True):
    """The tokens that a guided slot may draw in this step: bit ``i % 8`` of byte ``i // 8`` for token i."""

    slot: int
    allowed: bytes


class BlockTableWrite(msgspec.Struct, array_like=True, gc=False):
    """Write ``block_ids`` into a slot's block table from column ``first`` on."""

    slot: int
    first: int
    block_ids: list[int]


class ScheduledSequence(msgspec.Struct, array_like=True, gc=False):
    """Compute positions ``[start, start + num_tokens)`` of the sequence in ``slot``.

    ``token_ids`` are the ids at those positions; empty means one token: the last sampled in this slot, which the host
    may not know yet. ``sample_slots``: the slots that draw a token from the last position's logits (none in the middle
    of a prompt; several when a prompt's end forks into n sequences).
    """

    slot: int
    start: int
    num_tokens: int
    token_ids: list[int]
    sample_slots: list[int]
    num_prompt_logprobs: int | None = None

    @property
    def is_decode(self) -> bool:
        """It computes the token last drawn in its slot, draws the next, and that is all."""
        return not self.token_ids and self.sample_slots == [self.slot] and self.num_prompt_logprobs is None


class StepPlan(msgspec.Struct):
    """One step, to be carried out in field order.

    ``slots`` and ``starts`` say who computes, and from which position on; a sequence decodes unless ``chunks`` has
    another task for its index. :attr:`sequences` has all as records.
    """

    step_id: int
    swap_out: list[tuple[int, int]] = []  # (device block, host block)
    swap_in: list[tuple[int, int]] = []  # (host block, device block)
    block_copies: list[tuple[int, int]] = []  # (source, destination), copy-on-write
    slot_setups: list[SlotSetup] = []
    block_table_writes: list[BlockTableWrite] = []
    masks: list[TokenMask] = []  # one for every guided slot that draws
    slots: list[int] = []
    starts: list[int] = []
    chunks: dict[int, ScheduledSequence] = {}

    @classmethod
    def of(cls, step_id: int, sequences: Iterable[ScheduledSequence]) -> StepPlan:
        """A plan that computes these sequences, and nothing more."""
        plan = cls(step_id)
        for i, sequence in enumerate(sequences):
            plan.slots.append(sequence.slot)
            plan.starts.append(sequence.start)
            if not sequence.is_decode:
                plan.chunks[i] = sequence
        return plan

    @property
    def sequences(self) -> list[ScheduledSequence]:
        """What the step computes, in order."""
        places = enumerate(zip(self.slots, self.starts, strict=True))
        return [self.chunks.get(i) or ScheduledSequence(slot, start, 1, [], [slot]) for i, (slot, start) in places]

    @property
    def num_tokens(self) -> int:
        return len(self.slots) + sum(chunk.num_tokens - 1 for chunk in self.chunks.values())


class StepError(msgspec.Struct, array_like=True):
    """Why a step gave no token for a sequence: the caller's parameters left none ("invalid"), or it broke."""

    message: str
    kind: Literal["invalid", "internal"]


class StepResult(msgspec.Struct):
    """What a step gave. Lists run over ``sequences`` and within each over its ``sample_slots``, flattened.

    ``logprobs`` is empty if no slot asked, else ``logprobs[i]`` is ``None`` where one did not. ``prompt_logprobs``: by
    index into ``sequences`` for those that asked: one entry per computed position whose next token is in the prompt.
    ``errors``: by the same index, why a sequence got no token (non-finite logits, say). ``embeddings``: by the same
    index, [H] float32, where pooled prompts end.
    """

    step_id: int
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs | None] = []
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
    errors: dict[int, StepError] = {}
    embeddings: dict[int, bytes] = {}
