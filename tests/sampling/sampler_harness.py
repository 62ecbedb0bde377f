"""A small sampler, slots seated in one line, logits whose ranking is plain to see, and random requests."""

import numpy as np

from cupy_engine.device import NumpyDevice
from cupy_engine.plan import SlotSetup
from cupy_engine.sampler import Sampler
from cupy_engine.sampling_params import SamplingParams

VOCAB_SIZE = 40
EOS = 0


def new_sampler(num_slots=8, vocab_size=VOCAB_SIZE):
    return Sampler(num_slots, vocab_size, NumpyDevice())


def seat(
    sampler, slot=0, prompt=(1, 2, 3), output=(), seed=0, bad_words=(), needs_logprobs=None, is_guided=False, **params
):
    params = SamplingParams(**params)
    sampler.set_slot(
        SlotSetup(
            slot=slot,
            params=params,
            seed=seed,
            token_ids=[*prompt, *output],
            num_prompt_tokens=len(prompt),
            eos_token_ids=[EOS],
            bad_words_token_ids=[list(word) for word in bad_words],
            needs_logprobs=params.logprobs is not None if needs_logprobs is None else needs_logprobs,
            is_guided=is_guided,
        )
    )


def sample(sampler, logits, position=3, *, slots=(0,), rows=None, positions=None):
    logits = np.asarray(logits, np.float32)
    logits = logits[None] if logits.ndim == 1 else logits
    rows = np.zeros(len(slots), int) if rows is None else np.array(rows)
    positions = np.full(len(slots), position) if positions is None else np.array(positions)
    return sampler.sample(logits, rows, np.array(slots, int), positions)


def draw(sampler, logits, position=3, slot=0):
    result = sample(sampler, logits, position, slots=(slot,))
    assert not result.errors
    return int(result.token_ids[0])


def falling(*best):
    """Logits that rank the given tokens first, then the rest by id; all distinct, 0.1 apart."""
    order = [*best, *(token for token in range(VOCAB_SIZE) if token not in best)]
    logits = np.empty(VOCAB_SIZE, np.float32)
    logits[order] = 5 - 0.1 * np.arange(VOCAB_SIZE)
    return logits


def random_request(rng):
    """Settings of every kind, each present about half the time."""

    def maybe(value):
        return value if rng.random() < 0.5 else None

    def some_ids(count):
        return rng.choice(VOCAB_SIZE, count, replace=False).tolist()

    params = {
        "temperature": float(rng.choice([0.0, 0.7, 1.0, 1.5])),
        "top_k": maybe(int(rng.integers(1, 20))),
        "top_p": maybe(float(rng.uniform(0.3, 1))),
        "min_p": maybe(float(rng.uniform(0, 0.3))),
        "repetition_penalty": maybe(float(rng.uniform(0.7, 1.6))),
        "frequency_penalty": maybe(float(rng.uniform(-1, 1))),
        "presence_penalty": maybe(float(rng.uniform(-1, 1))),
        "min_tokens": maybe(3),
        "stop_token_ids": maybe(some_ids(5)),
        "logit_bias": maybe({token: float(rng.uniform(-3, 3)) for token in some_ids(6)}),
        "allowed_token_ids": maybe(some_ids(25)),
        "logprobs": maybe(int(rng.integers(0, 6))),
    }
    params = {name: value for name, value in params.items() if value is not None}
    bad_words = [rng.integers(0, VOCAB_SIZE, rng.integers(1, 4)).tolist() for _ in range(rng.integers(0, 8))]
    prompt = rng.integers(0, VOCAB_SIZE, rng.integers(1, 12)).tolist()
    return params, bad_words, prompt, int(rng.integers(-(2**63), 2**63))


def random_logits(seed, rows=1):
    return (np.random.default_rng(seed).standard_normal((rows, VOCAB_SIZE)) * 2).astype(np.float32)
