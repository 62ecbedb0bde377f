"""What a slot's draws may not depend on: its number, its neighbours, an interruption, who sat there before."""

import numpy as np
import pytest
from sampler_harness import VOCAB_SIZE, draw, falling, new_sampler, random_logits, random_request, sample, seat


def test_same_seed_gives_same_tokens_whatever_slot_row_and_neighbours():
    """One request alone in slot 0, and again in slot 5 among seven others that use every feature."""
    settings = {"seed": 99, "temperature": 1.0, "top_p": 0.9, "frequency_penalty": 0.4, "bad_words": [[4], [5, 6]]}
    alone, crowded = new_sampler(), new_sampler()
    seat(alone, 0, **settings)
    rng = np.random.default_rng(3)
    for slot in range(8):
        params, bad_words, prompt, seed = random_request(rng)
        seat(crowded, slot, prompt, seed=seed, bad_words=bad_words, **params)
    seat(crowded, 5, **settings)
    for position in range(3, 30):
        logits = random_logits(position)
        crowd = np.concatenate([random_logits(position + 1000, 7), logits])
        slots = rng.permutation(8).tolist()
        positions = [position if slot == 5 else 50 + position for slot in slots]
        rows = [7 if slot == 5 else 6 - i % 7 for i, slot in enumerate(slots)]
        result = sample(crowded, crowd, slots=slots, rows=rows, positions=positions)
        assert result.token_ids[slots.index(5)] == draw(alone, logits, position)


def test_seeds_and_positions_make_different_draws_and_every_64_bit_seed_counts():
    sampler = new_sampler()
    flat = np.zeros(VOCAB_SIZE)
    drawn = set()
    for seed in (0, 1, -1, 2**32, -(2**63), 2**63 - 1):
        seat(sampler, seed=seed)
        drawn.add(tuple(draw(sampler, flat, position) for position in range(3, 23)))
    assert len(drawn) == 6
    assert all(len(set(tokens)) > 5 for tokens in drawn)


def test_a_fork_draws_several_tokens_from_one_row():
    """n = 3 at a prompt's end: each slot gets what it would get alone."""
    logits = random_logits(1, rows=2)
    together = new_sampler()
    expected = []
    for slot in range(3):
        seat(together, slot, seed=1000 + slot)
        alone = new_sampler()
        seat(alone, seed=1000 + slot)
        expected.append(draw(alone, logits[1]))
    assert sample(together, logits, slots=(0, 1, 2), rows=(1, 1, 1)).token_ids.tolist() == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("trial", range(5))
def test_a_resumed_sequence_goes_on_as_if_never_interrupted(trial):
    """Seated anew with its output so far, in another slot, after each possible number of tokens."""
    params, bad_words, prompt, seed = random_request(np.random.default_rng(100 + trial))
    params |= {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.7, "min_tokens": 5}
    sampler = new_sampler()
    seat(sampler, 0, prompt, seed=seed, bad_words=bad_words, **params)
    tokens = [draw(sampler, random_logits(i), len(prompt) + i) for i in range(12)]
    for interrupted in range(12):
        seat(sampler, 1, prompt, tokens[:interrupted], seed=seed, bad_words=bad_words, **params)
        rest = [draw(sampler, random_logits(i), len(prompt) + i, slot=1) for i in range(interrupted, 12)]
        assert rest == tokens[interrupted:]


def test_a_new_sequence_in_a_slot_inherits_nothing():
    sampler = new_sampler()
    seat(
        sampler, 0, prompt=[7], temperature=0, repetition_penalty=2.0, allowed_token_ids=[30], logprobs=5, min_tokens=9
    )
    draw(sampler, falling(7), 1)
    seat(sampler, 0, prompt=[1], temperature=0)
    assert draw(sampler, falling(7, 8), 1) == 7
    assert sample(sampler, falling(7), 2).logprobs == [None]
    seat(sampler, 0, prompt=[1], temperature=0, repetition_penalty=2.0)
    assert draw(sampler, falling(7, 30, 8), 1) == 7


def test_penalty_state_exists_only_for_slots_that_penalize_and_is_reused():
    sampler = new_sampler(num_slots=6)
    assert sampler._seen.counts.nbytes == 0
    for _ in range(3):
        for slot in range(6):
            seat(sampler, slot, presence_penalty=1.0)
        for slot in range(5):
            seat(sampler, slot)
    assert len(sampler._seen.counts) == 6
