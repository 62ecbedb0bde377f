"""Every sampling parameter alone, greedily; then all together against the definition."""

import numpy as np
import pytest
import sampling_reference
from sampler_harness import EOS, VOCAB_SIZE, draw, falling, new_sampler, random_request, sample, seat

from cupy_engine.plan import TokenMask
from cupy_engine.sampling_params import SamplingParams


def test_temperature_zero_takes_the_most_likely_token_and_the_lowest_id_among_equals():
    sampler = new_sampler()
    seat(sampler, temperature=0)
    assert draw(sampler, falling(7, 8)) == 7
    assert draw(sampler, np.zeros(VOCAB_SIZE)) == 0


def test_allowed_token_ids_rule_out_all_others():
    sampler = new_sampler()
    seat(sampler, temperature=0, allowed_token_ids=[9, 30])
    assert draw(sampler, falling(7, 30, 9)) == 30


def test_a_bad_word_of_one_token_is_never_drawn():
    sampler = new_sampler()
    seat(sampler, temperature=0, bad_words=[[7]])
    assert draw(sampler, falling(7, 8)) == 8


def test_a_longer_bad_word_loses_its_last_token_only_where_the_others_precede():
    sampler = new_sampler()
    seat(sampler, prompt=[1, 2, 3], temperature=0, bad_words=[[2, 3, 7], [3, 3, 7], [5, 7], [7, 9, 10]])
    assert draw(sampler, falling(7, 9)) == 9  # 2 3 | 7: the prompt counts
    assert draw(sampler, falling(7, 9), 4) == 7  # 3 9 | 7
    assert draw(sampler, falling(9), 5) == 9
    assert draw(sampler, falling(10, 5), 6) == 5  # 7 9 | 10: drawn tokens were recorded
    assert draw(sampler, falling(7, 9), 7) == 9  # 5 | 7


def test_a_bad_word_longer_than_the_context_does_not_match():
    sampler = new_sampler()
    seat(sampler, prompt=[3], temperature=0, bad_words=[[3, 3, 7]])
    assert draw(sampler, falling(7), 1) == 7


def test_min_tokens_forbids_eos_and_stop_tokens_before():
    sampler = new_sampler()
    seat(sampler, prompt=[1, 2, 3], temperature=0, min_tokens=2, stop_token_ids=[11])
    assert draw(sampler, falling(EOS, 11, 7), 3) == 7
    assert draw(sampler, falling(11, EOS, 8), 4) == 8
    assert draw(sampler, falling(EOS, 11, 7), 5) == EOS
    assert draw(sampler, falling(11, EOS, 7), 5) == 11


def test_logit_bias_is_added_and_cannot_revive_a_forbidden_token():
    sampler = new_sampler()
    seat(sampler, temperature=0, logit_bias={7: -0.25, 30: 1.0, 31: 100}, bad_words=[[31]])
    assert draw(sampler, falling(7, 8, 9)) == 8
    seat(sampler, temperature=0, logit_bias={30: 100})
    assert draw(sampler, falling(7)) == 30


def test_repetition_penalty_counts_prompt_and_output():
    sampler = new_sampler()
    seat(sampler, prompt=[1, 2, 7], temperature=0, repetition_penalty=1.5)
    assert draw(sampler, falling(7, 2, 8, 9), 3) == 8
    assert draw(sampler, falling(7, 2, 8, 9), 4) == 9


def test_repetition_penalty_lowers_negative_logits_too():
    sampler = new_sampler()
    seat(sampler, prompt=[7], temperature=0, repetition_penalty=1.5)
    assert draw(sampler, falling(7, 8) - 20, 1) == 8


@pytest.mark.parametrize("penalty", [{"presence_penalty": 0.15}, {"frequency_penalty": 0.15}])
def test_presence_and_frequency_penalties_count_the_output_only(penalty):
    sampler = new_sampler()
    seat(sampler, prompt=[1, 2, 7], temperature=0, **penalty)
    assert draw(sampler, falling(7, 8), 3) == 7
    assert draw(sampler, falling(7, 8), 4) == 8


