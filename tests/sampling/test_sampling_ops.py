"""The ops on logits, each against its definition in plain Python."""

import math

import numpy as np
import pytest
import sampling_reference

from cupy_engine.ops import sampling
from cupy_engine.sampling_params import SamplingParams


def draw_one(logits, uniform, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    settings = (np.array([value]) for value in (temperature, top_k, top_p, min_p, uniform))
    return sampling.draw(np.array([logits], np.float32), np.array([0]), *settings)[0]


def drawable(logits, **settings):
    """The tokens that some random number leads to."""
    return sorted({int(draw_one(logits, (i + 0.5) / 1000, **settings)) for i in range(1000)})


def test_argmax_takes_the_lowest_id_among_equals():
    token_ids, logits = sampling.argmax(np.array([[1, 3, 3, 2], [5, 5, 5, 5]], np.float32))
    assert token_ids.tolist() == [1, 0]
    assert token_ids.dtype == np.int32
    assert logits.tolist() == [3, 5]


@pytest.mark.parametrize("broken", [[0, np.nan, 1], [0, np.inf, 1], [-np.inf] * 3, [np.nan, np.inf, -np.inf]])
def test_argmax_shows_which_rows_cannot_be_sampled(broken):
    _, logits = sampling.argmax(np.array([[1, 2, -np.inf], broken], np.float32))
    assert np.isfinite(logits).tolist() == [True, False]


@pytest.mark.parametrize("vocab_size", [1, 5, 64, 1000, 5000])
@pytest.mark.parametrize("is_coarse", [False, True])
def test_draw_is_the_definition(vocab_size, is_coarse):
    """Random settings, on distinct logits and on coarse ones full of equals."""
    rng = np.random.default_rng(vocab_size)
    for _ in range(12):
        logits = (rng.standard_normal(vocab_size) * rng.choice([0.5, 3, 20])).astype(np.float32)
        if is_coarse:
            logits = np.round(logits * 2) / 2
        params = SamplingParams(
            temperature=float(rng.choice([0.1, 0.7, 1.0, 3.0])),
            top_k=int(rng.choice([0, 1, 2, 7, 50, 70, 2000])),
            top_p=float(rng.choice([1.0, 0.995, 0.95, 0.7, 0.31, 0.01])),
            min_p=float(rng.choice([0.0, 0.0, 0.02, 0.4])),
        )
        weights = sampling_reference.kept_weights(logits.tolist(), params)
        for uniform in rng.random(4):
            token = draw_one(
                logits,
                uniform,
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                min_p=params.min_p,
            )
            assert token == sampling_reference.draw(logits.tolist(), params, uniform), (params, uniform, len(weights))


def test_top_k_keeps_exactly_k_and_lower_ids_among_equals():
    logits = [1, 3, 2, 3, 2, 2]
    assert drawable(logits, top_k=1) == [1]
    assert drawable(logits, top_k=2) == [1, 3]
    assert drawable(logits, top_k=3) == [1, 2, 3]
    assert drawable(logits, top_k=4) == [1, 2, 3, 4]
    assert drawable(logits, top_k=6) == drawable(logits, top_k=99) == drawable(logits) == [0, 1, 2, 3, 4, 5]


def test_top_k_finds_the_largest_of_a_large_vocabulary_wherever_they_stand():
    logits = np.zeros(49152)
    logits[[0, 63, 64, 40000, 49151]] = 20.0
    assert [draw_one(logits, u, top_k=5) for u in (0.1, 0.3, 0.5, 0.7, 0.9)] == [0, 63, 64, 40000, 49151]
    assert [draw_one(logits, u, top_k=3) for u in (0.1, 0.5, 0.9)] == [0, 63, 64]


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = np.log([0.1, 0.4, 0.3, 0.2])
    assert drawable(logits, top_p=1e-9) == [1]
    assert drawable(logits, top_p=0.39) == [1]
    assert drawable(logits, top_p=0.41) == [1, 2]
    assert drawable(logits, top_p=0.69) == [1, 2]
    assert drawable(logits, top_p=0.71) == [1, 2, 3]
    assert drawable(logits, top_p=0.91) == [0, 1, 2, 3]


def test_top_p_reached_exactly_stops_there_and_takes_lower_ids_among_equals():
    assert drawable([0.0] * 8, top_p=0.5) == [0, 1, 2, 3]
    assert drawable([0.0] * 8, top_p=0.51) == [0, 1, 2, 3, 4]
    assert drawable([0.0] * 8, top_p=0.125) == [0]


def test_top_p_counts_the_mass_that_the_other_cuts_leave():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert drawable(logits, top_p=0.55) == [0, 1]
    assert drawable(logits, top_p=0.55, top_k=2) == [0]  # 0.4 of the 0.7 left
    assert drawable(logits, top_p=0.55, min_p=0.7) == [0]


def test_min_p_is_relative_to_the_most_likely_token():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert drawable(logits, min_p=0.74) == [0, 1]
    assert drawable(logits, min_p=0.76) == [0]
    assert drawable([2.0, 1.0, 2.0], min_p=1.0) == [0, 2]


def test_the_draw_inverts_the_cumulative_distribution_in_vocabulary_order():
    logits = np.log([0.25, 0.5, 0.25])
    almost_one = 1 - 2**-53
    assert [draw_one(logits, u) for u in (0.0, 0.24, 0.26, 0.74, 0.76, almost_one)] == [0, 0, 1, 1, 2, 2]
    assert [draw_one([0.0] * 4, u) for u in (0.0, 0.25, 0.5, 0.75, almost_one)] == [0, 1, 2, 3, 3]


def test_a_token_without_probability_is_never_drawn():
    almost_one = 1 - 2**-53
    logits = [-np.inf, -3e38, 1.0, -np.inf, 1.0, -1e5, -np.inf]
    assert [draw_one(logits, u) for u in (0.0, 0.4, 0.6, almost_one)] == [2, 2, 4, 4]
    assert [draw_one(logits, u, top_k=6, top_p=0.999) for u in (0.0, almost_one)] == [2, 4]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy_up_to_equals(temperature):
    assert drawable([1.0, 2.0, -np.inf, 2.0, 1.999], temperature=temperature) == [1, 3]


def test_extreme_but_finite_logits():
    assert drawable([3.4e38, -3.4e38, 3.4e38], top_p=0.9) == [0, 2]
    assert drawable([-3.4e38] * 3) == [0, 1, 2]
    assert drawable([3.4e38, 3.3e38], temperature=100.0) == [0]


def test_draws_use_the_rows_they_name():
    logits = np.full((3, 100), -np.inf, np.float32)
    logits[[0, 1, 2], [5, 6, 7]] = 0.0
    five = np.array([0.5] * 5)
    settings = (five * 2, np.zeros(5, int), five * 2, five * 0, five)
    rows = np.array([2, 0, 0, 1, 2])
    assert sampling.draw(logits, rows, *settings).tolist() == [7, 5, 5, 6, 7]
    assert sampling.draw(np.asfortranarray(logits), rows, *settings).tolist() == [7, 5, 5, 6, 7]


def test_mask_forbid_and_add_bias_touch_only_what_they_name():
    logits = np.zeros((3, 4), np.float32)
    mask = np.array([0, -np.inf, 0, -np.inf], np.float32)
    sampling.mask(logits, np.array([1]), [mask])
    sampling.forbid(logits, np.array([2, 2]), np.array([0, 3]))
    sampling.add_bias(logits, np.array([0, 1, 1]), np.array([1, 1, 2]), np.array([1.5, 100, -2], np.float32))
    inf = np.inf
    assert logits.tolist() == [[0, 1.5, 0, 0], [0, -inf, -2, -inf], [-inf, 0, 0, -inf]]


def test_penalize_follows_the_definitions():
    logits = np.array([[2, -2, 2, -2, 2, -np.inf], [1, 1, 1, 1, 1, 1]], np.float32)
    in_prompt = sampling.SEEN_IN_PROMPT
    seen = np.array([[9] * 6, [in_prompt, in_prompt, 3, in_prompt + 1, 0, 2]], np.int32)
    one = np.ones(1)
    sampling.penalize(logits, np.array([0]), seen, np.array([1]), one * 2, one * 0.5, one * 0.25)
    prompt_only, output = [1, -4], [1 - 0.5 * 3 - 0.25, -4 - 0.5 - 0.25]
    assert logits.tolist() == [[*prompt_only, *output, 2, -np.inf], [1] * 6]


def test_penalties_never_overflow_to_infinity():
    logits = np.array([[3e38, 1.0]], np.float32)
    one = np.ones(1)
    sampling.penalize(
        logits, np.array([0]), np.array([[1, 0]], np.int32), np.array([0]), one * 1e-300, one * 0, one * 0
    )
    assert logits.tolist() == [[np.finfo(np.float32).max, 1.0]]


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("vocab_size", [3, 300, 49152])
def test_logprobs_ranks_and_alternatives(vocab_size, is_transposed):
    rng = np.random.default_rng(7)
    logits = (rng.standard_normal((20, vocab_size)) * 5).astype(np.float32)
    rows, token_ids = np.arange(19, 1, -1), rng.integers(0, vocab_size, 18)
    values = sampling.token_logprobs(np.asfortranarray(logits) if is_transposed else logits, rows, token_ids, 5)
    for i, (row, token_id) in enumerate(zip(rows, token_ids, strict=True)):
        expected = logits[row].astype(np.float64)
        expected -= np.logaddexp.reduce(expected)
        order = sampling_reference.ranking(logits[row].tolist())
        assert values.chosen[i] == pytest.approx(expected[token_id], abs=1e-5)
        assert values.ranks[i] == 1 + order.index(token_id)
        assert values.top_token_ids[i].tolist() == order[:5]
        assert values.top[i] == pytest.approx(expected[order[:5]], abs=1e-5)


def test_logprobs_of_equals_share_a_rank_and_list_lower_ids_first():
    values = sampling.token_logprobs(np.zeros((1, 4), np.float32), np.array([0]), np.array([3]), 3)
    assert values.chosen == pytest.approx([-math.log(4)])
    assert values.ranks.tolist() == [1]
    assert values.top_token_ids.tolist() == [[0, 1, 2]]


def test_logprobs_of_forbidden_tokens_and_broken_rows():
    logits = np.array([[0, -np.inf, 0], [0, np.nan, 0], [np.inf, 0, 0], [-np.inf] * 3], np.float32)
    values = sampling.token_logprobs(logits, np.arange(4), np.array([1, 0, 0, 0]), 2)
    assert values.chosen[0] == -np.inf
    assert values.ranks.tolist() == [3, 0, 0, 0]
    assert np.isnan(values.chosen[1:]).all()
    assert np.isnan(values.top[1:]).all()
