"""Sampling: logits → token ids and log-probabilities. R rows of logits, N draws (or M of them), V tokens.

Tokens are ranked by logit, equals by id, lower first. A greedy draw takes the first of this ranking, top-k the k first,
min-p and top-p a prefix: every cut keeps the most likely token, and equals never leave a choice open.

A logit of -inf forbids its token. Only :func:`argmax` and :func:`token_logprobs` take NaN and +inf.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cupy_engine.device import Array

SEEN_IN_PROMPT = 1 << 30  # the bit of `seen` that says so; the bits below count how often the token was generated

_FLOAT32_MAX = np.finfo(np.float32).max
_WORD = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_PHILOX_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_PHILOX_KEY_STEPS = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
_PHILOX_ROUNDS = 10
_CACHE_LINE_ROWS = 16  # float32 values of one column of a transposed array in a cache line
_GROUP_SIZE = 64
_BINS_PER_UNIT = 64
_MAX_BINNED = 63.5  # tokens e^-63.5 times as likely as the best share the last bin


class RowLogprobs(NamedTuple):
    """Natural-log probabilities of N chosen tokens and of the k most likely tokens beside each.

    Where a row of logits has NaN, +inf or nothing but -inf, its values are NaN and its rank is 0.
    """

    chosen: Array  # [N] float64
    ranks: Array  # [N] int64, 1 + the number of tokens strictly more likely than the chosen one
    top_token_ids: Array  # [N, k] int32, most likely first
    top: Array  # [N, k] float64


def argmax(logits: Array) -> tuple[Array, Array]:
    """The most likely token of each row, the lowest id among equals, and its logit.

    The logit is finite exactly if the row can be sampled: NaN counts as the largest value, so it surfaces here.

    Args:
        logits: [R, V] float32, any memory order.
    Returns:
        token ids [R] int32 and their logits [R] float32.
    """
    token_ids = np.argmax(logits, axis=1)
    return token_ids.astype(np.int32), logits[np.arange(len(token_ids)), token_ids]


def mask(logits: Array, draws: Array, masks: Sequence[Array]) -> None:
    """Add a mask to each row named, in place: 0 leaves a token as it is, -inf forbids it.

    Args:
        logits: [M, V] float32.
        draws: [K] int, the rows to mask, none twice.
        masks: K arrays [V] float32, 0 or -inf.
    """
    for row, addend in zip(draws.tolist(), masks, strict=True):
        logits[row] += addend


def allow(logits: Array, draws: Array, masks: Sequence[bytes]) -> None:
    """Set to -inf what a mask does not allow, in each row named, in place.

    Args:
        logits: [M, V] float32.
        draws: [K] int, the rows to change, none twice.
        masks: K times at least V bits, bit ``i % 8`` of byte ``i // 8`` set if token i is allowed.
    """
    for row, mask in zip(draws.tolist(), masks, strict=True):
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=logits.shape[1], bitorder="little")
        logits[row, bits == 0] = -np.inf


def forbid(logits: Array, draws: Array, token_ids: Array) -> None:
    """Set ``logits[draws[i], token_ids[i]]`` to -inf, in place. logits [M, V] float32; draws, token_ids [K] int."""
    logits[draws, token_ids] = -np.inf


def add_bias(logits: Array, draws: Array, token_ids: Array, biases: Array) -> None:
    """Add ``biases[i]`` to ``logits[draws[i], token_ids[i]]``, in place.

    Args:
        logits: [M, V] float32.
        draws, token_ids: [K] int, no pair twice.
        biases: [K] float32.
    """
    logits[draws, token_ids] += biases


def penalize(
    logits: Array, draws: Array, seen: Array, seen_rows: Array, repetition: Array, frequency: Array, presence: Array
) -> None:
    """Make tokens that already occurred less likely, in the rows named, in place.

    First the repetition penalty on every token of prompt and output: a positive logit is divided by it, another one
    multiplied (CTRL, arXiv:1909.05858). Then, on generated tokens, ``frequency`` times their count and ``presence``
    once are subtracted (the OpenAI API's definition). Results stay below +inf.

    Args:
        logits: [M, V] float32.
        draws: [K] int, the rows to change, none twice.
        seen: [P, V] int32; a token's count in the output, plus ``SEEN_IN_PROMPT`` if it stands in the prompt.
        seen_rows: [K] int, the row of ``seen`` that belongs to each draw.
        repetition, frequency, presence: [K] float64; 1, 0 and 0 change nothing.
    """
    factors = (array.tolist() for array in (draws, seen_rows, repetition, frequency, presence))
    for draw, seen_row, *factor in zip(*factors, strict=True):
        token_ids = np.flatnonzero(seen[seen_row] != 0)
        logits[draw, token_ids] = _penalized(logits[draw, token_ids], seen[seen_row, token_ids], *factor)


def _penalized(
    logits: np.ndarray, seen: np.ndarray, repetition: float, frequency: float, presence: float
) -> np.ndarray:
    counts = seen & (SEEN_IN_PROMPT - 1)
    values = logits.astype(np.float64)
    with np.errstate(over="ignore"):
        values = np.where(values > 0, values / repetition, values * repetition)
        values -= frequency * counts + presence * (counts > 0)
        return np.minimum(values, _FLOAT32_MAX).astype(np.float32)


def uniforms(seeds: Array, positions: Array) -> Array:
    """One random number per draw, a pure function of (seed, position): 53 random bits of Philox4x32-10.

    Philox is counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the seed is the
    key, the position the counter, so a draw needs no state and does not depend on its neighbours.

    Args:
        seeds: [N] uint64.
        positions: [N] int64.
    Returns:
        [N] float64 in [0, 1 - 2**-53].
    """
    counters = np.zeros((4, len(seeds)), np.uint64)
    counters[0], counters[1] = _low_and_high(positions.astype(np.uint64))
    words = philox4x32(counters, np.stack(_low_and_high(seeds)))
    bits: Array = ((words[1] << _HALF) | words[0]) >> np.uint64(11)
    return bits * 2.0**-53


def philox4x32(counters: Array, keys: Array) -> Array:
    """Philox4x32-10: 128 random bits per counter and key. Words of 32 bits are held in uint64.

    Args:
        counters: [4, N] uint64, the counter's words.
        keys: [2, N] uint64, the key's words.
    Returns:
        [4, N] uint64, the random words.
    """
    even, odd = counters[0::2], counters[1::2]
    for step in range(_PHILOX_ROUNDS):
        product = even * _PHILOX_MULTIPLIERS
        round_key = (keys + np.uint64(step) * _PHILOX_KEY_STEPS) & _WORD
        even, odd = (product >> _HALF)[::-1] ^ odd ^ round_key, (product & _WORD)[::-1]
    return np.stack([even[0], odd[0], even[1], odd[1]])


def _low_and_high(values: Array) -> tuple[Array, Array]:
    return values & _WORD, values >> _HALF


def draw(
    logits: Array, rows: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array, uniform: Array
) -> Array:
    """Draw a token from each of N rows: softmax at a temperature, cut by min-p, top-k and top-p, inverse CDF.

    min-p (arXiv:2407.01082) keeps tokens at least ``min_p`` times as likely as the best. top-k keeps the k first of the
    ranking. top-p (nucleus sampling, arXiv:1904.09751) keeps the shortest prefix of the ranking that has at least
    ``top_p`` of the mass the other two left. The token drawn is the first, in vocabulary order, at which the float64
    cumulative sum of the kept weights exceeds ``uniform`` times their total.

    Args:
        logits: [R, V] float32, every row used has a finite maximum.
        rows: [N] int, the row each draw uses.
        temperature: [N] float64, above 0.
        top_k: [N] int64; 0 or less keeps all.
        top_p, min_p: [N] float64; 1 and 0 keep all.
        uniform: [N] float64 in [0, 1 - 2**-53].
    Returns:
        token ids [N] int32.
    """
    settings = (a.tolist() for a in (temperature, top_k, top_p, min_p, uniform))
    # Row by row, because each row's work then stays in the cache and shrinks to what its cuts leave.
    drawn = (_draw_from(row, *setting) for row, *setting in zip(_rows(logits, rows), *settings, strict=True))
    return np.fromiter(drawn, np.int32, len(rows))


def _draw_from(row: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    best = np.float64(row.max())
    token_ids = None
    if 0 < top_k < row.size:
        token_ids = _largest(row, top_k)
        row = row[token_ids]
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf, as it should
        exponents = (row - best) / temperature
    weights = np.exp(exponents)
    if min_p > 0.0:
        weights *= weights >= min_p
    if top_p < 1.0:
        _cut_to_nucleus(weights, exponents, top_p)
    kept = np.flatnonzero(weights > 0.0)
    cumulative = np.cumsum(weights[kept])
    # uniform is at most 1 - 2**-53, so the product stays below the total even when rounded: some token exceeds it
    choice = kept[np.searchsorted(cumulative, uniform * cumulative[-1], side="right")]
    return int(choice if token_ids is None else token_ids[choice])


def _cut_to_nucleus(weights: np.ndarray, exponents: np.ndarray, top_p: float) -> None:
    """Zero the weights past the shortest prefix of the ranking with ``top_p`` of the mass, in place.

    Tokens are binned by exponent, so that only the bin in which the prefix ends needs sorting.
    """
    bins = (np.minimum(-exponents, _MAX_BINNED) * _BINS_PER_UNIT).astype(np.int32)
    reached = np.cumsum(np.bincount(bins, weights))
    target = top_p * reached[-1]
    last_bin = int(np.searchsorted(reached, target))
    weights *= bins <= last_bin
    in_last_bin = np.flatnonzero(bins == last_bin)
    candidates = weights[in_last_bin]
    missing = target - (reached[last_bin - 1] if last_bin else 0.0)
    num_kept = 1 + int(np.searchsorted(np.cumsum(np.sort(candidates)[::-1]), missing))
    if num_kept < candidates.size:
        weights[np.delete(in_last_bin, _largest(candidates, num_kept))] = 0.0


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices, ascending, of the ``count`` largest of values [V], the lowest indices among equals; 0 < count <= V."""
    candidates = np.arange(values.size)
    num_groups = values.size // _GROUP_SIZE
    if count <= num_groups:
        # The count-th largest of the groups' maxima bounds the count-th largest of all from below.
        maxima = values[: num_groups * _GROUP_SIZE].reshape(_GROUP_SIZE, num_groups).max(axis=0)
        candidates = np.flatnonzero(values >= np.partition(maxima, num_groups - count)[num_groups - count])
        values = values[candidates]
    threshold = np.partition(values, values.size - count)[values.size - count]
    kept = np.flatnonzero(values >= threshold)
    if kept.size > count:
        equals = np.flatnonzero(values[kept] == threshold)
        kept = np.delete(kept, equals[count - kept.size :])
    return candidates[kept]


def token_logprobs(logits: Array, rows: Array, token_ids: Array, num_top: int) -> RowLogprobs:
    """Log-probabilities of one chosen token per row and of the ``num_top`` most likely ones.

    Args:
        logits: [R, V] float32, any memory order, any values.
        rows: [N] int, the row each chosen token belongs to.
        token_ids: [N] int, in [0, V).
        num_top: k, alternatives to list; at most V are.
    """
    num_top = min(num_top, logits.shape[1])
    result = RowLogprobs(
        np.full(len(rows), np.nan),
        np.zeros(len(rows), np.int64),
        np.zeros((len(rows), num_top), np.int32),
        np.full((len(rows), num_top), np.nan),
    )
    for i, (row, token_id) in enumerate(zip(_rows(logits, rows), token_ids.tolist(), strict=True)):
        best = row.max()
        if not np.isfinite(best):
            continue
        log_total = float(best) + math.log(np.exp(row - best).sum(dtype=np.float64))
        result.chosen[i] = row[token_id] - log_total
        result.ranks[i] = 1 + np.count_nonzero(row > row[token_id])
        if num_top:
            top = _largest(row, num_top)
            top = top[np.argsort(-row[top], kind="stable")]
            result.top_token_ids[i] = top
            result.top[i] = row[top] - log_total
    return result


def _rows(logits: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The named rows, each contiguous. A transposed array is read by whole cache lines, not row by row."""
    if logits.strides[1] == logits.itemsize:
        yield from (logits[row] for row in rows)
        return
    for start in range(0, len(rows), _CACHE_LINE_ROWS):
        yield from np.ascontiguousarray(logits[rows[start : start + _CACHE_LINE_ROWS]])
