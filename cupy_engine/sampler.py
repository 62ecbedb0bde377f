"""Logits → token ids (+ log-probabilities): what each slot asks for, and the draw.

One draw's way, each stage only for the slots that ask for it:

    raw logits ── grammar, allowed_token_ids ── bad_words, min_tokens ── logit_bias ── penalties
        │                                       temperature 0: argmax, else a random draw ──┘
        └── log-probabilities
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cupy_engine.device import Array, Device
from cupy_engine.messages import TokenLogprobs
from cupy_engine.ops import sampling as ops
from cupy_engine.plan import SlotSetup, TokenMask
from cupy_engine.sampling_state import SeenTokens, TokenLists

NOT_FINITE = "the model gave logits that are not finite"
NOTHING_ALLOWED = "allowed_token_ids, bad_words, min_tokens and the output's form leave no token to choose"

_SEED_MASK = (1 << 64) - 1

_SLOT = np.dtype(
    [
        ("temperature", np.float64),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("seed", np.uint64),
        ("repetition", np.float64),
        ("frequency", np.float64),
        ("presence", np.float64),
        ("has_penalties", np.bool_),
        ("always_edits", np.bool_),
        ("first_stop_position", np.int64),  # min_tokens: no stop token is drawn before this position
        ("needs_logprobs", np.bool_),
        ("num_top_logprobs", np.int64),
    ]
)


@dataclass(slots=True)
class SampleResult:
    """N draws. ``errors`` says, by draw, why it has no token; its id is 0 then and its log-probabilities ``None``."""

    token_ids: Array  # [N] int32
    logprobs: list[TokenLogprobs | None]
    errors: dict[int, str]


class Sampler:
    """Per-slot sampling state and the draw. A slot's draws depend neither on its number nor on the other draws.

    Args:
        num_slots: slots are numbered below this.
        vocab_size: V, the width of the logits.
        device: where logits live and token ids go.

    Usage::

        sampler.set_slot(setup)
        result = sampler.sample(logits, rows=np.array([0]), slots=np.array([setup.slot]), positions=np.array([7]))
    """

    def __init__(self, num_slots: int, vocab_size: int, device: Device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._slots = np.zeros(num_slots, _SLOT)
        self._token_lists: dict[int, TokenLists] = {}
        self._masks: dict[int, bytes] = {}
        self._seen = SeenTokens(num_slots, vocab_size, device)

    def set_slot(self, setup: SlotSetup) -> None:
        """Seat a sequence, replacing whatever sat there. A resumed one brings its output in ``token_ids``."""
        params, num_prompt_tokens = setup.params, setup.num_prompt_tokens
        lists = TokenLists.of(setup, self._vocab_size)
        self._token_lists.pop(setup.slot, None)
        if lists:
            self._token_lists[setup.slot] = lists
        if params.has_penalties:
            self._seen.seat(setup.slot, setup.token_ids[:num_prompt_tokens], setup.token_ids[num_prompt_tokens:])
        else:
            self._seen.discard(setup.slot)
        self._slots[setup.slot] = (
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            setup.seed & _SEED_MASK,
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
            params.has_penalties,
            params.has_penalties or (lists is not None and lists.always_edits),
            num_prompt_tokens + params.min_tokens,
            setup.needs_logprobs,
            params.logprobs or 0,
        )

    def set_masks(self, masks: list[TokenMask]) -> None:
        """What guided slots may draw in the next :meth:`sample`."""
        self._masks = {mask.slot: mask.allowed for mask in masks}

    def sample(self, logits: Array, rows: np.ndarray, slots: np.ndarray, positions: np.ndarray) -> SampleResult:
        """Draw a token per entry of ``rows`` and record it in its slot.

        Args:
            logits: [R, V] float32, C- or F-ordered; not changed.
            rows: [N] int, the row of logits each draw uses; several may use the same.
            slots: [N] int, none twice.
            positions: [N] int, the position in its sequence of the token being drawn.
        """
        states = self._slots[slots]
        logits, rows = self._rows_in_use(logits, rows)
        best_ids, best_logits = ops.argmax(logits)
        is_finite = np.isfinite(best_logits)[rows]
        is_edited = states["always_edits"] | (positions < states["first_stop_position"])
        errors = dict.fromkeys(np.flatnonzero(~is_finite).tolist(), NOT_FINITE)
        token_ids = np.where(is_finite, best_ids[rows], np.int32(0))

        plain = np.flatnonzero(is_finite & ~is_edited)
        _draw(token_ids, plain, logits, rows[plain], states, positions)
        edited = np.flatnonzero(is_finite & is_edited)
        if edited.size:
            edited_logits = logits[rows[edited]]
            self._edit(edited_logits, states[edited], slots[edited], positions[edited])
            best_ids, best_logits = ops.argmax(edited_logits)
            is_possible = best_logits > -np.inf
            errors.update(dict.fromkeys(edited[~is_possible].tolist(), NOTHING_ALLOWED))
            token_ids[edited] = np.where(is_possible, best_ids, np.int32(0))
            _draw(token_ids, edited[is_possible], edited_logits, np.flatnonzero(is_possible), states, positions)

        self._record(states, slots, token_ids)
        return SampleResult(token_ids, _logprobs(logits, rows, states, token_ids, errors), errors)

    def prompt_logprobs(self, logits: Array, next_token_ids: np.ndarray, num_top: int) -> list[TokenLogprobs]:
        """Log-probabilities of given tokens, one record per row.

        Args:
            logits: [R, V] float32, C- or F-ordered. A row that is not finite gives a NaN logprob and rank 0.
            next_token_ids: [R] int, the prompt's token after each row's position.
            num_top: alternatives to list.
        """
        rows = np.arange(len(next_token_ids))
        return _as_records(next_token_ids, ops.token_logprobs(logits, rows, next_token_ids, num_top))

    def _rows_in_use(self, logits: Array, rows: np.ndarray) -> tuple[Array, np.ndarray]:
        """The logits that the draws need, C-ordered, and where each draw finds its row in them."""
        used, places = np.unique(rows, return_inverse=True)
        if used.size < len(logits):
            logits, rows = logits[used], places
        return self._device.xp.ascontiguousarray(logits), rows

    def _edit(self, logits: Array, states: np.ndarray, slots: np.ndarray, positions: np.ndarray) -> None:
        """Apply masks, token lists and penalties in place. logits [M, V], the rest [M]."""
        masks = {draw: self._masks[slot] for draw, slot in enumerate(slots.tolist()) if slot in self._masks}
        ops.allow(logits, np.array(list(masks), np.int64), list(masks.values()))
        lists = [
            (draw, self._token_lists[slot]) for draw, slot in enumerate(slots.tolist()) if slot in self._token_lists
        ]
        if lists:
            is_early = positions < states["first_stop_position"]
            _apply_lists(logits, lists, is_early)
        penalized = np.flatnonzero(states["has_penalties"])
        if penalized.size:
            factors = (states[name][penalized] for name in ("repetition", "frequency", "presence"))
            ops.penalize(logits, penalized, self._seen.counts, self._seen.rows(slots[penalized]), *factors)

    def _record(self, states: np.ndarray, slots: np.ndarray, token_ids: np.ndarray) -> None:
        penalized = states["has_penalties"]
        if penalized.any():
            self._seen.record(slots[penalized], token_ids[penalized])
        if self._token_lists:
            for slot, token_id in zip(slots.tolist(), token_ids.tolist(), strict=True):
                if slot in self._token_lists:
                    self._token_lists[slot].bad_words.record(token_id)


def _apply_lists(logits: Array, lists: list[tuple[int, TokenLists]], is_early: np.ndarray) -> None:
    """Mask, forbid and bias tokens in place; ``lists`` pairs rows of logits with what applies there."""
    masks = {draw: entry.mask for draw, entry in lists if entry.mask is not None}
    if masks:
        ops.mask(logits, np.array(list(masks)), list(masks.values()))
    ops.forbid(logits, *_flatten([(draw, entry.bad_words.forbidden()) for draw, entry in lists]))
    ops.forbid(logits, *_flatten([(draw, entry.stops) for draw, entry in lists if is_early[draw]]))
    biases = np.concatenate([entry.biases for _, entry in lists])
    ops.add_bias(logits, *_flatten([(draw, entry.biased) for draw, entry in lists]), biases)


def _flatten(lists: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a draw and its token ids as two flat arrays [K] int64: the draw of each token, the token."""
    draws = np.repeat([draw for draw, _ in lists], [token_ids.size for _, token_ids in lists])
    return draws.astype(np.int64), np.concatenate([np.empty(0, np.int64), *(token_ids for _, token_ids in lists)])


