"""A step in parts, for when memory does not hold it whole.

    tokens of three sequences   4 200 40   ──▶   4 118 | 82 40   ──▶   … down to single tokens

Every part is a step of its own, so each sequence gets what it would have got from the whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from cupy_engine.messages import TokenLogprobs
from cupy_engine.plan import ScheduledSequence, StepPlan, StepResult

logger = logging.getLogger("cupy_engine")


def compute_in_parts(plan: StepPlan, compute: Callable[[StepPlan], StepResult]) -> StepResult:
    """Compute a plan's sequences, in halves where ``compute`` runs out of memory before it has drawn.

    Raises:
        MemoryError: there is not even room for a single token.
    """
    try:
        return compute(plan)
    except MemoryError as error:
        if plan.num_tokens <= 1:
            raise
        reason = str(error)  # a log record may be kept, and the error has a traceback that holds the arrays
        logger.warning("step %d: no memory for %d tokens at once (%s)", plan.step_id, plan.num_tokens, reason)
    sequences = plan.sequences
    first, second = _halves(sequences)
    # A sequence that was cut is the last of the one half and the first of the other.
    offset = len(sequences) - len(second)
    before, after = (compute_in_parts(StepPlan.of(plan.step_id, half), compute) for half in (first, second))
    return _joined(before, after, offset)


def _halves(sequences: list[ScheduledSequence]) -> tuple[list[ScheduledSequence], list[ScheduledSequence]]:
    """Half of the tokens each; a sequence that has to be cut draws with its last token."""
    num_left = sum(sequence.num_tokens for sequence in sequences) // 2
    first: list[ScheduledSequence] = []
    for i, sequence in enumerate(sequences):
        if sequence.num_tokens > num_left:
            head, tail = _cut(sequence, num_left)
            return [*first, *head], [tail, *sequences[i + 1 :]]
        first.append(sequence)
        num_left -= sequence.num_tokens
    raise AssertionError("half of the tokens are fewer than all of them")


def _cut(sequence: ScheduledSequence, num_tokens: int) -> tuple[list[ScheduledSequence], ScheduledSequence]:
    """Its first tokens, if any are wanted, and the rest."""
    if num_tokens == 0:
        return [], sequence
    head, tail = sequence.token_ids[:num_tokens], sequence.token_ids[num_tokens:]
    return [msgspec.structs.replace(sequence, num_tokens=num_tokens, token_ids=head, sample_slots=[])], (
        msgspec.structs.replace(
            sequence,
            start=sequence.start + num_tokens,
            num_tokens=sequence.num_tokens - num_tokens,
            token_ids=tail,
        )
    )


def _joined(first: StepResult, second: StepResult, offset: int) -> StepResult:
    """One result; ``offset``: where the second's sequences begin among all."""
    prompt_logprobs = dict(first.prompt_logprobs)
    for index, scores in second.prompt_logprobs.items():
        prompt_logprobs[index + offset] = [*prompt_logprobs.get(index + offset, ()), *scores]
    return StepResult(
        first.step_id,
        first.token_ids + second.token_ids,
        _logprobs(first) + _logprobs(second) if first.logprobs or second.logprobs else [],
        prompt_logprobs,
        first.errors | {index + offset: error for index, error in second.errors.items()},
        first.embeddings | {index + offset: vector for index, vector in second.embeddings.items()},
    )


def _logprobs(result: StepResult) -> list[TokenLogprobs | None]:
    return result.logprobs or [None] * len(result.token_ids)
