"""Log-probabilities: of the raw logits, as many alternatives as a slot asked for."""

import numpy as np
import pytest
import sampling_reference
from sampler_harness import falling, new_sampler, sample, seat


def test_logprobs_are_those_of_the_raw_logits():
    sampler = new_sampler()
    seat(sampler, temperature=0, logit_bias={30: 50}, logprobs=1)
    logits = falling(7)
    record = sample(sampler, logits).logprobs[0]
    assert (record.token_id, record.rank) == (30, 31)
    assert record.logprob == pytest.approx(sampling_reference.logprob(logits.tolist(), 30), abs=1e-6)
    assert record.top[0][0] == 7


def test_each_slot_gets_the_alternatives_it_asked_for():
    sampler = new_sampler()
    for slot, count in enumerate((None, 0, 3, 20)):
        seat(sampler, slot, temperature=0, logprobs=count)
    seat(sampler, 4, temperature=0, needs_logprobs=True)  # best_of ranks by log-probability though nobody asked for it
    records = sample(sampler, falling(), slots=range(5)).logprobs
    assert records[0] is None
    assert [len(record.top) for record in records[1:]] == [0, 3, 20, 0]


def test_prompt_logprobs_follow_the_given_tokens():
    logits = np.stack([falling(7, 8), falling(9)])
    records = new_sampler().prompt_logprobs(logits, np.array([8, 20]), 2)
    assert [(record.token_id, record.rank) for record in records] == [(8, 2), (20, 21)]
    assert [[token for token, _ in record.top] for record in records] == [[7, 8], [9, 0]]
    assert records[0].logprob == pytest.approx(sampling_reference.logprob(logits[0].tolist(), 8), abs=1e-6)