def _draw(
    token_ids: np.ndarray,
    draws: np.ndarray,
    logits: Array,
    rows: np.ndarray,
    states: np.ndarray,
    positions: np.ndarray,
) -> None:
    """Put a random choice into ``token_ids[draws]`` where there is a temperature; draws, rows [K]."""
    is_random = states["temperature"][draws] > 0
    if not is_random.any():
        return
    draws, rows = draws[is_random], rows[is_random]
    drawing = states[draws]
    token_ids[draws] = ops.draw(
        logits,
        rows,
        temperature=drawing["temperature"],
        top_k=drawing["top_k"],
        top_p=drawing["top_p"],
        min_p=drawing["min_p"],
        uniform=ops.uniforms(drawing["seed"], positions[draws]),
    )


def _logprobs(
    logits: Array, rows: np.ndarray, states: np.ndarray, token_ids: np.ndarray, errors: dict[int, str]
) -> list[TokenLogprobs | None]:
    """Log-probabilities of the tokens drawn, for the draws that ask and did not fail."""
    result: list[TokenLogprobs | None] = [None] * len(token_ids)
    asking = [draw for draw in np.flatnonzero(states["needs_logprobs"]).tolist() if draw not in errors]
    if asking:
        num_top = states["num_top_logprobs"][asking]
        values = ops.token_logprobs(logits, rows[asking], token_ids[asking], int(num_top.max()))
        for draw, record, count in zip(asking, _as_records(token_ids[asking], values), num_top.tolist(), strict=True):
            del record.top[count:]
            result[draw] = record
    return result


def _as_records(token_ids: np.ndarray, values: ops.RowLogprobs) -> list[TokenLogprobs]:
    lists = (token_ids, values.chosen, values.ranks, values.top_token_ids, values.top)
    return [
        TokenLogprobs(token_id, logprob, rank, list(zip(top_ids, top, strict=True)))
        for token_id, logprob, rank, top_ids, top in zip(*(array.tolist() for array in lists), strict=True)
    ]
