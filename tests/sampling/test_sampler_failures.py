"""Odd memory orders, broken logits and impossible requests: each harms at most its own draw."""

import numpy as np
import pytest
from sampler_harness import EOS, VOCAB_SIZE, draw, falling, new_sampler, random_logits, random_request, sample, seat

from cupy_engine.sampler import NOT_FINITE, NOTHING_ALLOWED


def test_transposed_and_sliced_logits_give_the_same_and_stay_as_they_were():
    rng = np.random.default_rng(5)
    logits = random_logits(8, rows=12)
    wide = np.zeros((12, VOCAB_SIZE + 3), np.float32)
    wide[:, :VOCAB_SIZE] = logits
    results = []
    for view in (logits, np.asfortranarray(logits), wide[:, :VOCAB_SIZE], np.repeat(logits, 2, axis=0)[::2]):
        sampler = new_sampler()
        rng = np.random.default_rng(5)
        for slot in range(8):
            params, bad_words, prompt, seed = random_request(rng)
            seat(sampler, slot, prompt, seed=seed, bad_words=bad_words, **params | {"logprobs": 2})
        result = sampler.sample(view, np.array([0, 2, 2, 4, 5, 6, 11, 8]), np.arange(8), np.full(8, 20))
        results.append((result.token_ids.tolist(), result.logprobs, sampler.prompt_logprobs(view, np.arange(12), 3)))
        assert np.array_equal(view, logits)
    assert results[1:] == results[:1] * 3


@pytest.mark.parametrize("is_greedy", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_fail_their_own_draws_only(value, is_greedy):
    sampler = new_sampler()
    clean = new_sampler()
    for slot in range(4):
        for one in (sampler, clean):
            seat(one, slot, seed=slot, temperature=0 if is_greedy else 1, logprobs=1, presence_penalty=slot % 2)
    logits = random_logits(4, rows=3)
    expected = sample(clean, logits, slots=range(4), rows=(0, 1, 1, 2))
    logits[1, 17] = value
    result = sample(sampler, logits, slots=range(4), rows=(0, 1, 1, 2))
    assert result.errors == {1: NOT_FINITE, 2: NOT_FINITE}
    assert result.token_ids.tolist() == [expected.token_ids[0], 0, 0, expected.token_ids[3]]
    assert result.logprobs == [expected.logprobs[0], None, None, expected.logprobs[3]]


def test_a_row_of_nothing_but_minus_infinity_is_an_error():
    sampler = new_sampler()
    seat(sampler)
    assert sample(sampler, np.full(VOCAB_SIZE, -np.inf)).errors == {0: NOT_FINITE}


def test_single_minus_infinities_are_forbidden_tokens():
    sampler = new_sampler()
    seat(sampler, repetition_penalty=1.5, top_k=5)
    logits = np.full(VOCAB_SIZE, -np.inf)
    logits[2] = 1.0
    assert draw(sampler, logits) == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_leaves_no_token_is_an_error_not_a_crash(temperature):
    sampler = new_sampler()
    seat(sampler, 0, temperature=temperature, allowed_token_ids=[7, 8], bad_words=[[7], [3, 8]], logprobs=0)
    seat(sampler, 1, temperature=temperature, allowed_token_ids=[EOS], min_tokens=1)
    seat(sampler, 2, temperature=temperature, allowed_token_ids=[VOCAB_SIZE])
    seat(sampler, 3, temperature=temperature, allowed_token_ids=[9])
    result = sample(sampler, falling(7), slots=range(4))
    assert result.errors == dict.fromkeys(range(3), NOTHING_ALLOWED)
    assert result.token_ids.tolist() == [0, 0, 0, 9]
    assert result.logprobs == [None] * 4


def test_prompt_logprobs_of_broken_rows_are_nan_and_leave_the_others_alone():
    logits = random_logits(9, rows=3)
    expected = new_sampler().prompt_logprobs(logits, np.array([1, 2, 3]), 1)
    logits[1, 3] = np.nan
    records = new_sampler().prompt_logprobs(logits, np.array([1, 2, 3]), 1)
    assert [records[0], records[2]] == [expected[0], expected[2]]
    assert np.isnan(records[1].logprob)
    assert records[1].rank == 0


def test_no_draws_give_nothing():
    result = sample(new_sampler(), np.zeros((2, VOCAB_SIZE)), slots=())
    assert (result.token_ids.tolist(), result.logprobs, result.errors) == ([], [], {})
