"""What sampling knows about a slot besides numbers: tokens its request singles out, and tokens it has seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cupy_engine.device import Array, Device
from cupy_engine.ops.sampling import SEEN_IN_PROMPT
from cupy_engine.plan import SlotSetup


@dataclass(slots=True)
class TokenLists:
    """The tokens a slot's request singles out. Ids outside the vocabulary are left out: no logit stands for them.

    A slot has one of these only if it edits its logits by lists.
    """

    mask: np.ndarray | None  # [V] float32, 0 for allowed_token_ids, -inf for all others
    stops: np.ndarray  # [K] int32, forbidden before min_tokens
    biased: np.ndarray  # [K] int32
    biases: np.ndarray  # [K] float32
    bad_words: BadWords
    is_guided: bool = False  # each draw comes with a mask of its own

    @classmethod
    def of(cls, setup: SlotSetup, vocab_size: int) -> TokenLists | None:
        """The lists of a slot, or ``None`` if its request names no token."""
        params = setup.params
        bias = {token_id: bias for token_id, bias in (params.logit_bias or {}).items() if token_id < vocab_size}
        stops = [*setup.eos_token_ids, *(params.stop_token_ids or [])] if params.min_tokens else []
        lists = cls(
            mask=_mask(params.allowed_token_ids, vocab_size),
            stops=_token_ids(token_id for token_id in stops if 0 <= token_id < vocab_size),
            biased=_token_ids(bias),
            biases=np.array(list(bias.values()), np.float32),
            bad_words=BadWords.of(setup.bad_words_token_ids, setup.token_ids, vocab_size),
            is_guided=setup.is_guided,
        )
        return lists if lists.always_edits or lists.stops.size else None

    @property
    def always_edits(self) -> bool:
        """Whether logits change at every position, not only before ``min_tokens``."""
        return self.is_guided or self.mask is not None or bool(self.biased.size) or self.bad_words.can_match


@dataclass(slots=True)
class BadWords:
    """Token sequences that may not be completed, and the end of the context (prompt and output) to match them with."""

    single: np.ndarray  # [K] int32, words of one token
    longer: list[tuple[list[int], int]]  # what stands before, the token that would complete the word
    recent: list[int]  # the last tokens, as many as the longest "before" has
    max_recent: int

    @classmethod
    def of(cls, words: list[list[int]], context: Sequence[int], vocab_size: int) -> BadWords:
        possible = [word for word in words if word and max(word) < vocab_size]
        max_recent = max(map(len, possible), default=1) - 1
        return cls(
            single=_token_ids(word[0] for word in possible if len(word) == 1),
            longer=[(word[:-1], word[-1]) for word in possible if len(word) > 1],
            recent=list(context[max(0, len(context) - max_recent) :]),
            max_recent=max_recent,
        )

    @property
    def can_match(self) -> bool:
        return bool(self.single.size or self.longer)

    def forbidden(self) -> np.ndarray:
        """[K] int32, the tokens that would complete a word now."""
        completing = [last for before, last in self.longer if self.recent[-len(before) :] == before]
        return np.concatenate([self.single, _token_ids(completing)])

    def record(self, token_id: int) -> None:
        self.recent.append(token_id)
        del self.recent[: len(self.recent) - self.max_recent]


class SeenTokens:
    """How often each token occurred, for the slots that penalize repetition: a row of V counts per such slot.

    Rows are made when first needed and reused, at most one per slot.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: Device) -> None:
        self._device = device
        self._num_slots = num_slots
        self._rows: dict[int, int] = {}
        self._free_rows: list[int] = []
        self.counts: Array = device.xp.zeros((0, vocab_size), np.int32)  # [rows, V], SEEN_IN_PROMPT + output count

    def seat(self, slot: int, prompt_token_ids: list[int], output_token_ids: list[int]) -> None:
        """Start counting for a slot anew."""
        vocab_size = self.counts.shape[1]
        counts = np.bincount(_within(output_token_ids, vocab_size), minlength=vocab_size).astype(np.int32)
        counts[_within(prompt_token_ids, vocab_size)] |= SEEN_IN_PROMPT
        row = self._row(slot)
        self.counts[row] = self._device.asarray(counts)

    def discard(self, slot: int) -> None:
        """Stop counting for a slot, if it did."""
        if slot in self._rows:
            self._free_rows.append(self._rows.pop(slot))

    def rows(self, slots: np.ndarray) -> np.ndarray:
        """[N] int, the rows of ``counts`` that belong to slots [N] int, all of which are seated."""
        return np.array([self._rows[slot] for slot in slots.tolist()])

    def record(self, slots: np.ndarray, token_ids: Array) -> None:
        """Count one generated token, token_ids [N] int32, per slot, slots [N] int."""
        self.counts[self.rows(slots), token_ids] += 1

    def _row(self, slot: int) -> int:
        if slot not in self._rows:
            if not self._free_rows:
                self._grow()
            self._rows[slot] = self._free_rows.pop()
        return self._rows[slot]

    def _grow(self) -> None:
        old_rows, vocab_size = self.counts.shape
        new_rows = min(self._num_slots, max(4, 2 * old_rows))
        counts = self._device.xp.zeros((new_rows, vocab_size), np.int32)
        counts[:old_rows] = self.counts
        self.counts = counts
        self._free_rows.extend(range(new_rows - 1, old_rows - 1, -1))


def _token_ids(token_ids: Iterable[int]) -> np.ndarray:
    return np.fromiter(token_ids, np.int32)


def _within(token_ids: list[int], vocab_size: int) -> np.ndarray:
    array = np.array(token_ids, np.int64)
    return array[(array >= 0) & (array < vocab_size)]


def _mask(token_ids: list[int] | None, vocab_size: int) -> np.ndarray | None:
    if token_ids is None:
        return None
    mask = np.full(vocab_size, -np.inf, np.float32)
    mask[_within(token_ids, vocab_size)] = 0.0
    return mask
