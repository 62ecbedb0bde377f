"""Sampling as its definition reads: one token at a time, in plain Python numbers, independent of the engine's code."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence

from cupy_engine.sampling_params import SamplingParams

FORBIDDEN = -math.inf


def edited_logits(
    logits: Sequence[float],
    params: SamplingParams,
    prompt: list[int],
    output: list[int],
    eos: list[int],
    bad_words: list[list[int]],
) -> list[float]:
    """Raw logits of the token after prompt + output → what the draw sees."""
    result = list(logits)
    context = prompt + output
    for token in range(len(result)):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            result[token] = FORBIDDEN
        if any([*context, token][-len(word) :] == word for word in bad_words):
            result[token] = FORBIDDEN
        if len(output) < params.min_tokens and token in [*eos, *(params.stop_token_ids or [])]:
            result[token] = FORBIDDEN
        result[token] += (params.logit_bias or {}).get(token, 0.0)
        if token in context:
            positive = result[token] > 0
            result[token] *= 1 / params.repetition_penalty if positive else params.repetition_penalty
        result[token] -= params.frequency_penalty * output.count(token)
        result[token] -= params.presence_penalty * (token in output)
    return result


def ranking(logits: Sequence[float]) -> list[int]:
    """Token ids, most likely first, of equals the lower id first."""
    return sorted(range(len(logits)), key=lambda token: (-logits[token], token))


def kept_weights(logits: Sequence[float], params: SamplingParams) -> dict[int, float]:
    """The tokens that survive min-p, top-k and top-p, ascending, with their unnormalized probabilities."""
    best = max(logits)
    weights = [math.exp((value - best) / params.temperature) for value in logits]
    kept = [token for token in ranking(logits) if weights[token] >= params.min_p]
    if params.top_k > 0:
        kept = kept[: params.top_k]
    if params.top_p < 1:
        mass = math.fsum(weights[token] for token in kept)
        reached = list(itertools.accumulate(weights[token] for token in kept))
        kept = kept[: 1 + bisect.bisect_left(reached, params.top_p * mass)]
    return {token: weights[token] for token in sorted(kept) if weights[token] > 0}


def draw(logits: Sequence[float], params: SamplingParams, uniform: float) -> int:
    """Greedy, or the inverse of the cumulative distribution in vocabulary order."""
    if params.temperature == 0:
        return ranking(logits)[0]
    weights = kept_weights(logits, params)
    target = uniform * math.fsum(weights.values())
    reached = 0.0
    for token, weight in weights.items():
        reached += weight
        if reached > target:
            return token
    return max(weights)


def logprob(logits: Sequence[float], token: int) -> float:
    best = max(logits)
    return logits[token] - best - math.log(math.fsum(math.exp(value - best) for value in logits))


def philox4x32_10(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Figure 2 of Salmon et al. (SC 2011), with Python's integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            (second >> 32) ^ c[1] ^ k0,
            second & 0xFFFFFFFF,
            (first >> 32) ^ c[3] ^ k1,
            first & 0xFFFFFFFF,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def uniform(seed: int, position: int) -> float:
    seed &= (1 << 64) - 1
    words = philox4x32_10([position & 0xFFFFFFFF, position >> 32, 0, 0], [seed & 0xFFFFFFFF, seed >> 32])
    return ((words[1] << 32 | words[0]) >> 11) / 2**53