def test_frequency_penalty_grows_with_the_count_and_presence_does_not():
    logits = np.zeros(VOCAB_SIZE)
    logits[[7, 8]] = 5.0, 4.55
    sampler = new_sampler()
    seat(sampler, slot=0, temperature=0, frequency_penalty=0.2)
    seat(sampler, slot=1, temperature=0, presence_penalty=0.2)
    drawn = [sample(sampler, logits, position, slots=(0, 1)).token_ids.tolist() for position in range(3, 8)]
    assert drawn == [[7, 7], [7, 7], [7, 7], [8, 7], [7, 7]]


def test_ids_outside_the_vocabulary_are_ignored():
    sampler = new_sampler()
    far = VOCAB_SIZE + 5
    seat(
        sampler,
        prompt=[1, 2, far],
        temperature=0,
        repetition_penalty=1.5,
        min_tokens=4,
        stop_token_ids=[far],
        logit_bias={far: 5.0},
        allowed_token_ids=[7, far],
        bad_words=[[far], [far, 7], [7, far]],
    )
    assert draw(sampler, falling(9, 7)) == 7


@pytest.mark.parametrize("trial", range(12))
def test_a_batch_of_everything_is_the_definition_row_by_row(trial):
    """Eight random requests side by side, ten steps long: tokens exactly, log-probabilities closely."""
    rng = np.random.default_rng(trial)
    sampler = new_sampler()
    requests = [random_request(rng) for _ in range(8)]
    outputs = [[] for _ in requests]
    for slot, (params, bad_words, prompt, seed) in enumerate(requests):
        seat(sampler, slot, prompt, seed=seed, bad_words=bad_words, **params)
    for _ in range(10):
        logits = (rng.standard_normal((8, VOCAB_SIZE)) * 3).astype(np.float32)
        positions = [len(request[2]) + len(output) for request, output in zip(requests, outputs, strict=True)]
        rows = rng.permutation(8)
        result = sample(sampler, logits, slots=range(8), rows=rows, positions=positions)
        assert not result.errors
        for slot, (params, bad_words, prompt, seed) in enumerate(requests):
            raw, params = logits[rows[slot]].tolist(), SamplingParams(**params)
            edited = sampling_reference.edited_logits(raw, params, prompt, outputs[slot], [EOS], bad_words)
            token = sampling_reference.draw(edited, params, sampling_reference.uniform(seed, positions[slot]))
            assert result.token_ids[slot] == token, (params, bad_words, prompt, outputs[slot])
            check_logprobs(result.logprobs[slot], raw, token, params)
            outputs[slot].append(token)


def check_logprobs(record, logits, token, params):
    if params.logprobs is None:
        assert record is None
        return
    order = sampling_reference.ranking(logits)
    assert record.token_id == token
    assert record.logprob == pytest.approx(sampling_reference.logprob(logits, token), abs=1e-5)
    assert record.rank == 1 + order.index(token)
    assert [top_id for top_id, _ in record.top] == order[: params.logprobs]
    expected = [sampling_reference.logprob(logits, top_id) for top_id in order[: params.logprobs]]
    assert [value for _, value in record.top] == pytest.approx(expected, abs=1e-5)


def allow(*tokens):
    flags = np.zeros(-(-VOCAB_SIZE // 32) * 32, bool)
    flags[list(tokens)] = True
    return np.packbits(flags, bitorder="little").tobytes()


def test_guided_slots_draw_only_what_their_masks_allow():
    sampler = new_sampler()
    for slot in range(3):
        seat(sampler, slot, is_guided=slot != 1, temperature=0.0, bad_words=[[7]])
    logits = falling(7, 8, 9)
    sampler.set_masks([TokenMask(0, allow(7, 9, 30)), TokenMask(2, allow(7))])
    result = sample(sampler, logits, slots=(0, 1, 2))
    assert result.token_ids.tolist()[:2] == [9, 8]
    assert list(result.errors) == [2], "bad words hold too, and leave nothing here"
    sampler.set_masks([TokenMask(0, allow(39))])
    assert draw(sampler, logits) == 39
    seat(sampler, 0, temperature=0.0)
    sampler.set_masks([])
    assert draw(sampler, logits) == 7, "the next one in the slot is free"
